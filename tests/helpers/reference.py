"""What the decode loop is held against: the same tokens, run whole and without a cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits
from offramp.core.models.intercept import InterceptedModel
from offramp.core.models.opened import LayerCall


class Probe:
    """A driver that runs every layer, and reads every exit on the way."""

    def __init__(self, backbone: Backbone, exits: Exits | None = None) -> None:
        self.backbone, self.exits = backbone, exits
        self.outputs: dict[int, Tensor] = {}  # by depth, before visual features join
        self.estimates: dict[int, Tensor] = {}  # what the exits make of the state at their depth
        self.logits: dict[int, Tensor] = {}

    def layer(self, call: LayerCall) -> Any:
        index = call.index
        if self.exits is not None and index in self.exits.depths:
            state = self.estimates[index] = self.exits.run(index, call)
            self.logits[index] = self.backbone.logits(self.backbone.final_norm(state))
        out = call.run(call.layer)
        self.outputs[index + 1] = out[0] if isinstance(out, tuple) else out
        return out


def probe(
    backbone: Backbone,
    inputs: dict[str, Tensor],
    sequences: Tensor | None = None,
    exits: Exits | None = None,
) -> Probe:
    """One forward over the prompt, or over whole `sequences` that continue it.

    `logits` by depth, [B, T, V], those of the full model at depth L.
    """
    seen = Probe(backbone, exits)
    model = InterceptedModel(backbone, seen).model
    given = dict(inputs)
    if "decoder_input_ids" in inspect.signature(model.forward).parameters and (
        model.config.is_encoder_decoder or backbone.is_encoder_decoder
    ):
        start = torch.full((len(inputs["input_ids"]), 1), _start(backbone))
        given["decoder_input_ids"] = start if sequences is None else sequences
    else:
        if sequences is not None:
            given = _continued(backbone, given, sequences)
        if (
            "position_ids" in inspect.signature(model.forward).parameters
            and "image_grid_thw" not in given
        ):
            given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        seen.logits[backbone.depth] = model(**given, use_cache=False).logits
    return seen


def _start(backbone: Backbone) -> int:
    return int(backbone.text_config.decoder_start_token_id)


def _continued(
    backbone: Backbone, inputs: dict[str, Tensor], sequences: Tensor
) -> dict[str, Tensor]:
    """The inputs with the prompt replaced by a continuation of it: plain, causal text."""
    new = sequences.shape[1] - inputs["input_ids"].shape[1]
    # PaliGemma marks the prefix with 0 and what follows with 1; elsewhere 0 is plain text.
    fill = {"attention_mask": 1, "mm_token_type_ids": 0}
    fill["token_type_ids"] = int(backbone.model.config.model_type == "paligemma")
    longer = {
        name: torch.cat([value, value.new_full((len(value), new), fill[name])], 1)
        for name, value in inputs.items()
        if name in fill
    }
    return {**inputs, **longer, "input_ids": sequences}


def of_steps(logits: Tensor, new: int) -> Tensor:
    """Of logits [B, T, V] over whole sequences, those that chose the `new` last tokens."""
    return logits[:, -new - 1 : -1]


class Noted:
    """Notes, as `observer` of a generation, the logits that each place was chosen from; of one that
    is asked again, the last."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], Tensor] = {}

    def __call__(self, row: int, place: int, logits: Tensor) -> None:
        self._seen[row, place] = logits[0].clone()

    def of(self, rows: int, new: int) -> Tensor:
        """[B, N, V] of the first `new` places of each row."""
        return torch.stack(
            [torch.stack([self._seen[row, place] for place in range(new)]) for row in range(rows)]
        )


class Dice:
    """A score that knows nothing, so that tokens exit here and there."""

    def __init__(self, seed: int = 0) -> None:
        self._draw = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> Tensor:
        return torch.rand(len(logits), generator=self._draw)


class Script:
    """A score that follows a plan: the k-th look gets the k-th number, for all rows."""

    def __init__(self, numbers: Sequence[float]) -> None:
        self._numbers = list(numbers)

    def __call__(self, logits: Tensor) -> Tensor:
        return torch.full((len(logits),), self._numbers.pop(0))
