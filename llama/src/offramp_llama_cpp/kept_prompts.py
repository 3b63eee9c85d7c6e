"""Prompts of which the image alone is new: their rows without Hugging Face's `generate`.

What `generate` prepares of a prompt depends on its text and options. Asked the same again about
another image, it takes milliseconds to come to the same, and then the image's features stand in the
places that they stood in before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from cachetools import LRUCache
from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

from offramp.core.executors.prefill import Prepared, image_tokens
from offramp.core.models.intercept import InterceptedModel
from offramp.features.kept_texts import MOST, PIXELS, TEXT
from offramp_llama_cpp.native.tap import States
from offramp_llama_cpp.prompt import Prompt

log = logging.getLogger(__name__)

Whole = Callable[[], tuple[Prepared, list[Prompt]]]
PROOFS = 2
"""How often the rows made here must have been those that entered the decoder, bit for bit."""
_PLAIN = {"max_new_tokens", "do_sample", "num_beams"}
CRITERIA = "stopping_criteria"
_OWN = (MaxLengthCriteria, EosTokenCriteria)
"""Those that Hugging Face makes; what a request brings stands after them, or in their place."""


@dataclass
class _Kept:
    """What was prepared, without the image and a request's criteria; proofs: None where the rows
    were others once."""

    prepared: Prepared
    proofs: int | None = 0


class KeptPrompts:
    """Prompts of one text with one image, by ids and options; greedy, without rules of their own
    but stopping criteria.

    Not for two threads at once.
    """

    def __init__(
        self, intercepted: InterceptedModel, embedded: Callable[[list[int]], States]
    ) -> None:
        """intercepted: whose tower sees the images. embedded: the rows [T, D] of token ids."""
        self._model: Any = intercepted.model
        self._dtype, self._embedded = intercepted.backbone.dtype, embedded
        self._kept: LRUCache[Any, _Kept] = LRUCache(MOST)
        self.hits: int = 0
        """How often the image alone was looked at."""

    def read(
        self, inputs: Mapping[str, Any], options: Mapping[str, Any], whole: Whole
    ) -> tuple[Prepared, list[Prompt]]:
        """Return what `whole` returns: a request as it is prepared, and what enters the decoder."""
        asked = list(options.get(CRITERIA) or ())
        key = self._key(inputs, {n: value for n, value in options.items() if n != CRITERIA})
        if key is None or any(isinstance(it, _OWN) for it in asked):
            return whole()
        kept = self._kept.get(key)
        if kept is not None and kept.proofs == PROOFS:
            rows = self._rows(inputs)
            if rows is not None:
                self.hits += 1
                return _with_criteria(kept.prepared, asked), [Prompt(rows)]
        prepared, prompts = whole()
        own = replace(_with_criteria(prepared, (), without=asked), arguments={})
        if kept is None:
            kept = self._kept[key] = _Kept(own)
        if kept.proofs is not None:
            same = _is_plain(own) and self._same(inputs, prompts)
            kept.proofs = min(PROOFS, kept.proofs + 1) if same else None
        return prepared, prompts

    def _key(self, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
        """The key of a prompt; None where its rows may depend on more than the text."""
        if {*inputs} != {*TEXT, PIXELS} or not {*options} <= _PLAIN or options.get("do_sample"):
            return None
        ids, mask, pixels = (inputs[name] for name in (*TEXT, PIXELS))
        if len(ids) != 1 or len(pixels) != 1 or not bool(mask.all()):
            return None
        own = repr(vars(self._model.generation_config))  # what the options leave open
        return (*ids[0].tolist(), pixels.shape, pixels.dtype, *sorted(options.items()), own)

    def _rows(self, inputs: Mapping[str, Any]) -> States | None:
        """The embeddings of the text with the image's features in their places."""
        ids = inputs["input_ids"][0]
        mark = next(iter(image_tokens(self._model.config)), None)
        found = self._model.base_model.get_image_features(
            pixel_values=inputs[PIXELS], return_dict=True
        )
        features = torch.cat([part.flatten(0, -2) for part in found.pooler_output])
        places = (ids == mark).cpu().numpy()
        if places.sum() != len(features):
            return None
        rows = self._embedded(ids.tolist()).copy()
        rows[places] = features.to(self._dtype).float().cpu().numpy()
        return rows

    def _same(self, inputs: Mapping[str, Any], prompts: list[Prompt]) -> bool:
        [prompt] = prompts
        if prompt.positions is not None or prompt.features is not None or prompt.ahead:
            return False
        try:
            rows = self._rows(inputs)
        except Exception as error:  # each family has its own way to its features
            log.debug("Prompts are prepared whole: %s", error)
            return False
        return rows is not None and np.array_equal(rows, prompt.states)


def _with_criteria(
    prepared: Prepared, more: Sequence[Any], *, without: Sequence[Any] = ()
) -> Prepared:
    """What was prepared, with `more` stopping criteria after its own, and `without` some."""
    kept = [it for it in prepared.criteria if all(it is not other for other in without)]
    return replace(prepared, criteria=StoppingCriteriaList([*kept, *more]))


def _is_plain(prepared: Prepared) -> bool:
    """Whether nothing of it remembers an answer."""
    criteria = all(type(it) in _OWN for it in prepared.criteria)
    return criteria and not list(prepared.processors) and not prepared.config.do_sample
