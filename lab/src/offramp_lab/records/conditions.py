"""What a changed condition does to answers, and whether a guarantee is still shown; rewrites
lab/records/conditions.json.

Of the exits that ship for the tiny OPT, on captions and questions about drawn scenes: one thing is
changed at a time, after the conditions were noted. A minute of one core.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import generate_answers
from offramp.cli import demo
from offramp.core.inputs.example import Example
from offramp.data.scenes.tasks import captions_and_questions
from offramp.features.input_processor import InputProcessor
from offramp.promises.conditions import Conditions, of_processor
from offramp_lab.records.record import Record, asked
from offramp_lab.records.subjects import tiny_with

RECORD = Record("conditions")
Change = Callable[[Adapter, Any], tuple[Adapter, Any]]
KEPT = ("drafts of another length", "rows of a batch")
"""Changes that change no answer."""


def main() -> None:
    arguments = asked(__doc__, images=60, out=RECORD.path)
    rows = [cell(name, arguments.images) for name in CHANGES]
    for row in rows:
        print(row)
    RECORD.write({"entries": rows}, arguments.out)


def cell(name: str, images: int) -> dict[str, Any]:
    """Answers that differ from those before one change, and what is said of the guarantee."""
    some = list(captions_and_questions("test", images, 600_000, 1))
    adapter, encoder = tiny_with("opt")
    processor = encoder.processor
    known = {"sampling": None, **of_processor(processor)}
    then = Conditions.of(adapter.backbone, adapter.policy, exits=adapter.exits, **known).to_json()
    calibration = dict(adapter.calibration or {})
    before = calibration["conditions"]
    calibration["conditions"] = {**then, **{n: before[n] for n in ("longest", "prompts")}}
    adapter = replace(adapter, calibration=calibration)
    first = _answers(adapter, processor, some)
    with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast to bfloat16"):
        changed, seen = CHANGES[name](adapter, processor)
        after = _answers(changed, seen, some, rows=5 if name == "rows of a batch" else 32)
        standing = changed.standing(**of_processor(seen))
    differ = sum(one != other for one, other in zip(first, after, strict=True)) / len(some)
    return {
        "change": name, "answers": len(some), "differ": differ,
        "shown": standing.promise is not None, "should": name in KEPT, "why": standing.why,
    }  # fmt: skip


def _answers(
    adapter: Adapter, processor: Any, some: Sequence[Example], rows: int = 32
) -> list[tuple[int, ...]]:
    encoder = InputProcessor(adapter.backbone, processor)
    options = {n: v for n, v in demo.OPTIONS.items() if n != "do_sample"}
    made = generate_answers(adapter, encoder, some, adapter.policy, batch_size=rows, **options)
    return [answer.ids for answer in made]


# -- changes ---------------------------------------------------------------------------------------


def _looking(**settings: Any) -> Change:
    """Another image processor."""

    def change(adapter: Adapter, processor: Any) -> tuple[Adapter, Any]:
        made = copy.deepcopy(processor)
        for name, value in settings.items():
            setattr(made.image_processor, name, value)
        return adapter, made

    return change


def _without_first_token(adapter: Adapter, processor: Any) -> tuple[Adapter, Any]:
    made = copy.deepcopy(processor)
    made.tokenizer.backend_tokenizer.post_processor = None
    return adapter, made


class _Low(nn.Module):
    """A linear layer with a term of low rank, as PEFT puts one in."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.base, self.disable_adapters, self.merged_adapters = base, False, list[str]()
        self.active_adapters = ["default"]
        size = base.weight.shape
        self.a = nn.Parameter(0.3 * torch.randn(rank, size[1], generator=draw))
        self.b = nn.Parameter(0.3 * torch.randn(size[0], rank, generator=draw))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T  # type: ignore[no-any-return]


def _lora(adapter: Adapter, processor: Any) -> tuple[Adapter, Any]:
    layer = adapter.backbone.layers[0]
    layer.fc1 = _Low(layer.fc1)
    return adapter, processor


def _written(part: str) -> Change:
    def change(adapter: Adapter, processor: Any) -> tuple[Adapter, Any]:
        modules = adapter.exits.modules if part == "exits" else adapter.backbone.layers
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in modules.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
        return adapter, processor

    return change


def _sampling(adapter: Adapter, processor: Any) -> tuple[Adapter, Any]:
    adapter.backbone.model.generation_config.do_sample = True
    return adapter, processor


def _same(adapter: Adapter, processor: Any) -> tuple[Adapter, Any]:
    return adapter, processor


def _drafts(adapter: Adapter, processor: Any) -> tuple[Adapter, Any]:
    return adapter.with_policy(replace(adapter.policy, max_draft=3)), processor


CHANGES: dict[str, Change] = {
    "pixels not normalised": _looking(do_normalize=False),
    "pixels not rescaled": _looking(do_rescale=False),
    "another mean of pixels": _looking(image_mean=[0.1, 0.2, 0.9]),
    "no token before a prompt": _without_first_token,
    "an adapter of low rank put in": _lora,
    "weights of the backbone written to": _written("backbone"),
    "weights of the exits written to": _written("exits"),
    "do_sample in the generation configuration": _sampling,
    "autocast to bfloat16": _same,
    "drafts of another length": _drafts,
    "rows of a batch": _same,
}


if __name__ == "__main__":
    main()
