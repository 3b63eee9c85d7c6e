"""Which commands there are, how one is run, and what is said where it fails."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from offramp import __version__
from offramp.cli.output import close_output, end_output, prepare_output, print_json, tell
from offramp.cli.parser import Parser, UsageError
from offramp.common.pytorch import has_pytorch, needs_pytorch
from offramp.core.errors import InputError, OfframpError, StorageError, printable
from offramp.core.missing import how_to_install, missing_package
from offramp.core.plugins import brought

log = logging.getLogger(__name__)

EXAMPLES = """\
examples:
  offramp caption dog.jpg                        a photograph in words, by a model that ships
  offramp chat photo-chat --image dog.jpg        questions about it, line by line
  offramp demo                                   train, calibrate and time exits on a tiny model
  offramp inspect Salesforce/blip2-opt-2.7b      what exits could be attached to a model
  offramp train Salesforce/blip2-opt-2.7b --data photos.jsonl --out exits
  offramp sweep exits --data held_out.jsonl      what thresholds would do
  offramp calibrate exits --data held_out.jsonl --target 0.01
  offramp calibrate exits --data held_out.jsonl --lossless   the fastest drafts
  offramp verify exits                           whether every way to decode is exact here
  offramp generate exits --image dog.jpg "Question: what is it? Answer:"
  offramp serve tiny-opt                         OpenAI's API and a page, at localhost:8000
  offramp eval exits --task captions --data captions_val2014.json --images val2014
  offramp export exits --gguf q8_0 --out exits-q8_0   for generate --engine llama.cpp
  offramp export exits model-q4_k_m.gguf --out sliced   the same of a file from the hub
  offramp report exits runs/captions --out report.html
"""

COMMANDS = {
    name: f"offramp.cli.commands.{name}"
    for name in (
        "demo",
        "train",
        "sweep",
        "calibrate",
        "verify",
        "caption",
        "generate",
        "chat",
        "serve",
        "eval",
        "export",
        "report",
        "inspect",
        "env",
        "completion",
    )
}
"""Modules by command; each has `add(commands)`, which imports nothing heavy. Installed packages
bring others, as entry points of "offramp.commands" that hold such a function."""


RENAMED = {"draft": "calibrate NAME --lossless", "slice": "export NAME FILE.gguf"}
"""Commands of earlier versions, and what does the same now."""

OURS = ("offramp", "offramp_llama_cpp", "offramp_photo", "offramp_vllm")
"""Packages whose lines and warnings are ours."""


@dataclass(frozen=True)
class Program:
    """The available commands, with PyTorch or without.

    description, examples: text of its help before and after the commands. adds: by command, a
    function that adds it to a parser.
    """

    description: str
    examples: str
    adds: Mapping[str, Callable[[Any], None]]


@dataclass(frozen=True)
class WithoutPytorch:
    """Commands of a package that run without PyTorch, of an entry point of "offramp.programs".

    names: commands. takes: whether a command line is for them and not for those of `COMMANDS`. add:
    adds them to a parser. description, examples: as of `Program`.
    """

    names: tuple[str, ...]
    takes: Callable[[Sequence[str]], bool]
    add: Callable[[Any], None]
    description: str
    examples: str


def offramp_program() -> Program:
    """Return the commands of this package and of those installed beside it."""
    return Program(
        "Early exits for frozen Hugging Face vision-language models that really skip layers.",
        EXAMPLES,
        {name: import_module(module).add for name, module in COMMANDS.items()} | _others(),
    )


def _others() -> dict[str, Any]:
    """The commands of installed packages."""
    return {name: add for name, add in brought("commands").items() if name not in RENAMED}


def run(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code of `offramp.cli.main`."""
    prepare_output()
    _prepare_logging()
    with _plain_warnings(), _stoppable() as stopped:
        try:
            return end_output(_run(argv))
        except KeyboardInterrupt:
            return _stop(stopped)
        except BrokenPipeError:
            return close_output()
        except (ImportError, OSError, RuntimeError):
            if stopped:  # libraries that are being imported turn Ctrl-C into errors of their own
                return _stop(stopped)
            raise


def _run(argv: Sequence[str] | None) -> int:
    try:
        _check_working_folder()
        parser = build_parser(_program_for(argv))
        if not (sys.argv[1:] if argv is None else argv):
            parser.print_help()
            return 0
        arguments = parser.parse_args(argv)
        if getattr(arguments, "quiet", False):
            _be_quiet()
        command: Callable[[argparse.Namespace], None] = arguments.run
        command(arguments)
    except UsageError as error:
        tell(f"error: {error}")
        return 2
    except StorageError as error:
        if error.result is not None:
            with contextlib.suppress(OfframpError):
                print_json(error.result)
        tell(f"error: {error}")
        return 1
    except OfframpError as error:
        tell(f"error: {error}")
        return 1
    except ImportError as error:
        if (error.name or "").partition(".")[0] in OURS:
            raise  # a mistake of ours
        package, reason = missing_package(error), " ".join(str(error).split())[:300]
        what = "A package" if package is None else f"The package {package}"
        tell(
            f"error: {what} is missing or broken: {reason.rstrip('.')}.\n{how_to_install(package)}"
        )
        return 1
    except MemoryError:
        tell("error: There is not enough memory.\nGive a smaller --batch-size or --limit.")
        return 1
    return 0


