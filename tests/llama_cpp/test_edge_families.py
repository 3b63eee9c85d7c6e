"""Laws of images without PyTorch, family by family: what libmtmd makes of a picture enters the
decoder where, and as, the model's own processor and tower would have it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from gguf_cases import refused, seen_by_mtmd
from hub_files import sliced
from PIL import Image
from projector_files import inputs_of, pictures, words_of, write_projector

from offramp.adapter.adapter import Adapter
from offramp.core.errors import AdapterError
from offramp.core.models.intercept import InterceptedModel
from offramp.inputs.image import open_rgb
from offramp_llama_cpp.edge.model import EdgeModel
from offramp_llama_cpp.entry import DecoderEntry
from offramp_llama_cpp.segment import EngineOptions

pytestmark = pytest.mark.llama_cpp

NAMES = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "gemma3", "smolvlm")
MODES = ("full", "early_exit", "lossless")
ENGINE = EngineOptions(context=256, cache="f32", flash_attention=False)
MARKER = "<__media__>"
PROMPTS = {1: f"see {MARKER} it", 2: f"{MARKER} and then {MARKER} ran"}
"""By the number of pictures; text stands before, between and behind them."""


class Case(NamedTuple):
    name: str
    adapter: Adapter
    model: EdgeModel
    files: list[Path]


@pytest.fixture(scope="module", params=NAMES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    name, folder = request.param, tmp_path_factory.mktemp("families")
    adapter = seen_by_mtmd(name)
    where = sliced(adapter, folder, words=words_of(name))
    mmproj, files = write_projector(adapter.backbone, folder / "mmproj.gguf"), []
    for place, picture in enumerate(pictures(name)):
        files.append(folder / f"{place}.png")
        Image.fromarray(picture).save(files[-1])
    with EdgeModel(where, mmproj=mmproj, engine=ENGINE) as model:
        yield Case(name, adapter, model, files)


def asked(case: Case, count: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """The prompt of so many pictures, by libmtmd and by the model's processor."""
    seen = [open_rgb(file, file.name) for file in case.files[:count]]
    prompt, ids = case.model.prompt_of(PROMPTS[count], seen)
    return prompt, inputs_of(case.name, ids, pictures(case.name)[:count])


@pytest.mark.parametrize("count", PROMPTS)
def test_a_prompt_is_the_models_own(case: Case, count: int) -> None:
    """States that enter the decoder, positions, and which rows see each other."""
    prompt, inputs = asked(case, count)
    entry = DecoderEntry()
    model = InterceptedModel(case.adapter.backbone, entry).model
    with torch.inference_mode():
        call = entry.call(lambda: model(**inputs))
    hidden = call.hidden[0].float().numpy()
    assert prompt.states.shape == hidden.shape
    assert np.abs(prompt.states - hidden).max() < 5e-3 * np.abs(hidden).max()
    model = case.adapter.backbone.model
    if prompt.positions is not None:
        theirs, _ = model.model.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"],
        )
        assert prompt.positions[:3].tolist() == theirs[:, 0].tolist()


def test_a_projector_of_another_model_is_refused(case: Case, tmp_path: Path) -> None:
    """And does no harm to the one that is loaded."""
    other = "gemma3" if case.name == "qwen3-vl" else "qwen3-vl"  # whose rows are of other widths
    mmproj = write_projector(seen_by_mtmd(other).backbone, tmp_path / "other")
    folder = case.model.files.files[0].parent
    refused(lambda: EdgeModel(folder, mmproj=mmproj, engine=ENGINE), AdapterError, "projector")
    assert case.model.answer(PROMPTS[1], case.files[:1], max_new_tokens=2).steps


@pytest.mark.parametrize("count", PROMPTS)
@pytest.mark.parametrize("mode", MODES)
def test_answers_are_the_models_own(case: Case, count: int, mode: str) -> None:
    _, inputs = asked(case, count)
    theirs = case.adapter.generate(inputs, mode=mode, max_new_tokens=12, do_sample=False)
    ours = case.model.answer(PROMPTS[count], case.files[:count], mode=mode, max_new_tokens=12)
    assert [step.token for step in ours.steps] == theirs.new_tokens[0].tolist()
    if mode == "early_exit":
        assert [step.depth for step in ours.steps] == theirs.depths[0].tolist()
