"""Exits are called as transformers' users call a model: what goes in and comes out is the same."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import trained
from fakes import word_level
from smolvlm import save_smolvlm
from smolvlm import tokenizer as bytewise

import offramp
from offramp import Adapter, ExitPolicy, Exits, GenerationOutput
from offramp.core.decoding.policy import MODES
from offramp.core.errors import InputError

Build = Callable[..., Any]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "getting-started.md"
FAMILIES = ("blip2-opt", "blip2-t5", "llava", "idefics3", "qwen2.5-vl", "florence2")
SOON = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture
def attached(backbone: Build, exits: Build) -> Callable[[str], Adapter]:
    """`attached(name)`: exits on a family's model, at which about half of the tokens exit."""
    policy = ExitPolicy({2: 0.03})
    return lambda name: replace(offramp.attach(backbone(name), exits(name)), policy=policy)


# -- in and out as Hugging Face's generate ------------------------------------------------------


@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("name", FAMILIES)
def test_three_ways_to_call_write_the_same(
    name: str, mode: str | None, attached: Build, batch: Build
) -> None:
    adapter, inputs = attached(name), batch(name, 2)
    whole = adapter.generate(inputs, mode=mode, **SOON)
    named = adapter.generate(**inputs, mode=mode, **SOON)
    hooked = adapter.backbone.model.generate(**inputs, custom_generate=adapter, mode=mode, **SOON)
    assert type(named) is type(whole) and hooked.dtype == torch.long
    assert torch.equal(named.sequences, whole.sequences) and torch.equal(hooked, whole.sequences)
    if mode in ("lossless", "full"):
        assert torch.equal(named.sequences, adapter.backbone.model.generate(**inputs, **SOON))


def test_the_modes_differ_in_how_deep_tokens_run(attached: Build, batch: Build) -> None:
    adapter = replace(attached("llava"), policy=ExitPolicy({2: 0.0}))
    made = {mode: adapter.generate(**batch("llava", 1), mode=mode, **SOON) for mode in MODES}
    assert made["early_exit"].mean_depth < made["full"].mean_depth == 6
    assert made["lossless"].rounds and not made["full"].rounds


def test_a_dict_has_depths_and_scores(attached: Build, batch: Build) -> None:
    adapter, inputs = attached("llava"), batch("llava", 2)
    asked = {"return_dict_in_generate": True, **SOON}
    hooked = adapter.backbone.model.generate(**inputs, custom_generate=adapter, **asked)
    for made in (adapter.generate(**inputs, **asked), hooked):
        assert isinstance(made, GenerationOutput)
        assert made.depths.shape == made.scores.shape == made.new_tokens.shape == (2, 6)


def test_what_comes_out_can_be_trained_on(attached: Build, batch: Build) -> None:
    """No inference tensors, which autograd refuses to keep."""
    adapter, inputs = attached("llava"), batch("llava", 1)
    weight = torch.nn.Embedding(1000, 4)
    for ids in (
        adapter.generate(**inputs, **SOON).sequences,
        adapter.backbone.model.generate(**inputs, custom_generate=adapter, **SOON),
    ):
        weight(ids).sum().backward()


def test_another_policy_for_one_call(attached: Build, batch: Build) -> None:
    adapter, inputs = attached("llava"), batch("llava", 1)
    deep = adapter.generate(inputs, policy=ExitPolicy(), **SOON)
    assert deep.mean_depth == 6
    with pytest.raises(InputError, match="Did you mean 'lossless'"):
        adapter.generate(inputs, mode="losless", **SOON)


@pytest.mark.parametrize("given", [{2: 0.9}, "fast", 0.9])
def test_what_is_no_policy_is_answered_with_one(given: Any, attached: Build, batch: Build) -> None:
    adapter = attached("llava")
    with pytest.raises(InputError, match=r"\n.*ExitPolicy\(\{2: 0.95}\)"):
        adapter.generate(batch("llava", 1), policy=given, **SOON)


