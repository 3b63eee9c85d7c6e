"""The frozen backbone's states on prompts and answers: computed once, read by every epoch.

A `Batch` holds what the exits need and no more: the states that enter each exit, over the prompt
(its keys and values) and over the answer, and the final states that teach. The answer is teacher-
forced in one pass after the prompt has been read exactly as generation reads it, so a family's own
masks and positions hold in training too.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from offramp.core.errors import UnsupportedBackboneError
from offramp.core.executors.kv_cache import CACHE_NAMES, cache_parameter
from offramp.core.executors.prefill import Prefill, image_tokens, prepare
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet
from offramp.core.models.intercept import InterceptedModel
from offramp.core.models.opened import LayerCall, first
from offramp.features.input_processor import InputProcessor
from offramp.inputs.example import Example


@dataclass(frozen=True)
class Answered:
    """An example with the ids of its answer for training, and whether a person wrote that
    answer."""

    example: Example
    ids: tuple[int, ...]
    labelled: bool


@dataclass(frozen=True, eq=False)
class Batch:
    """Frozen states of B answered examples; padding does not change any of them.

    prompt, answer: by depth, states entering the exit [B, P, D] and [B, A-1, D]; the state that
    predicts the first answer token is the prompt's last.
    teacher: final-normed states [B, A, D] at the positions that predict the answer.
    targets, mask: answer ids and which of them count [B, A]; padding never does.
    labelled: rows [B] whose answer a person wrote.
    prompt_kw, answer_kw: the stack's other arguments (masks, positions, encoder states).
    prompt_ids: token ids of the prompt [B, P]; -1 for padding, for an image, and for the start of a
    decoder whose prompt an encoder reads.
    keys: the examples' keys, for error messages.
    """

    prompt: dict[int, Tensor]
    answer: dict[int, Tensor]
    teacher: Tensor
    targets: Tensor
    mask: Tensor
    labelled: Tensor
    prompt_kw: dict[str, Any]
    answer_kw: dict[str, Any]
    prompt_ids: Tensor
    keys: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors; shared memory counts once."""
        storages = [tensor.untyped_storage() for tensor in _tensors(self.__dict__)]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    def entries(self, depth: int) -> Tensor:
        """Return the states that enter the exit at `depth` at the predicting positions [B, A,
        D]."""
        return torch.cat([self.prompt[depth][:, -1:], self.answer[depth]], 1)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)


class StateRecorder:
    """Runs every layer, and records states on the way.

    entered: depths of the layers whose input is recorded. exits: run at the depths `run_at`, beside
    the layers.
    """

    def __init__(
        self,
        backbone: Backbone,
        entered: Collection[int],
        exits: ExitSet | None = None,
        run_at: Collection[int] = (),
    ) -> None:
        self._entered, self._run_at = frozenset(entered), frozenset(run_at)
        self._exits, self._last = exits, backbone.depth - 1
        self._entries: dict[int, Tensor] = {}
        self._states: dict[int, Tensor] = {}
        self._final: Tensor | None = None

    def layer(self, call: LayerCall) -> Any:
        if call.index in self._entered:
            self._entries[call.index] = call.hidden
        if call.index in self._run_at:
            assert self._exits is not None
            self._states[call.index] = self._exits.run(call.index, call)
        out = call.run(call.layer)
        if call.index == self._last:
            self._final = first(out)
        return out

    @property
    def is_whole(self) -> bool:
        """Return True after the last layer of a call."""
        return self._final is not None

    def take(self) -> tuple[dict[int, Tensor], dict[int, Tensor], Tensor]:
        """Return, for the last call, layer inputs and exit states by depth, and the final state,
        all [B, T, D]."""
        assert self._final is not None
        taken = (self._entries, self._states, self._final)
        self._entries, self._states, self._final = {}, {}, None
        return taken


@torch.no_grad()  # not inference_mode: training saves these states for its backward pass
def record(encoder: InputProcessor, rows: Sequence[Answered], depths: Sequence[int]) -> Batch:
    """Run the frozen backbone over prompts and answers and keep the states at `depths`.

    Raises:
        DataError: prompt and answer are longer than the backbone's positions.
        UnsupportedBackboneError: the decoder itself joins the image to the text.
    """
    backbone = encoder.backbone
    ids, mask = encoder.pad([row.ids for row in rows])
    prompts = encoder.prompts([row.example for row in rows])
    encoder.check_room(prompts, [(row.example.key, len(row.ids)) for row in rows])
    handler = StateRecorder(backbone, depths)
    intercepted = InterceptedModel(backbone, handler)
    prepared = prepare(intercepted.model, prompts, max_new_tokens=1)
    prefill = Prefill(intercepted, prepared)
    prompt, _, final = handler.take()
    check_length(prefill.prefill, final.shape[1], backbone)
    # The rest of the prompt teaches nothing; a copy, or the slice would hold all of it.
    final = final[:, -1:].clone()
    answer = {depth: states[:, :0].clone() for depth, states in prompt.items()}
    # Pads marked: after a short answer to a long prompt, positions may not reach that far.
    answer_kw = prefill.extend(ids.shape[1] - 1, mask[:, :-1])
    if ids.shape[1] > 1:
        intercepted.stack(input_ids=ids[:, :-1], **answer_kw)
        answer, _, later = handler.take()
        final = torch.cat([final, later], 1)
    return Batch(
        prompt,
        answer,
        backbone.final_norm(final),
        ids,
        mask,
        torch.tensor([row.labelled for row in rows], device=ids.device),
        _plain(without_inputs(prefill.prefill)),
        _plain(without_inputs(answer_kw)),
        _text_ids(prompts, next(iter(prompt.values())), backbone),
        tuple(row.example.key for row in rows),
    )


