"""`offramp export --to vllm`, `draft-model` and `speculators`."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.cli.exporting import Exporter, check_adapter_alone
from offramp.cli.loading import load_model, loaded, read_data
from offramp.cli.options import field_option
from offramp.cli.output import say_next, show_result
from offramp.cli.parser import Parser
from offramp.core.errors import InputError
from offramp.core.storage import write_atomic

if TYPE_CHECKING:
    from offramp.core.models.backbone import Backbone  # help needs no PyTorch

CHECKED = 8
"""Prompts whose answers vLLM is checked by, where --limit names no other number."""
SHORTLIST = 8192
DRAFTS = {"model": "offramp_vllm.drafts.ExitDrafts", "num_speculative_tokens": 7}


def _write_vllm(arguments: argparse.Namespace) -> None:
    from offramp_vllm.exports.vllm import PROMPTS, check_out, export_vllm

    check_adapter_alone(arguments)
    if not arguments.overwrite:
        check_out(arguments.out)
    texts = list(PROMPTS)
    if arguments.data:
        items = read_data(arguments, require_answers=False)
        texts = [item.example.prompt for item in items][: arguments.limit or CHECKED]
    opened = loaded(arguments)
    adapter, encoder = opened.adapter, opened.encoder
    prompts = [encoder.tokenizer(text)["input_ids"] for text in texts]
    new = min(arguments.max_new_tokens, 16)
    checked = export_vllm(adapter, arguments.out, prompts, encoder=encoder, max_new_tokens=new)
    show_result(
        {"exits": str(arguments.out), "checked": checked},
        f"{arguments.out}: exits for vLLM, with {checked} answers for the check at start",
        as_json=arguments.json,
    )
    out = arguments.out.absolute()
    options = {
        "additional-config": json.dumps({"offramp": {"exits": str(out)}}),
        "dtype": str(adapter.backbone.dtype).removeprefix("torch."),
    }
    options |= template_options(opened, out)
    if not adapter.policy.thresholds:  # nothing leaves unless it drafts
        options["speculative-config"] = json.dumps(DRAFTS)
    say_next(_serving(adapter.backbone, options))


def ships(backbone: Backbone) -> bool:
    """Return True if the backbone is one of those that are known by a short name here alone."""
    return backbone.name.startswith("offramp/")


def checkpoint_of(backbone: Backbone) -> str:
    """Return a backbone's checkpoint by its name; that of one that ships is a folder."""
    return str(backbone.model.config._name_or_path) if ships(backbone) else backbone.name


def template_options(opened: Any, exits: Path) -> dict[str, str]:
    """Write a file beside the exits with the chat template that a model got when it was opened, or
    a plain one, and return vLLM's options for it; none where vLLM finds the model's own."""
    template = getattr(opened.processor, "chat_template", None)
    if template and not ships(opened.adapter.backbone):
        return {}
    template = template or _plain(opened.encoder.tokenizer)
    file = exits.with_name(f"{exits.name}.jinja")
    write_atomic(file, template.encode())
    # The template puts images in their places; by itself vLLM would, inside of the first turn.
    return {"chat-template": str(file), "chat-template-content-format": "openai"}


def _plain(tokenizer: Any) -> str:
    """Return a chat template that writes the tokenizer's start tokens and the text of one message.

    Without a template, vLLM takes one of its own.
    """
    whole, bare = (tokenizer("a", add_special_tokens=adds)["input_ids"] for adds in (True, False))
    start = tokenizer.decode(whole[: whole.index(bare[0])])
    return (
        "{%- if messages | length > 1 -%}"
        "{{ raise_exception('This model answers one message.') }}{%- endif -%}"
        f"{{{{ {start!r} }}}}"
        "{%- for part in messages[0].content if part.type == 'text' -%}"
        "{{ part.text }}{%- endfor -%}"
    )