@pytest.mark.parametrize("given", [None, {2: 0.9}])
def test_what_is_no_exits_is_refused(given: Any, attached: Build) -> None:
    with pytest.raises(InputError, match=r"Exits cannot be .*\n.*a folder or a hub name"):
        offramp.attach(attached("llava").backbone, given)


def test_exits_without_thresholds_say_so(attached: Build, batch: Build) -> None:
    adapter, inputs = replace(attached("llava"), policy=ExitPolicy()), batch("llava", 1)
    for mode in (None, "early_exit", "lossless"):
        with pytest.warns(UserWarning, match=r"no thresholds.*offramp calibrate"):
            adapter.generate(**inputs, mode=mode, **SOON)
    with pytest.warns(UserWarning, match="no thresholds"):
        adapter.backbone.model.generate(**inputs, custom_generate=adapter, **SOON)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapter.generate(inputs, mode="full", **SOON)
        adapter.generate(inputs, policy=ExitPolicy(), **SOON)


def test_sampling_draws_the_same_through_custom_generate(attached: Build, batch: Build) -> None:
    adapter, inputs = attached("llava"), batch("llava", 2)
    options = {"max_new_tokens": 6, "do_sample": True, "temperature": 1.3, "top_k": 20}
    torch.manual_seed(5)
    ours = adapter.generate(**inputs, **options).sequences
    torch.manual_seed(5)
    hooked = adapter.backbone.model.generate(**inputs, custom_generate=adapter, **options)
    assert torch.equal(ours, hooked)


def test_exits_of_another_model_are_refused(attached: Build, backbone: Build, batch: Build) -> None:
    adapter = attached("llava")
    other = backbone("idefics3").model
    with pytest.raises(InputError, match="another model"):
        other.generate(**batch("idefics3", 1), custom_generate=adapter, **SOON)
    with pytest.raises(InputError, match="another model"):
        offramp.attach(other, adapter)
    assert offramp.attach(adapter.backbone.model, adapter) is adapter


def test_options_that_are_not_done_are_refused_there_too(attached: Build, batch: Build) -> None:
    adapter = attached("llava")
    with pytest.raises(InputError, match="num_beams is not supported"):
        adapter.backbone.model.generate(
            **batch("llava", 1), custom_generate=adapter, num_beams=2, **SOON
        )


def test_a_text_only_turn(attached: Build) -> None:
    adapter = attached("idefics3")
    words = torch.randint(9, 40, (1, 6))
    inputs = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    full = adapter.backbone.model.generate(**inputs, **SOON)
    assert torch.equal(adapter.generate(**inputs, mode="lossless", **SOON).sequences, full)
    made = adapter.generate(words, attention_mask=inputs["attention_mask"], mode="full", **SOON)
    assert torch.equal(made.sequences, full)


# -- stop strings, and text ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_stop_strings_stop_where_hugging_face_stops(
    mode: str, attached: Build, batch: Build
) -> None:
    adapter, inputs = attached("llava"), batch("llava", 1)
    written = adapter.generate(inputs, mode=mode, max_new_tokens=8, do_sample=False).new_tokens[0]
    place, word = spelt(written)
    options = {"max_new_tokens": 8, "do_sample": False, "stop_strings": [word]}
    made = adapter.generate(inputs, mode=mode, tokenizer=bytewise(), **options)
    assert made.new_tokens[0].tolist() == written[: place + 1].tolist()
    if mode != "early_exit":
        stock = adapter.backbone.model.generate(**inputs, tokenizer=bytewise(), **options)
        assert torch.equal(made.sequences, stock)


