"""What docs/extending.md shows runs as it stands, and does what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import fakes
import pytest
import torch
from PIL import Image

import offramp
from offramp import Adapter, ExitPolicy, Exits, TrainConfig, cli, generate
from offramp.core.decoding.confidence import FEATURE_SCORES
from offramp.core.decoding.drafting import DRAFTERS
from offramp.core.decoding.scores import SCORES
from offramp.core.errors import AdapterError, InputError
from offramp.core.models.exit_kinds import EXIT_KINDS
from offramp.engines import ENGINES
from offramp.features.input_processor import InputProcessor
from offramp.features.registration import register_exit, register_score
from offramp.promises.conditions import PARTS, RULES, Conditions, differences, register_condition
from offramp.training.losses import LOSSES, register_loss
from offramp.training.trainer import train

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
REGISTRIES: Any = (SCORES, FEATURE_SCORES, EXIT_KINDS, LOSSES, ENGINES, DRAFTERS, RULES, PARTS)
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(autouse=True)
def plugins(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """All blocks run, one after the other, each in names of its own; their names by block."""
    for registry in REGISTRIES:
        for name, value in list(registry.items()):
            monkeypatch.setitem(registry, name, value)
    before = [dict(r) for r in REGISTRIES]
    scopes: dict[str, Any] = {}
    for block in BLOCKS:
        scope: dict[str, Any] = {}
        exec(compile(block, str(PAGE), "exec"), scope)
        scopes |= scope
    yield scopes
    for registry, old in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(old)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_each_block_is_short(block: str) -> None:
    code = [line for line in block.splitlines() if line.strip() and "import" not in line]
    assert len(code) <= 10


def test_a_registered_score_decides_who_exits(plugins, backbone, exits, batch):
    policy = ExitPolicy({2: 0.0001}, score="top_gap")
    made = generate(
        backbone("llava"), batch("llava", 1), exits=exits("llava"), policy=policy, **GREEDY
    )
    assert (made.depths[0, 1:] == 2).all() and (made.scores[0, 1:] > 0).all()


@pytest.mark.parametrize("rows", [1, 3])
def test_a_score_of_the_whole_check_sees_the_position(rows, plugins, backbone, exits, batch):
    policy = ExitPolicy({2: 1e-6}, score="late_and_confident")
    made = generate(
        backbone("llava"),
        batch("llava", rows),
        exits=exits("llava"),
        policy=policy,
        eos_token_id=None,
        **GREEDY,
    )
    full = backbone("llava").depth
    assert made.depths.tolist() == [[full, full, 2, 2, 2, 2]] * rows


@pytest.mark.parametrize("name", ["llava", "blip2-t5"])
@pytest.mark.parametrize("kind", ["mlp", "two_layers"])
def test_a_registered_exit_trains_saves_and_decodes(kind, name, plugins, backbone, tmp_path):
    whole = backbone(name)
    config = TrainConfig(
        depths=(2,),
        exit_kind=kind,
        steps=2,
        batch_size=4,
        evaluate_every=2,
        adversarial=0.0,
        max_new_tokens=5,
        losses={"l1": 0.5},
    )
    processor = fakes.Blip2FakeProcessor(name)
    adapter = train(whole, processor, fakes.examples(12), config, tmp_path)
    assert adapter.exits.modules.kind == kind
    inputs = InputProcessor(whole, processor).prompts(fakes.examples(2))
    greedy = generate(whole, inputs, **GREEDY).sequences
    for policy in (ExitPolicy({2: 1.0}), ExitPolicy({2: 0.1}, lossless=True)):
        assert torch.equal(adapter.generate(inputs, policy=policy, **GREEDY).sequences, greedy)
    early = adapter.generate(inputs, policy=ExitPolicy({2: 0.0}), **GREEDY)
    loaded = Adapter.load(tmp_path, whole)
    again = loaded.generate(inputs, policy=ExitPolicy({2: 0.0}), **GREEDY)
    assert torch.equal(early.sequences, again.sequences) and 2 in early.depths
    del EXIT_KINDS[kind]
    with pytest.raises(AdapterError, match="not registered"):
        Adapter.load(tmp_path, whole)


def test_names_that_are_taken_are_refused(backbone):
    for register in (register_score, register_loss):
        name = "margin" if register is register_score else "l2"
        with pytest.raises(InputError, match="built-in"):
            register(name, lambda x: x)
    with pytest.raises(InputError, match="cannot be registered"):
        register_exit("lens", lambda *_: torch.nn.Identity())
    with pytest.raises(InputError, match="Did you mean 'layer'"):
        Exits(backbone("llava"), (2,), kind="laier")
    with pytest.raises(InputError, match="cannot read 'states'"):
        register_score("mine", lambda x: x, reads="states")


def test_a_registered_condition_is_part_of_what_a_guarantee_is_of(plugins, backbone):
    policy = ExitPolicy({2: 0.9})
    here = Conditions.of(backbone("llava"), policy)
    assert here["my_kernels"] == "1.2"
    known = Conditions.of(backbone("llava"), policy).to_json()
    del known["my_kernels"]  # as one that was calibrated before
    assert differences(Conditions(known), here) == []
    plugins["KERNELS"]["version"] = "1.3"
    now = Conditions.of(backbone("llava"), policy)
    assert differences(here, now) == ["kernels 1.3 for 1.2"]
    with pytest.raises(InputError, match="ships"):
        register_condition("dtype", lambda backbone: "")


def test_a_registered_drafter_drafts(plugins, backbone, batch):
    made = generate(backbone("llava"), batch("llava", 2), policy=plugins["policy"], **GREEDY)
    full = generate(backbone("llava"), batch("llava", 2), **GREEDY)
    assert torch.equal(made.sequences, full.sequences) and made.rounds


def test_a_registered_engine_answers_by_name_in_python_and_on_the_command_line(
    plugins: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = Image.new("RGB", (32, 32), "grey")
    picture.save(tmp_path / "grey.png")
    usual, loaded = offramp.load("tiny-opt"), offramp.load("tiny-opt", engine="timed")
    assert loaded.answer(picture, "Caption:") == usual.answer(picture, "Caption:")
    assert loaded.model.answers == 1
    asked = ["generate", "--adapter", "tiny-opt", "--image", str(tmp_path / "grey.png"), "--engine"]
    assert cli.main([*asked, "timed"]) == 0
    assert cli.main([*asked, "timid"]) == 2
    assert "'timed'" in capsys.readouterr().err
