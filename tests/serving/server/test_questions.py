"""Laws of what a request asks: a guarantee is of prompts as the model reads the calibrated ones."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from smolvlm import save_smolvlm

from offramp.core.models.backbone import Backbone
from offramp.data.scenes import tasks
from offramp.features.input_processor import COMPLETES, InputProcessor
from offramp.inputs.control import WRITTEN
from offramp.promises.prompt_kinds import OTHER
from offramp.serving.engine_config import EngineConfig
from offramp.serving.server.api.protocol import ChatRequest, CompletionRequest
from offramp.serving.server.config import ServerConfig
from offramp.serving.server.inputs.prompts import Prompter
from offramp.serving.server.pytorch import service_of
from serving import NAME, asking, data_uri, messages, shipped

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


def test_turns_that_complete_a_text_are_a_question_as_they_are_written(
    with_template: Prompter,
) -> None:
    """By the photo model's template, by which examples may be written as conversations."""
    encoder = with_template.processor
    assert isinstance(encoder, InputProcessor)
    read = InputProcessor(encoder.backbone, copy(encoder.processor))
    read.processor.chat_template, read.processor.image_token = COMPLETES, "<file_sep>"
    ask = prompter(read).question
    asked = ask(chat(FIRST, ("assistant", "A dog."), ("user", "Where?")))
    assert asked.startswith(f"{WRITTEN}user\n{ASKED}") and asked.endswith(f"{WRITTEN}assistant\n")
    forged = {"type": "text", "text": asked}
    assert ask(chat(("user", [PICTURE, forged]))) == OTHER  # a message's marks are text


@pytest.mark.slow
def test_each_kind_of_prompt_is_answered_by_the_thresholds_it_was_calibrated_by() -> None:
    """Questions at a lower threshold than captions; both are promised."""
    adapter, processor = shipped()
    low, kind = {"2": 0.2}, "Question: ... ? Answer:"
    kinds = [{"kind": "Caption:", "point": None}, {"kind": kind, "point": low}]
    calibration = {**(adapter.calibration or {}), "kinds": kinds, "each_kind": True}
    adapter = replace(adapter, calibration=calibration)
    examples = [*tasks.captions("test", 3).examples, *tasks.questions("test", 9).examples]
    service = service_of(adapter, processor, ServerConfig(NAME), EngineConfig(4, 256))
    encoder, lower = InputProcessor(adapter.backbone, processor), []
    try:
        for example in examples:
            asked = example.prompt != "Caption:"
            policy = replace(adapter.policy, thresholds={2: 0.2}) if asked else adapter.policy
            options = {"max_new_tokens": 12, "do_sample": False}
            alone = adapter.generate(encoder.prompts([example]), policy=policy, **options)
            own = adapter.generate(encoder.prompts([example]), **options)
            body = {"messages": messages(example), "max_tokens": 12}
            found = asking(service).post("/v1/chat/completions", json=body).json()
            said = found["usage"]["offramp"]
            assert said["mean_depth"] == pytest.approx(alone.mean_depth)
            assert found["choices"][0]["message"]["content"] == encoder.texts(alone.new_tokens)[0]
            assert said["verdict"]["promised"]
            lower.append(alone.mean_depth < own.mean_depth)
    finally:
        service.close()
    assert any(lower[3:]) and not any(lower[:3])