def test_stop_strings_of_a_generation_config_and_a_processor(attached: Build, batch: Build) -> None:
    from transformers import GenerationConfig

    adapter, inputs = attached("llava"), batch("llava", 1)
    written = adapter.generate(inputs, max_new_tokens=8, do_sample=False).new_tokens[0]
    place, word = spelt(written)
    config = GenerationConfig(max_new_tokens=8, stop_strings=[word])
    processor = type("Processor", (), {"tokenizer": bytewise()})()
    made = adapter.generate(inputs, generation_config=config, processor=processor)
    assert made.new_tokens.shape == (1, place + 1)
    assert config.stop_strings == [word], "the caller's config stays as it was"


def spelt(ids: torch.Tensor) -> tuple[int, str]:
    """Where a token of plain letters first stands among `ids`, and the letters."""
    texts = [bytewise().decode([i]) for i in ids.tolist()]
    return next((n, t) for n, t in enumerate(texts) if t.isascii() and t.isprintable() and t)


def test_stop_strings_without_a_tokenizer_name_the_remedy(attached: Build, batch: Build) -> None:
    with pytest.raises(InputError, match=r"\nAdd tokenizer=processor\.tokenizer"):
        attached("llava").generate(batch("llava", 1), stop_strings=["."], **SOON)


def test_answers_as_text(attached: Build, batch: Build) -> None:
    made = attached("llava").generate(batch("llava", 2), **SOON)
    words = word_level()
    expected = [t.strip() for t in words.batch_decode(made.new_tokens, skip_special_tokens=True)]
    assert made.decode(words) == expected and len(expected) == 2
    assert made.decode(type("Processor", (), {"tokenizer": words})()) == expected


# -- what is shown ------------------------------------------------------------------------------


def test_a_backbone_and_an_adapter_are_one_line(opt: Any) -> None:
    adapter = trained(opt, policy=ExitPolicy({2: 0.5}))
    assert repr(adapter) == (
        f"Adapter(exits at 2, 4 of 6 layers of {opt.name}; thresholds: 0.5 at depth 2; "
        "guarantee: none)"
    )
    trusting = adapter.with_policy(replace(adapter.policy, trust=0.4))
    assert "; trust: 0.4; " in repr(trusting)
    promised = replace(adapter, calibration={"risk": "r", "target": 0.01, "measured": 0.0})
    assert "not guaranteed here: the calibration does not say" in repr(promised)
    kind = type(opt.model).__name__
    assert repr(opt) == f"Backbone({opt.name}: {kind}, 6 layers, width {opt.width}, float32 on cpu)"


# -- a script of transformers', and three lines -------------------------------------------------


def scripts() -> tuple[str, str]:
    """The script in docs/getting-started.md before and after its diff."""
    (diff,) = re.findall(r"```diff\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = diff.splitlines()
    before = [line[1:] for line in lines if not line.startswith("+")]
    after = [line[1:] for line in lines if not line.startswith("-")]
    assert sum(line.startswith("+") for line in lines) <= 3
    assert sum(line.startswith("-") for line in lines) <= 1
    return "\n".join(before), "\n".join(after)


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smolvlm")
    save_smolvlm(folder)
    return folder


@pytest.mark.parametrize("lossless", [True, False])
def test_a_smolvlm_script_changes_three_lines(
    lossless: bool,
    smolvlm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from PIL import Image
    from transformers import AutoModelForImageTextToText

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (50, 40), "red").save("dog.jpg")
    model = AutoModelForImageTextToText.from_pretrained(smolvlm)
    exits = offramp.attach(model, Exits(model, (2,)))
    exits.with_policy(ExitPolicy({2: 0.0}, lossless=lossless)).save_pretrained("exits")
    shown = []
    for script in scripts():
        local = script.replace("HuggingFaceTB/SmolVLM-256M-Instruct", str(smolvlm))
        exec(compile(local, str(PAGE), "exec"), {})
        shown.append(capsys.readouterr().out)
    before, after = shown
    assert "What is in the picture?" in before and "What is in the picture?" in after
    assert (before == after) is lossless  # with a threshold of 0, every token exits at 2 of 6
