"""The model inside evaluation harnesses, against their published interfaces with fake requests."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from serving import scene_examples, shipped

from offramp.core.errors import InputError
from offramp.features.input_processor import InputProcessor
from offramp_lab.harnesses.harness import Ask, HarnessModel, generation_options

LONGEST = 12


class Hook:
    def __init__(self) -> None:
        self.kept: list[Any] = []

    def add_partial(self, kind: str, what: Any, answer: str) -> None:
        self.kept.append((kind, what, answer))


class LM:
    """What `lm_eval.api.model.LM` and `lmms_eval.api.model.lmms` set up in their subclasses."""

    is_simple = True

    def __init__(self) -> None:
        self.cache_hook, self.task_dict = Hook(), {}


class ModelManifest:
    """As of lmms-eval 0.7: it needs an id and a class path."""

    def __init__(self, model_id: str, chat_class_path: str) -> None:
        self.model_id, self.chat_class_path = model_id, chat_class_path


@pytest.fixture
def harnesses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both harnesses' modules, where they are not installed."""
    fakes = {
        "lm_eval.api.model": {"LM": LM},
        "lmms_eval.api.model": {"lmms": LM},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    for name, content in fakes.items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            module = ".".join(parts[:depth])
            if module not in sys.modules:
                monkeypatch.setitem(sys.modules, module, ModuleType(module))
        vars(sys.modules[name]).update(content)
    monkeypatch.setitem(sys.modules, "lmms_eval.api.instance", None)
    ours = ("lm_eval_model", "lmms_eval_model")
    for name in ours:
        monkeypatch.delitem(sys.modules, f"offramp_lab.harnesses.{name}", raising=False)
    yield
    for name in ours:
        sys.modules.pop(f"offramp_lab.harnesses.{name}", None)


def entry_point(group: str) -> Any:
    """What the package's metadata names in a group."""
    import tomllib

    text = (Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8")
    [(name, value)] = tomllib.loads(text)["project"]["entry-points"][group].items()
    return EntryPoint(name, value, group).load()


def expected(example: Any, mode: str = "early_exit") -> str:
    adapter, processor = shipped()
    encoder = InputProcessor(adapter.backbone, processor)
    output = adapter.generate(encoder.prompts([example]), max_new_tokens=LONGEST, do_sample=False)
    return encoder.texts(output.new_tokens)[0]


def test_lm_eval_gets_what_generate_gives(harnesses: None) -> None:
    model = entry_point("lm_eval.models")("tiny-opt", batch_size="4", limit=128)
    try:
        some = scene_examples()[:6]
        options = {"until": ["\n\n"], "max_gen_toks": LONGEST, "do_sample": False}
        requests = [
            SimpleNamespace(args=(f"<image>{e.prompt}", options, {"visual": [e.open_image()]}))
            for e in some
        ]
        assert model.generate_until(requests) == [expected(e) for e in some]
        stopped = {**options, "until": ["objects", "object"]}
        [text] = model.generate_until(
            [SimpleNamespace(args=("Caption:", stopped, {"visual": [some[0].open_image()]}))]
        )
        assert text == expected(some[0]).split("objects")[0].strip()
        for ask in (model.loglikelihood, model.loglikelihood_rolling):
            with pytest.raises(InputError, match="generation tasks"):
                ask([])
        history = [{"role": "user", "content": "Caption:"}]
        assert model.apply_chat_template(history) == "Caption:"
    finally:
        model.harness.close()


def test_what_is_answered_is_kept_whatever_is_refused(harnesses: None) -> None:
    """Each answer once it is there, so that a run that is cut off goes on from the harness's
    cache."""
    model = entry_point("lm_eval.models")("tiny-opt", batch_size="2", limit=64)
    try:
        options = {"until": [], "max_gen_toks": 8, "do_sample": False}
        image = {"visual": [scene_examples()[0].open_image()]}
        texts = ["<image>Caption:", "<image>" + "Caption: " * 60, "<image>Caption: a"]
        requests = [SimpleNamespace(args=(text, options, image)) for text in texts]
        # The harness's own placeholder is replaced in what is asked alone.
        with pytest.raises(InputError, match=r"A prompt of \d+ tokens does not fit") as error:
            model.generate_until(requests)
        assert "up to 0" not in str(error.value)
        assert [what[0] for _, what, _ in model.cache_hook.kept] == [texts[0], texts[2]]
        model.harness._most = 1  # answers come before later ones are asked for
        asked: list[int] = []

        def asks() -> Iterator[Ask]:
            for place in range(3):
                asked.append(place)
                yield Ask("<image>Caption:".replace("<image>", mark), image["visual"], options)

        mark = model.harness.encoder.image_mark or ""
        place, _ = next(iter(model.harness.answers(asks())))
        assert place == 0 and asked == [0]
    finally:
        model.harness.close()


def test_a_turn_that_is_the_answers_beginning_is_gone_on_with(
    harnesses: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = entry_point("lm_eval.models")("tiny-opt", batch_size="2", limit=64)
    try:
        seen: list[dict[str, Any]] = []

        class Templated:
            chat_template = "a template"

            def apply_chat_template(self, turns: Any, **how: Any) -> str:
                seen.append(how)
                return str(turns[-1]["content"][0]["text"])

        monkeypatch.setattr(model.harness.encoder, "processor", Templated())
        turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "As"}]
        assert model.apply_chat_template(turns, add_generation_prompt=False) == "As"
        assert model.apply_chat_template(turns[:1]) == "Why?"
        assert seen == [
            {"add_generation_prompt": False, "continue_final_message": True},
            {"add_generation_prompt": True},
        ]
    finally:
        model.harness.close()


@pytest.mark.parametrize("given", [{"slots": "many"}, {"limit": "abc"}])
def test_an_argument_that_is_no_number_is_named(given: dict[str, str]) -> None:
    [(name, value)] = given.items()
    with pytest.raises(InputError, match=f"{name} is '{value}'"):
        HarnessModel("tiny-opt", **given)  # type: ignore[arg-type]


def test_lmms_eval_gets_what_generate_gives(harnesses: None) -> None:
    manifest = entry_point("lmms_eval.models")()
    assert manifest.model_id == "offramp"
    module, _, name = manifest.chat_class_path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    assert cls.is_simple is False
    model = cls(adapter="tiny-opt", batch_size=4, limit="128", mode="lossless")
    try:
        some = scene_examples()[:5]
        model.task_dict = {"scenes": {"test": some}}

        def doc_to_messages(doc: Any) -> list[dict[str, Any]]:
            parts = [
                {"type": "image", "url": doc.open_image()},
                {"type": "text", "text": doc.prompt},
            ]
            return [{"role": "user", "content": parts}]

        options = {"max_new_tokens": LONGEST, "temperature": 0, "top_p": None, "num_beams": 1}
        requests = [
            SimpleNamespace(args=("ctx", doc_to_messages, options, i, "scenes", "test"))
            for i in range(len(some))
        ]
        assert model.generate_until(requests) == [expected(e) for e in some]
        sound = [{"role": "user", "content": [{"type": "audio", "url": "x"}]}]
        bad = SimpleNamespace(args=("ctx", lambda _: sound, options, 0, "scenes", "test"))
        with pytest.raises(InputError, match="audio"):
            model.generate_until([bad])
        for ask in (model.loglikelihood, model.generate_until_multi_round):
            with pytest.raises(InputError):
                ask([])
    finally:
        model.harness.close()


@pytest.mark.parametrize(
    ("given", "options", "stops"),
    [
        ({}, {"max_new_tokens": 256, "do_sample": False}, ()),
        ({"until": "x", "max_gen_toks": "7"}, {"max_new_tokens": 7, "do_sample": False}, ("x",)),
        (
            {"temperature": 0.5, "do_sample": True, "top_p": 0.9},
            {
                "max_new_tokens": 256,
                "do_sample": True,
                "temperature": 0.5,
                "top_k": 0,
                "top_p": 0.9,
            },
            (),
        ),
        (
            {"do_sample": True},
            {
                "max_new_tokens": 256,
                "do_sample": True,
                "temperature": 1.0,
                "top_k": 0,
                "top_p": 1.0,
            },
            (),
        ),
        ({"do_sample": True, "temperature": 0}, {"max_new_tokens": 256, "do_sample": False}, ()),
        ({"do_sample": False, "temperature": 1.0}, {"max_new_tokens": 256, "do_sample": False}, ()),
    ],
)
def test_a_tasks_options_are_hugging_faces(
    given: dict[str, Any], options: dict[str, Any], stops: tuple[str, ...]
) -> None:
    assert generation_options(given) == (options, stops)


@pytest.mark.parametrize("given", [{"num_beams": 4}, {"penalty_alpha": 0.5}])
def test_what_no_answer_could_follow_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        generation_options(given)
