"""What enters a decoder in PyTorch: the rows that llama.cpp is given in its place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offramp.core.errors import InputError
from offramp.core.executors.prefill import Prepared, within_checked
from offramp.core.models.backbone import Backbone
from offramp.core.models.intercept import InterceptedModel
from offramp.core.models.opened import LayerCall
from offramp.features.vision_cache import VisionCache
from offramp_llama_cpp.architectures import array_of, layer_kinds
from offramp_llama_cpp.graphs import Architecture
from offramp_llama_cpp.kept_prompts import KeptPrompts
from offramp_llama_cpp.native.tap import States
from offramp_llama_cpp.prompt import Prompt, Span, check_context
from offramp_llama_cpp.segment import EngineOptions


class _Entered(Exception):
    """Raised out of the decoder's first layer, once it is known what enters it."""


Entered = tuple[LayerCall, dict[str, Any], Tensor | None]
"""What enters a decoder: its first layer's call, the stack's arguments, and which columns [B, T] of
the prompt are no padding; None: all."""


class DecoderEntry:
    """Stands before the decoder's layers, and keeps what enters the first."""

    def __init__(self) -> None:
        self._call: LayerCall | None = None

    def layer(self, call: LayerCall) -> Any:
        self._call = call
        raise _Entered

    def call(self, call: Callable[[], Any]) -> LayerCall:
        """The first layer's call in `call`, which is not run further."""
        with contextlib.suppress(_Entered):
            call()
        entered, self._call = self._call, None
        assert entered is not None
        return entered


def prompt_of(
    backbone: Backbone, architecture: Architecture, entered: Entered, row: int = 0
) -> Prompt:
    """Return a row's prompt from what entered, without its padding.

    Raises:
        InputError: parts of it look ahead in a way that llama.cpp does not.
    """
    call, arguments, real = entered
    states = call.hidden[row].float().cpu()
    columns = torch.ones(len(states), dtype=torch.bool) if real is None else real[row].cpu()
    return Prompt(
        array_of(states[columns]),
        _positions(architecture, arguments, columns, row),
        _features(architecture, arguments, states, columns, row),
        _ahead(backbone, architecture, call, columns, row),
    )


def _positions(
    architecture: Architecture, arguments: Mapping[str, Any], columns: Tensor, row: int
) -> Any:
    positions = arguments.get("position_ids")
    if not architecture.sections or positions is None:
        return None
    axes = positions[-3:, row].cpu()[:, columns] if positions.dim() == 3 else None
    if axes is None:
        return None
    # Beyond the pairs of height and width, interleaved axes turn by time, which is the fourth here.
    return torch.cat([axes, axes[:1]]).int().numpy()


def _features(
    architecture: Architecture,
    arguments: Mapping[str, Any],
    states: Tensor,
    columns: Tensor,
    row: int,
) -> States | None:
    added = arguments.get("deepstack_visual_embeds")
    if not architecture.deepstack or not added:
        return None
    masks = arguments["visual_pos_masks"].cpu()
    where, first = masks[row], int(masks[:row].sum())  # they stand after those of rows before
    own = slice(first, first + int(where.sum()))
    features = torch.zeros(len(states), len(added), states.shape[1])
    for layer, feature in enumerate(added):
        features[where, layer] = feature[own].float().cpu()
    return array_of(features[columns])


def _ahead(
    backbone: Backbone, architecture: Architecture, call: LayerCall, rows: Tensor, row: int
) -> tuple[Span, ...]:
    """The spans whose columns see each other, by the mask that the first layer is given.

    rows: which columns are no padding. row: of the mask.
    """
    mask = call.kw.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return ()
    sees = mask[min(row, len(mask) - 1), 0, :, : len(rows)].cpu()
    sees = (sees if sees.dtype == torch.bool else sees == 0)[rows][:, rows]
    last = (sees * torch.arange(sees.shape[1])).amax(1).tolist()
    spans, at = list[Span](), 0
    while at < len(last):
        stop = last[at] + 1
        if stop > at + 1:
            if any(other + 1 != stop for other in last[at:stop]):
                raise _strange(backbone, "sees parts of images")
            spans.append((at, stop))
        at = max(stop, at + 1)
    if spans and not architecture.ahead:
        raise _strange(backbone, "looks ahead")
    window = getattr(backbone.text_config, "sliding_window", None)
    longest = max((stop - start for start, stop in spans), default=0)
    if window and "sliding_attention" in layer_kinds(backbone) and longest > window:
        raise InputError(
            f"{longest} tokens of the prompt see each other, more than the {window} of this "
            "decoder's sliding window, where llama.cpp cuts them off.",
            "Shorten the prompt, or use --engine torch.",
        )
    return tuple(spans)


def _strange(backbone: Backbone, what: str) -> InputError:
    return InputError(
        f"A token of this prompt {what}, which the llama.cpp runtime does not know of the decoder "
        f"of {backbone.name}.",
        "Use --engine torch for it.",
    )