LIGHT = ("env", "completion")
"""Commands of this package that need no PyTorch."""


def _program_for(argv: Sequence[str] | None) -> Program:
    """The commands that there are. Raise `InputError` for one that needs PyTorch, without it."""
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in RENAMED:
        raise InputError(
            f"There is no `offramp {words[0]}` any more.",
            f"Type `offramp {RENAMED[words[0]]}`, which does the same.",
        )
    light: list[WithoutPytorch] = [*brought("programs").values()]
    if (asked := next((one for one in light if one.takes(words)), None)) is not None:
        return _without_pytorch(asked)
    if has_pytorch():
        return offramp_program()
    own = {*LIGHT, *_others(), *(name for one in light for name in one.names)}
    if not light or (words and words[0] in {*COMMANDS} - own):
        raise needs_pytorch(f"offramp {' '.join(words[:1])}".rstrip())
    return _without_pytorch(light[0])


def _without_pytorch(program: WithoutPytorch) -> Program:
    own = {name: import_module(COMMANDS[name]).add for name in LIGHT}
    adds = {"": program.add, **_others(), **own}
    return Program(program.description, program.examples, adds)


def build_parser(program: Program | None = None) -> Parser:
    """Return the parser of all commands; a command's own options are added at its first use."""
    program = program or offramp_program()
    parser = Parser(
        prog="offramp",
        description=program.description,
        epilog=program.examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"offramp {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=Parser)
    for add in program.adds.values():
        add(commands)
    return parser


def _check_working_folder() -> None:
    """Raise `StorageError` where it was removed: whatever asks for it would fail."""
    try:
        os.getcwd()
    except OSError as error:
        raise StorageError(
            "The working folder is not there any more.", "Change to one that is: cd ~"
        ) from error


def _be_quiet() -> None:
    """Results and errors alone: no lines of ours, no bars of Hugging Face, no warnings."""
    for name in ("", *OURS):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    _hide_bars()


def _hide_bars() -> None:
    """Hide the progress bars of Hugging Face, which in a file are a line a step."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # for what is imported later
    for module, name in _BARS:  # and for what is imported already
        silence = getattr(sys.modules.get(module), name, None)
        if silence is not None:
            silence()


_BARS = (
    ("transformers.utils.logging", "disable_progress_bar"),
    ("huggingface_hub.utils", "disable_progress_bars"),
    ("datasets", "disable_progress_bars"),
)


def _prepare_logging() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger().setLevel(logging.WARNING)  # of others, such as optimisers
    for name in OURS:
        logging.getLogger(name).setLevel(logging.INFO)
    if sys.stderr is not None and not sys.stderr.isatty():
        _hide_bars()
    logging.raiseExceptions = False  # a closed stderr is no reason to stop
    for noisy in ("httpx", "huggingface_hub", "accelerate", "torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """While it runs, a warning of ours is a line, without where in the source it came from."""
    others = warnings.showwarning
    found = [sys.modules[name] for name in OURS if name in sys.modules]
    folders = tuple(os.path.join(path, "") for module in found for path in module.__path__)

    def show(message: Any, category: Any, filename: str, *more: Any, **named: Any) -> None:
        if category is UserWarning and filename.startswith(folders):
            log.warning("%s", message)
        else:
            others(message, category, filename, *more, **named)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = others


class _Printable(logging.Formatter):
    """Names of others, which a message may hold, do nothing on a terminal but show."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _stop(stopped: Sequence[int]) -> int:
    tell("interrupted")
    return 128 + (stopped[-1] if stopped else signal.SIGINT)


@contextlib.contextmanager
def _stoppable() -> Iterator[list[int]]:
    """While it runs, SIGTERM and SIGHUP stop a command as Ctrl-C does; yields what came."""
    stopped: list[int] = []

    def stop(number: int, _: Any) -> None:
        stopped.append(number)
        raise KeyboardInterrupt

    before: dict[int, Any] = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # What is ignored, as SIGHUP is under nohup, stays so.
        usual = (signal.SIG_DFL, signal.default_int_handler)
        if number is not None and signal.getsignal(number) in usual:
            with contextlib.suppress(ValueError):  # not the main thread, which alone receives them
                before[number] = signal.signal(number, stop)
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
