"""Laws of what a request asks: a guarantee is of prompts as the model reads the calibrated ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from smolvlm import save_smolvlm

from offramp.core.models.backbone import Backbone
from offramp.features.input_processor import InputProcessor
from offramp.promises.prompt_kinds import OTHER
from offramp.serving.server.api.protocol import ChatRequest, CompletionRequest
from offramp.serving.server.config import ServerConfig
from offramp.serving.server.inputs.prompts import Prompter
from serving import data_uri, shipped

URI = data_uri(Image.new("RGB", (8, 8)))
PICTURE = {"type": "image_url", "image_url": {"url": URI}}
ASKED = "What is this?"


def prompter(encoder: InputProcessor) -> Prompter:
    return Prompter(SimpleNamespace(prompts=encoder), ServerConfig("m"))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def with_template(tmp_path_factory: pytest.TempPathFactory) -> Prompter:
    from transformers import AutoProcessor

    folder: Path = tmp_path_factory.mktemp("smolvlm")
    save_smolvlm(folder)
    backbone = Backbone.from_pretrained(folder)
    return prompter(InputProcessor(backbone, AutoProcessor.from_pretrained(folder)))


def chat(*turns: tuple[str, Any]) -> ChatRequest:
    return ChatRequest(messages=[{"role": role, "content": said} for role, said in turns])  # type: ignore[list-item]


TEXT = {"type": "text", "text": ASKED}
FIRST = ("user", [PICTURE, TEXT])


@pytest.mark.parametrize(
    ("request_", "template", "plain"),
    [
        (chat(FIRST), ASKED, ASKED),
        (chat(("user", [TEXT, PICTURE])), OTHER, ASKED),  # a template writes parts in their order
        (chat(("user", [PICTURE, TEXT, PICTURE])), OTHER, OTHER),
        (chat(("user", ASKED)), OTHER, OTHER),
        (chat(FIRST, ("assistant", "A dog."), ("user", ASKED)), OTHER, None),
        (chat(("system", "Be brief."), FIRST), OTHER, None),
        (CompletionRequest(prompt=ASKED, images=[URI]), OTHER, ASKED),  # no template wrote it
        (CompletionRequest(prompt=[ASKED, ASKED], images=[URI]), OTHER, OTHER),
        (CompletionRequest(prompt=[1, 2]), OTHER, OTHER),
    ],
)
def test_a_question_is_what_the_model_reads_as_an_example_that_asks_it(
    with_template: Prompter, request_: Any, template: str, plain: str | None
) -> None:
    assert with_template.question(request_) == template
    adapter, processor = shipped()
    if plain is not None:  # without a template several turns are refused
        assert prompter(InputProcessor(adapter.backbone, processor)).question(request_) == plain