def _text_ids(prompts: Mapping[str, Any], states: Tensor, backbone: Backbone) -> Tensor:
    """A batch's `prompt_ids`."""
    ids, mask = prompts.get("input_ids"), prompts.get("attention_mask")
    none = torch.full(states.shape[:2], -1, device=states.device)
    if backbone.is_encoder_decoder or ids is None or ids.shape != none.shape:
        return none
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    for mark in image_tokens(backbone.model.config):
        real = real & (ids != mark)
    return torch.where(real, ids, none)


def check_length(kw: Mapping[str, Any], states: int, backbone: Backbone) -> None:
    """Raise where more states came out of the stack than went in: masks are then made inside.

    kw: arguments that the stack was called with. states: how many came out, in each row.
    """
    given = kw.get("inputs_embeds")
    given = kw["input_ids"] if given is None else given
    if given.shape[1] != states:
        raise UnsupportedBackboneError(
            f"{type(backbone.model).__name__} joins the image to the text inside its decoder: "
            f"{given.shape[1]} tokens became {states} states.",
            "Exits cannot be trained on it; use a model that joins them before.",
        )


def _plain(kw: dict[str, Any]) -> dict[str, Any]:
    """Arguments that can be kept: tensors, numbers, dicts of them; deep visual features not."""
    keep = (Tensor, int, float, bool, str, type(None))
    return {
        name: _plain(value) if isinstance(value, dict) else value
        for name, value in kw.items()
        if isinstance(value, (*keep, dict))
    }


class _Replay:
    """Runs the exits, each on its recorded states, and skips the backbone."""

    def __init__(self, backbone: Backbone, exits: Exits, entries: Mapping[int, Tensor]) -> None:
        self.backbone, self.exits, self.entries = backbone, exits, entries
        self.states: dict[int, Tensor] = {}

    def layer(self, call: LayerCall) -> Any:
        if call.index in self.entries:
            entry = replace(call, hidden=self.entries[call.index])
            self.states[call.index] = self.exits.run(call.index, entry)
        return self.backbone.skipped_layer_output(call)


def exit_features(backbone: Backbone, exits: Exits, batch: Batch) -> dict[int, Tensor]:
    """Return final-normed exit states [B, A, D] by depth, at the positions that predict the answer.

    Differentiable in the exits. The stack is called twice without its layers: once for the exits'
    keys and values over the prompt, and once over the answer.
    """
    cross = batch.prompt_kw.get("encoder_hidden_states") is not None
    cache = exits_only(backbone, exits.entries, cross=cross)
    parts: list[dict[int, Tensor]] = []
    for entries, kw in ((batch.prompt, batch.prompt_kw), (batch.answer, batch.answer_kw)):
        states = next(iter(entries.values()))
        if states.shape[1] == 0:
            continue
        handler = _Replay(backbone, exits, entries)
        stack = InterceptedModel(backbone, handler).stack
        embeds = states.clone()  # BLIP adds positions to what it is given, where it lies
        stack(inputs_embeds=embeds, use_cache=True, **{cache_parameter(stack): cache}, **kw)
        parts.append(handler.states)
    prompt, answer = parts[0], parts[1] if len(parts) > 1 else {}
    return {
        d: backbone.final_norm(torch.cat([s[:, -1:], *([answer[d]] if answer else [])], 1))
        for d, s in prompt.items()
    }


# ---------------------------------------------------------------------------------------------
# The cache of batches
# ---------------------------------------------------------------------------------------------


def group(rows: Sequence[Answered], batch_size: int) -> list[list[Answered]]:
    """Return batches of rows of similar length, for little padding. Deterministic."""
    ordered = sorted(rows, key=lambda r: (len(r.example.prompt.split()), len(r.ids), r.example.key))
    return [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]


def without_inputs(kw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the stack's arguments without tokens and cache, for a call on other states."""
    dropped = ("input_ids", "inputs_embeds", *CACHE_NAMES, "use_cache")
    return {name: value for name, value in kw.items() if name not in dropped}


def exits_only(backbone: Backbone, depths: Sequence[int], *, cross: bool) -> Any:
    """Return an empty cache for the exits alone; the layers' entries take their lengths from these.

    cross: whether it has a part for an encoder's keys.
    """
    from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

    def half() -> Any:
        blank = DynamicCache(config=backbone.text_config).layers
        own = [copy.deepcopy(blank[depth]) for depth in depths]

        def entry_of(index: int) -> Any:
            return next((e for e in own if type(e) is type(blank[index])), own[0])

        return Cache(layers=[entry_of(index) for index in range(backbone.depth)] + own)

    return EncoderDecoderCache(half(), half()) if cross else half()