def _serving(backbone: Backbone, options: Mapping[str, str]) -> str:
    """The command that serves a backbone, with options of vLLM's."""
    words = ["python", "-m", "vllm.entrypoints.openai.api_server"]
    for name, value in {"model": checkpoint_of(backbone), **options}.items():
        words += [f"--{name}", value]
    return shlex.join(words)


def _write_draft_model(arguments: argparse.Namespace) -> None:
    from offramp_vllm.exports.draft_model import check_out, save_draft_model

    check_adapter_alone(arguments)
    if len(arguments.depths or ()) > 1:
        raise InputError("A draft model is of one exit.", "Give one depth with --depths.")
    if not arguments.overwrite:
        check_out(arguments.out)
    opened = loaded(arguments)
    adapter, processor = opened.adapter, opened.processor
    depth = arguments.depths[0] if arguments.depths else None
    layers = save_draft_model(adapter, processor, arguments.out, depth)
    show_result(
        {"draft_model": str(arguments.out), "layers": layers},
        f"{arguments.out}: a model of {layers} layers, for {adapter.backbone.depth}",
        as_json=arguments.json,
    )
    told = {"method": "draft_model", "model": str(arguments.out), "num_speculative_tokens": 4}
    say_next(_serving(adapter.backbone, {"speculative-config": json.dumps(told)}))


def _drafter_options(parser: Parser) -> None:
    from offramp.training.config import TrainConfig

    drafter = parser.add_argument_group("with --to speculators")
    field_option(drafter, TrainConfig, "steps", "training steps of the drafter")
    field_option(
        drafter,
        TrainConfig,
        "shortlist",
        "tokens that the drafter can say, the most frequent of the answers",
        default=SHORTLIST,
    )


def _write_drafter(arguments: argparse.Namespace) -> None:
    from offramp.common.folders import check_writable
    from offramp.training.config import TrainConfig
    from offramp.training.drafting import UNROLLED
    from offramp_vllm.exports.speculators import check_out, save_drafter, vllm_config
    from offramp_vllm.exports.train_eagle3 import train_eagle3

    if not arguments.data:
        raise InputError(
            "A drafter learns from the model's answers to your prompts.",
            "Give --data, and --steps and --shortlist if you like; or leave --to out.",
        )
    check_writable(arguments.out, folder=True)
    if not arguments.overwrite:
        check_out(arguments.out)
    items = read_data(arguments, require_answers=False)
    if arguments.adapter is None:
        backbone, processor = load_model(arguments)
    else:
        opened = loaded(arguments)
        adapter, processor = opened.adapter, opened.processor
        backbone = adapter.backbone
    config = TrainConfig(
        steps=arguments.steps,
        shortlist=arguments.shortlist,
        max_new_tokens=arguments.max_new_tokens,
    )
    examples = [item.example for item in items]
    drafter, found = train_eagle3(backbone, processor, examples, config, arguments.out)
    measured = found.to_json | {"tokens_a_round": round(1 + found.tokens, 3)}
    save_drafter(drafter, backbone, arguments.out, drafts=UNROLLED, measured=measured)
    shown = ", ".join(f"{share:.0%}" for share in measured["acceptance"][:UNROLLED])
    show_result(
        {"drafter": str(arguments.out), **measured},
        f"{arguments.out}: drafts are right {shown}; {1 + found.tokens:.2f} tokens a round",
        as_json=arguments.json,
    )
    told = vllm_config(str(arguments.out), UNROLLED)
    say_next(f"vllm serve {backbone.name} --speculative-config '{told}'")


VLLM = Exporter(
    "exits for vLLM's plug-in, with answers that vLLM is checked by", _write_vllm, takes=("data",)
)
DRAFT_MODEL = Exporter(
    "an exit as a model that drafts in any engine", _write_draft_model, takes=("depths",)
)
SPECULATORS = Exporter(
    "an EAGLE-3 drafter, trained on the answers to --data",
    _write_drafter,
    _drafter_options,
    takes=("data",),
)
