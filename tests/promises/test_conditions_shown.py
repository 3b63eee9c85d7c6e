"""Laws of changed conditions: whoever loads the shipped exits, or asks their server, is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offramp.cli import main
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.models import as_loaded
from offramp.engines.loading import Loaded, load
from offramp.promises.conditions import of_processor
from offramp.promises.verdict import NONE
from offramp.serving.engine_config import EngineConfig
from offramp.serving.server.config import ServerConfig
from offramp.serving.server.pytorch import service_of
from serving import NAME, asking, messages, scene_examples

Change = Callable[[Loaded], None]


class LowRank(nn.Module):
    """A linear layer with a term of low rank, as PEFT puts one in."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.disable_adapters, self.merged_adapters = base, False, list[str]()
        self.active_adapters = ["default"]
        self.low = nn.Linear(base.in_features, base.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) if self.disable_adapters else self.base(x) + self.low(x)


def pixels(name: str, value: Any) -> Change:
    return lambda loaded: setattr(loaded.processor.image_processor, name, value)


def no_first_token(loaded: Loaded) -> None:
    loaded.processor.tokenizer.backend_tokenizer.post_processor = None


def put_in(loaded: Loaded) -> None:
    loaded.adapter.backbone.layers[0].fc1 = LowRank(loaded.adapter.backbone.layers[0].fc1)


def written(part: str) -> Change:
    def change(loaded: Loaded) -> None:
        of = loaded.adapter.exits.modules if part == "exits" else loaded.adapter.backbone.layers
        with torch.no_grad():
            next(iter(of.parameters())).add_(0.05)

    return change


def samples(loaded: Loaded) -> None:
    loaded.adapter.backbone.model.generation_config.do_sample = True


def imprecise(loaded: Loaded) -> None:
    torch.set_float32_matmul_precision("medium")


CHANGES: dict[str, tuple[Change, str]] = {
    "normalise": (pixels("do_normalize", False), "another image processor"),
    "rescale": (pixels("do_rescale", False), "another image processor"),
    "mean": (pixels("image_mean", [0.1, 0.2, 0.9]), "another image processor"),
    "size": (pixels("size", {"height": 36, "width": 36}), "another image processor"),
    "first token": (no_first_token, "another tokenizer"),
    "LoRA": (put_in, "weights of the backbone changed after they were loaded"),
    "backbone": (written("backbone"), "weights of the backbone changed after they were loaded"),
    "exits": (written("exits"), "other weights of the exits"),
    "matmul": (imprecise, "float32 matrix multiplication of precision medium"),
    "do_sample": (samples, "sampled where greedy decoding was calibrated"),
}
SERVED = [name for name in CHANGES if name not in ("size", "do_sample")]
"""A picture of another size is an error there, and what is sampled is the request's."""


@pytest.fixture
def loaded() -> Iterator[Loaded]:
    before = torch.get_float32_matmul_precision()
    yield load("tiny-opt", engine="torch", vision="torch")
    torch.set_float32_matmul_precision(before)


def said(loaded: Loaded) -> str:
    return loaded.adapter.standing(**of_processor(loaded.processor)).sentence


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_after_loading_withdraws_the_guarantee(loaded: Loaded, name: str) -> None:
    change, words = CHANGES[name]
    if name != "first token":  # what a tokenizer does is looked at once
        assert said(loaded).startswith("guaranteed with 95% confidence")
    change(loaded)
    assert said(loaded).startswith("not guaranteed here: ") and words in said(loaded)


def test_a_switched_adapter_of_peft_is_told(loaded: Loaded) -> None:
    put_in(loaded)
    backbone = loaded.adapter.backbone
    as_loaded._LOADED.pop(backbone.model)
    as_loaded.note_loaded(backbone)  # as if it had been there
    assert said(loaded).startswith("guaranteed")
    loaded.adapter.backbone.layers[0].fc1.disable_adapters = True
    assert "weights of the backbone changed" in said(loaded)


def test_what_is_generated_under_autocast_is_not_guaranteed(loaded: Loaded) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert loaded.answer(scene_examples()[0].image)
        assert "autocast to bfloat16 where none was calibrated" in said(loaded)
    assert said(loaded).startswith("guaranteed")


@pytest.mark.parametrize("name", SERVED)
def test_a_server_says_so_of_its_answers_and_of_its_model(loaded: Loaded, name: str) -> None:
    change, words = CHANGES[name]
    if name == "first token":
        change(loaded)
    config, sizes = ServerConfig(NAME), EngineConfig(2, 256)
    service = service_of(loaded.adapter, loaded.processor, config, sizes)
    client, example = asking(service), scene_examples()[0]

    def told() -> str:
        body = {"messages": messages(example), "max_tokens": 4}
        answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
        verdict = answer["usage"]["offramp"]["verdict"]
        return f"{verdict['says']} {verdict['why']}"

    try:
        if name != "first token":
            assert told().startswith("Promised: at most 0.75% differ.")
            change(loaded)
        assert told().startswith(NONE) and words in told()
        card = client.get("/v1/models").json()["data"][0]["offramp"]
        assert card["guarantee"] is None and words in card["not_guaranteed"]
    finally:
        service.close()


def test_inspect_shows_no_guarantee_for_thresholds_that_were_not_calibrated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = load(NAME).adapter
    adapter.save_pretrained(tmp_path / "calibrated")
    replace(adapter, policy=ExitPolicy({2: 0.3})).save_pretrained(tmp_path / "other")
    shown = {}
    for folder in ("calibrated", "other"):
        assert main(["inspect", str(tmp_path / folder)]) == 0
        shown[folder] = capsys.readouterr().out
    assert "2: 0.8 were calibrated" in shown["other"] and "0.0075" not in shown["other"]
    assert "0.0075" in shown["calibrated"]
