"""Laws of kept prompts: the states that Hugging Face's way makes, bit for bit, or its way."""

from __future__ import annotations

from typing import Any

import families
import numpy as np
import pytest
import torch
from transformers import MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList

from offramp.core.models.backbone import Backbone
from offramp.features.vision_cache import VisionCache
from offramp_llama_cpp.entry import PromptEntry
from offramp_llama_cpp.graphs import Architecture
from offramp_llama_cpp.segment import EngineOptions

pytestmark = pytest.mark.llama_cpp
WINDOWED = ("paligemma2",)
"""Whose prompt of eleven tokens that see each other llama.cpp would cut off at a window of six."""
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


def entry_of(model: Backbone, cache: VisionCache | None = None) -> PromptEntry:
    graph = Architecture("llama", {}, ahead=True, sections=True, deepstack=True)
    return PromptEntry(model, graph, EngineOptions(context=128), cache)


def asked(name: str, image: int, words: int = 0) -> dict[str, Any]:
    """The same text about another image, or another text."""
    inputs = families.KINDS[name].inputs(1, seed=words)
    draw = torch.Generator().manual_seed(image)
    inputs["pixel_values"] = torch.randn(inputs["pixel_values"].shape, generator=draw)
    return inputs


def states(entry: PromptEntry, inputs: dict[str, Any], **options: Any) -> Any:
    with torch.inference_mode():
        _, [prompt] = entry.read(inputs, {**GREEDY, **options})
    return prompt.states


@pytest.mark.parametrize("name", [n for n in families.NAMES if n not in WINDOWED])
def test_states_are_those_that_hugging_face_makes(name: str, backbone: Any) -> None:
    """Of every family that llama.cpp runs, whether its prompts can be kept or not."""
    model: Backbone = backbone(name)
    if model.is_encoder_decoder:
        pytest.skip("no decoder of llama.cpp's")
    entry = entry_of(model)
    for image in range(5):
        inputs = asked(name, image)
        with torch.inference_mode():
            prepared = entry.prepare(inputs, GREEDY)
            [want] = entry.prompts(prepared)
        assert np.array_equal(states(entry, inputs), want.states)
    assert entry.kept.hits == (3 if name == "llava" else entry.kept.hits)


def test_only_what_was_twice_the_same_is_kept(backbone: Any) -> None:
    entry = entry_of(backbone("llava"))
    hits = []
    for image in range(4):
        states(entry, asked("llava", image))
        hits.append(entry.kept.hits)
    assert hits == [0, 0, 1, 2]
    states(entry, asked("llava", 0, words=1))  # another text
    assert entry.kept.hits == 2


def test_what_was_prepared_is_the_requests_own(backbone: Any) -> None:
    entry = entry_of(backbone("llava"))
    for _ in range(3):
        for longest in (3, 5):
            inputs = asked("llava", 7)
            with torch.inference_mode():
                prepared, _ = entry.read(inputs, {"max_new_tokens": longest, "do_sample": False})
            assert torch.equal(prepared.ids, inputs["input_ids"])
            assert prepared.criteria.max_length == inputs["input_ids"].shape[1] + longest
    assert entry.kept.hits == 2


class Noting(StoppingCriteria):
    """Stops nothing."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_criteria_of_a_request_are_its_own(backbone: Any) -> None:
    entry = entry_of(backbone("llava"))
    for _ in range(4):
        mine = Noting()
        with torch.inference_mode():
            prepared, _ = entry.read(
                asked("llava", 7), {**GREEDY, "stopping_criteria": StoppingCriteriaList([mine])}
            )
        others = [it for it in prepared.criteria if it is not mine]
        assert mine in prepared.criteria and not any(isinstance(it, Noting) for it in others)
    assert entry.kept.hits == 2
    with torch.inference_mode():
        prepared, _ = entry.read(asked("llava", 7), GREEDY)
    assert entry.kept.hits == 3 and not any(isinstance(it, Noting) for it in prepared.criteria)


def test_criteria_that_take_the_place_of_its_own_are_prepared_whole(backbone: Any) -> None:
    entry = entry_of(backbone("llava"))
    longest = StoppingCriteriaList([MaxLengthCriteria(max_length=9)])
    for image in range(4):
        states(entry, asked("llava", image), stopping_criteria=longest)
    assert entry.kept.hits == 0


@pytest.mark.parametrize(
    "options", [{"do_sample": True}, {"repetition_penalty": 1.5}, {"min_new_tokens": 2}], ids=str
)
def test_what_has_rules_of_its_own_is_prepared_whole(
    backbone: Any, options: dict[str, Any]
) -> None:
    entry = entry_of(backbone("llava"))
    for image in range(4):
        states(entry, asked("llava", image), **options)
    assert entry.kept.hits == 0


def test_rules_of_the_models_own_are_seen(backbone: Any) -> None:
    model = Backbone(families.build("llava"))
    entry = entry_of(model)
    for image in range(3):
        states(entry, asked("llava", image))
    assert entry.kept.hits == 1
    model.model.generation_config.repetition_penalty = 1.5
    for image in range(4):
        states(entry, asked("llava", image))
    assert entry.kept.hits == 1


def test_several_rows_and_padding_are_prepared_whole(backbone: Any) -> None:
    model, inputs = backbone("llava"), families.KINDS["llava"].inputs(3)
    entry = PromptEntry(model, Architecture("llama", {}), EngineOptions(context=128, sequences=3))
    for _ in range(4):
        with torch.inference_mode():
            _, prompts = entry.read(inputs, GREEDY)
        assert len(prompts) == 3
    assert entry.kept.hits == 0


def test_the_image_cache_stands_before_the_tower(backbone: Any) -> None:
    cache = VisionCache()
    entry = entry_of(backbone("llava"), cache)
    for _ in range(4):
        states(entry, asked("llava", 1))
    assert entry.kept.hits == 2
    assert cache.misses == 1


def test_weights_that_are_written_are_seen(backbone: Any) -> None:
    model = Backbone(families.build("llava"))
    entry = entry_of(model)
    for image in range(3):
        states(entry, asked("llava", image))
    with torch.no_grad():
        model.model.get_input_embeddings().weight.mul_(1.5)
    inputs = asked("llava", 9)
    with torch.inference_mode():
        [want] = entry.prompts(entry.prepare(inputs, GREEDY))
    assert np.array_equal(states(entry, inputs), want.states)
    assert entry.kept.hits == 2
