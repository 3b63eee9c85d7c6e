"""`offramp export NAME FILE.gguf`, and `generate F` and `serve F` of the folder that it writes,
without PyTorch."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

from offramp.cli.command_line import WithoutPytorch
from offramp.cli.options import field_options
from offramp.cli.output import print_json, print_text
from offramp.cli.parser import Parser, share, whole
from offramp.common.names import close_name
from offramp.common.pytorch import needs_pytorch
from offramp.core.errors import AdapterError
from offramp_llama_cpp import slice_command

log = logging.getLogger(__name__)

NAMES = ("generate", "serve", "export")
ALONE = ("--", "-h", "--help-all", "--help", "--json", "--plain", "--quiet", "--stream")
"""Options of commands there that take no value."""
SLOTS = 4


def is_edge(argv: Sequence[str]) -> bool:
    """Return True if a command names a folder of segments in the place of a model, or for `export`
    a GGUF file: in a word that is no option's value, for what `offramp export` wrote and --gguf
    names has segments too."""
    if not argv or argv[0] not in NAMES:
        return False
    cut = argv[0] == "export"
    words = (word for before, word in pairwise(argv) if not _takes_a_value(before))
    return any(word.endswith(".gguf") if cut else _is_sliced(word) for word in words)


def _takes_a_value(word: str) -> bool:
    return word.startswith("-") and "=" not in word and word not in ALONE


def _is_sliced(word: str) -> bool:
    try:
        return (Path(word) / "segment-0.gguf").is_file()
    except (OSError, ValueError):  # no name of a file
        return False


def add(commands: Any) -> None:
    """The commands, as they are for a folder of segments."""
    slice_command.add(commands)
    for name, run, options, help in (
        ("generate", _generate, _generate_options, "Answer a prompt; PyTorch is not loaded."),
        ("serve", _serve, _serve_options, "Serve OpenAI's API; PyTorch is not loaded."),
    ):
        parser: Parser = commands.add_parser(name, help=help, description=help)
        parser.set_defaults(run=run)
        parser.add_argument("folder", type=Path, help="what `offramp export` cut")
        _model_options(parser)
        options(parser)
        parser.add_argument("--json", action="store_true", help="print the result as JSON")
        parser.add_argument("--quiet", action="store_true", help="print results and errors only")


def _model_options(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--mmproj", type=Path, metavar="FILE", help="projector's file, for images")
    group.add_argument(
        "--threads", type=whole(1), default=1, metavar="N", help="of llama.cpp (default: 1)"
    )
    group.add_argument(
        "--context",
        type=whole(1),
        default=2048,
        metavar="N",
        help="longest prompt with its answer, in tokens (default: 2048)",
    )


def _generate_options(parser: Parser) -> None:
    group = parser.add_argument_group("question")
    group.add_argument("--prompt", default="Describe this image.", help="what is asked")
    group.add_argument(
        "--image", type=Path, nargs="+", default=[], metavar="FILE", help="images, with --mmproj"
    )
    group.add_argument(
        "--plain", action="store_true", help="go on with the prompt; without the chat template"
    )
    group.add_argument(
        "--max-new-tokens",
        type=whole(1),
        default=128,
        metavar="N",
        help="longest answer (default: 128)",
    )
    group.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="ends the answer")
    group.add_argument("--stream", action="store_true", help="print the answer as it is written")
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=0.0, metavar="X")
    group.add_argument("--top-p", type=share, default=1.0, metavar="X")
    group.add_argument("--top-k", type=whole(0), default=0, metavar="N")
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X")
    group.add_argument("--seed", type=whole(0), default=0, metavar="N")
    group = parser.add_argument_group("exits")
    from offramp.core.decoding.policy import MODES

    group.add_argument(
        "--mode",
        choices=MODES,
        metavar="NAME",
        help=f"{', '.join(MODES)} (default: the adapter's own)",
    )
    group.add_argument(
        "--threshold", type=share, metavar="X", help="of all exits, in place of the adapter's"
    )


def _serve_options(parser: Parser) -> None:
    from offramp.cli.commands.serve import image_options, server_options
    from offramp.serving.server.config import ServerConfig

    group = parser.add_argument_group("engine")
    field_options(group, ServerConfig, ("queue", "mode"))
    group.add_argument(
        "--slots",
        type=whole(1),
        default=SLOTS,
        metavar="N",
        help=f"answers written at once, with a context each (default: {SLOTS})",
    )
    server_options(parser)
    image_options(parser.add_argument_group("images"))


def _check_folder(folder: Path) -> None:
    """Raise `AdapterError` or `InputError` where it is not there, or is of another model."""
    if _is_sliced(str(folder)):
        return
    if (close := close_name(folder)) and not folder.exists():
        raise AdapterError(f"There is no folder {str(folder)!r}.", f"{close}")
    raise needs_pytorch(f"{str(folder)!r}, which is no folder of a cut file,")


def _load(arguments: argparse.Namespace, slots: int = 1) -> Any:
    _check_folder(arguments.folder)
    from offramp_llama_cpp.edge.model import EdgeModel
    from offramp_llama_cpp.segment import EngineOptions

    engine = EngineOptions(arguments.context, arguments.threads, sequences=slots)
    return EdgeModel(arguments.folder, mmproj=arguments.mmproj, engine=engine)


def _generate(arguments: argparse.Namespace) -> None:
    from offramp.promises.verdict import Verdict
    from offramp_llama_cpp.edge.model import SLICED
    from offramp_llama_cpp.edge.sampling import Sampling

    sampling = Sampling(
        arguments.temperature,
        arguments.top_p,
        arguments.top_k,
        arguments.repetition_penalty,
        arguments.seed,
    )
    with _load(arguments) as model:
        chat = model.vocabulary.has_template and not arguments.plain
        asked = [{"role": "user", "content": arguments.prompt}] if chat else arguments.prompt
        streams = arguments.stream and not arguments.json
        level = arguments.threshold
        answer = model.answer(
            asked,
            arguments.image,
            max_new_tokens=arguments.max_new_tokens,
            mode=arguments.mode,
            sampling=sampling,
            stop=arguments.stop,
            thresholds=None if level is None else dict.fromkeys(model.files.depths, level),
            on_text=_print_part if streams else None,
        )
        usual = model.policy.own_mode if level is None else "early_exit"
        pieces = [model.vocabulary.piece(s.token).decode(errors="replace") for s in answer.steps]
    is_early = (arguments.mode or usual) == "early_exit"
    verdict = Verdict(why=SLICED) if is_early else Verdict(exact=True)
    if arguments.json:
        steps = [
            {
                "token": piece,
                "id": s.token,
                "depth": s.depth,
                "score": None if s.score != s.score else round(s.score, 6),
            }
            for piece, s in zip(pieces, answer.steps, strict=True)
        ]
        print_json(
            {
                "answer": answer.text,
                "layers": answer.layers,
                "finish": answer.finish,
                "mean_depth": answer.mean_depth,
                "verdict": verdict.to_json(),
                "steps": steps,
            }
        )
    else:
        print_text("" if streams else answer.text)
    log.info("mean depth %.1f of %d", answer.mean_depth, answer.layers)
    log.info("%s", verdict.sentence)


def _print_part(text: str) -> None:
    print_text(text, end="")


def _serve(arguments: argparse.Namespace) -> None:
    from offramp.cli.commands.serve import serve_until_stopped, server_config

    arguments.name = str(arguments.folder)
    with ExitStack() as stack:

        def start(arguments: argparse.Namespace, config: Any) -> Any:
            from offramp.serving.server.service import Service
            from offramp_llama_cpp.edge.served import EdgeServed

            model = stack.enter_context(_load(arguments, arguments.slots))
            return Service(EdgeServed(model), config)

        serve_until_stopped(arguments, server_config(arguments), start)


SLICED = WithoutPytorch(
    NAMES,
    is_edge,
    add,
    "Early exits inside llama.cpp, without PyTorch.",
    """\
examples:
  offramp export exits model-q4_k_m.gguf --out sliced
  offramp generate sliced --prompt "Who are you?"
  offramp serve sliced                           OpenAI's API and a page, at localhost:8000

With PyTorch there are more commands: train, calibrate, verify and others.
""",
)