class PromptEntry:
    """The way of prompts from a processor's output to the decoder's first layer, in PyTorch."""

    def __init__(
        self,
        backbone: Backbone,
        architecture: Architecture,
        engine: EngineOptions,
        vision_cache: VisionCache | None = None,
    ) -> None:
        self._backbone, self._architecture, self._engine = backbone, architecture, engine
        self._entry = DecoderEntry()
        self._intercepted = InterceptedModel(backbone, self._entry)
        if vision_cache is not None:
            self._intercepted.remember_images(backbone, vision_cache)
        self.vision_cache = vision_cache
        self.kept = KeptPrompts(self._intercepted, Embeddings(backbone).of)

    def read(
        self, inputs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> tuple[Prepared, list[Prompt]]:
        """`prepare` and `prompts`; of a text that is kept the image alone is looked at."""

        def whole() -> tuple[Prepared, list[Prompt]]:
            prepared = self.prepare(inputs, options)
            return prepared, self.prompts(prepared)

        return self.kept.read(inputs, options, whole)

    def prepare(self, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> Prepared:
        """Prepare as `PromptReader.prepare` does."""
        made: Prepared = within_checked(self._intercepted.model, inputs, options)[0]
        return made

    def prompts(self, prepared: Prepared) -> list[Prompt]:
        """Return what enters the decoder for each row.

        Raises:
            InputError: more rows than the runtime writes at a time, or too long ones.
        """
        backbone, rows, most = self._backbone, len(prepared.ids), self._engine.sequences
        if rows > most:
            raise InputError(
                f"This llama.cpp runtime writes {most} at a time, and {rows} rows came.",
                f"Load it with EngineOptions(sequences={rows}), or call generate once for each.",
            )
        entered = self._enter(prepared)
        prompts = [prompt_of(backbone, self._architecture, entered, row) for row in range(rows)]
        for prompt in prompts:
            self._check_room(len(prompt.states), prepared.most)
        return prompts

    def _enter(self, prepared: Prepared) -> Entered:
        """Run a prompt up to the decoder."""
        model: Any = prepared.model
        inputs = model.prepare_inputs_for_generation(
            prepared.ids, is_first_iteration=True, next_sequence_length=None, **prepared.arguments
        )
        with self._intercepted.recording() as calls:
            call = self._entry.call(lambda: model(**inputs, return_dict=True))
        mask = prepared.arguments.get("attention_mask")
        same = mask is not None and mask.dim() == 2 and mask.shape[-1] == call.hidden.shape[1]
        return call, calls[-1], mask.bool() if same and mask is not None else None

    def _check_room(self, rows: int, new: int) -> None:
        positions = self._backbone.positions
        if positions is not None and rows + new - 1 > positions:
            raise InputError(
                f"A prompt of {rows} tokens and an answer of {new} are longer than the backbone's "
                f"{positions} positions.",
                "Shorten the prompt, or lower max_new_tokens.",
            )
        check_context(rows, new, self._engine.context)


class Embeddings:
    """The states that enter a decoder for tokens of text."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._embedding: nn.Module = backbone.stack.get_input_embeddings()
        self._rows = _plain_rows(self._embedding)
        self._places = _places(backbone)
        self._scale = np.float32(getattr(backbone.text_config, "embedding_multiplier", 1.0))

    @property
    def kept(self) -> nn.Parameter:
        """Return the weights that the embeddings are read from."""
        return self._embedding.weight  # type: ignore[return-value]

    @property
    def table(self) -> States | None:
        """Return the weights [V, D], where a token's row is all that enters; else None."""
        return self._rows if self._places is None and self._scale == 1.0 else None

    def of_token(self, token: int, position: int) -> States:
        """The states [1, D] of one token."""
        if self._rows is None:
            return self.of([token], position)
        states = self._rows[token : token + 1]
        if self._scale != 1.0:
            states = states * self._scale
        return states if self._places is None else states + self._places[position]

    def of(self, tokens: Sequence[int], position: int | None = 0) -> States:
        """The states [T, D] of tokens that stand from `position` on; None: the embeddings alone."""
        if self._rows is None:
            ids = torch.tensor([tokens], device=self._backbone.device)
            states = array_of(self._embedding(ids)[0])
        else:  # as they are now
            weight: Any = self._embedding.weight
            states = weight.detach().numpy()[tokens]
        if self._scale != 1.0:
            states = states * self._scale
        if self._places is None or position is None:
            return states
        return states + self._places[position : position + len(tokens)]


def _places(backbone: Backbone) -> States | None:
    """Learned positions [P, D], which are added to embeddings; None where there are none."""
    if backbone.positions is None:
        return None
    table = backbone.stack.embed_positions
    return array_of(table.weight[int(getattr(table, "offset", 0)) :])


def _plain_rows(embedding: nn.Module) -> States | None:
    """The embeddings [V, D] themselves, where looking them up is all that is done."""
    weight = embedding.weight if type(embedding) is nn.Embedding else None
    if weight is None or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    return np.asarray(weight.detach().numpy())
