"""Laws of what is served by name: a chat template from a file writes the prompts, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import RunCommand, assert_two_lines

from offramp.adapter.shipped import example_picture
from offramp.core.errors import InputError
from offramp.engines import ENGINES, register_engine
from offramp.engines.loading import TRIAL, load
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
    opened = load("tiny-opt", engine="torch", device="cpu", chat_template=file)
    model, encoder = opened.adapter, opened.encoder
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


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "packed", "exact-batches", "compiled"])
def test_a_model_is_loaded_by_one_name_and_answers_in_every_engine(engine: str) -> None:
    loaded = load("tiny-opt", engine=engine)
    picture = example_picture("tiny-opt")
    plain = load("tiny-opt").answer(picture, "Caption:", max_new_tokens=8)
    assert isinstance(plain, str) and plain
    assert loaded.answer(picture, "Caption:", max_new_tokens=8) == plain
    full = loaded.answer(picture, "Caption:", max_new_tokens=8, mode="full")
    assert loaded.answer(picture, "Caption:", max_new_tokens=8, mode="lossless") == full


def test_a_model_that_ships_without_exits_answers_at_full_depth() -> None:
    loaded = load("tiny-t5")
    made = loaded.model.generate(
        loaded.encoder.prompts([TRIAL]), mode="full", max_new_tokens=4, do_sample=False
    )
    assert (made.depths == loaded.adapter.backbone.depth).all()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"engine": "lama.cpp"}, "Did you mean 'llama.cpp'"),
        ({"engine": "llama.cpp"}, "go together"),
        ({"engine": "torch", "gguf": "folder"}, "go together"),
        ({"engine": "llama.cpp", "gguf": "folder", "quantize": "int8"}, "is for PyTorch"),
        ({"vision": "mtmd"}, "alone"),
        ({"engine": "cuda-graphs", "device": "cpu"}, "NVIDIA"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_two_lines(how: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        load("tiny-opt", **how)
    assert len(str(caught.value).splitlines()) == 2


def test_an_engine_of_a_plug_in_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offramp.engines.ENGINES", dict(ENGINES))
    opened = []

    def mine(model: Any, *, context: int, **_: Any) -> Any:
        opened.append(context)
        return model

    register_engine("mine", mine, "for this test")
    assert load("tiny-opt", engine="mine", context=99).answer(TRIAL.image, "Caption:")
    assert opened == [99]
    with pytest.raises(InputError, match="ships"):
        register_engine("packed", mine)
