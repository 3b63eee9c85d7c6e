"""Laws of what is served by name: a chat template from a file writes the prompts, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import RunCommand, assert_two_lines

from offramp.adapter import Adapter
from offramp.models.input_processor import InputProcessor
from offramp.serving.loading import load_served
from serving import scene_examples, shipped

TEMPLATE = (
    "{% for turn in messages %}{% if turn.role == 'assistant' %} {% endif %}"
    "{% for part in turn.content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endfor %}"
)


def turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def test_a_template_of_a_file_writes_conversations(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE)
    model, processor = load_served("tiny-opt", device="cpu", chat_template=file)
    assert isinstance(model, Adapter)
    encoder = InputProcessor(model.backbone, processor)
    example = scene_examples()[0]
    text = encoder.conversation_text(
        [turn("user", example.prompt), turn("assistant", "a red"), turn("user", "")]
    )
    assert text == f"{example.prompt} a red"
    options = {"max_new_tokens": 8, "do_sample": False}
    written = model.generate(encoder.of_text(text, [example.open_image()]), **options)
    adapter, plain = shipped()
    inputs = plain(images=[example.open_image()], text=[text], return_tensors="pt")
    assert written.new_tokens.tolist() == adapter.generate(inputs, **options).new_tokens.tolist()
    assert not getattr(plain, "chat_template", None)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe\x00", "no text"),
        (b"{% for turn in messages %}", "TemplateSyntaxError"),
        (b"{{ raise_exception('no images') }}", "no images"),
        (b"Hello.", "leaves out what is asked"),
    ],
)
def test_a_template_that_does_not_work_is_two_lines(
    content: bytes | None, said: str, tmp_path: Path, run: RunCommand
) -> None:
    file = tmp_path / "chat.jinja"
    if content is not None:
        file.write_bytes(content)
    found = run("serve", "tiny-opt", "--port", 0, "--device", "cpu", "--chat-template", file)
    assert_two_lines(found, str(file), said)
