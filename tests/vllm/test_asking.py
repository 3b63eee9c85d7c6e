"""`offramp calibrate NAME --engine vllm`; a server that answers by offramp stands in its place."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import RunCommand
from other_python import python_with_vllm

import offramp
from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import generate_answers
from offramp.adapter.shipped import load_tiny, shipped_exits
from offramp.calibration.trust_path import trusting
from offramp.core.decoding.policy import FULL, ExitPolicy
from offramp.core.models.exits import Exits, ExitSet
from offramp.data.scenes import tasks, world
from offramp_vllm import tell
from offramp_vllm.exports import asking, serving

STAND_IN = Path(__file__).parents[1] / "helpers" / "vllm_stand_in.py"
HERE = {"engine": "vllm", "dtype": "float32", "quantized": "", "device": "cpu"}


def calibrated(
    run: RunCommand, tmp_path: Path, engine: str, *more: Any, of: Any = "tiny-opt"
) -> tuple[int, Any, str]:
    pictures, out = tmp_path / "held_out", tmp_path / engine
    pictures.mkdir(exist_ok=True)
    for index in range(16):
        world.render(world.scene("calibration", index)).save(pictures / f"{index}.png")
    code, said, err = run(
        *("calibrate", of, "--engine", engine, "--data", pictures, "--prompt", "Caption:"),
        *("--target", 0.4, "--max-new-tokens", 8, "--out", out, "--json", *more),
    )
    return code, json.loads(said) if code == 0 else said, err


@pytest.fixture
def stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Starts in vLLM's place, and lets the log tell what comes next."""
    program = f'exec {sys.executable} {STAND_IN} "$@"\n'
    monkeypatch.setenv(serving.PYTHON, str(python_with_vllm(tmp_path / "python", program)))
    caplog.set_level("INFO", "offramp")


@pytest.mark.slow
def test_a_server_is_calibrated_as_its_answers_are(
    run: RunCommand, stand_in: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    levels = ("--thresholds", 0.9, 0.5)
    code, served, err = calibrated(run, tmp_path, "vllm", *levels)
    assert code == 0, err
    assert f"offramp serve {tmp_path / 'vllm'} --engine vllm --mode early_exit" in caplog.text
    assert "offramp generate" not in caplog.text
    _, own, _ = calibrated(run, tmp_path, "torch", *levels, "--score", "max_probability")
    for name in ("measured", "n", "answers"):  # the bound is a second attempt's
        assert served[name] == own[name], name
    assert served["policy"]["thresholds"] == own["policy"]["thresholds"] != {}
    adapter = json.loads((tmp_path / "vllm" / "adapter.json").read_text())
    [stands] = tell.guarantees([adapter["calibration"]], adapter["policy"], HERE)
    assert stands.reason == ""
    [elsewhere] = tell.guarantees([own], adapter["policy"], HERE)
    assert "engine" in elsewhere.reason


@pytest.mark.slow
def test_a_server_answers_by_trust_and_offers_as_the_exits_do(
    stand_in: None, drafting_exits: Path
) -> None:
    opened = offramp.load(drafting_exits, backbone="tiny-opt", engine="torch")
    asked = Namespace(score=None, first_threshold=None, context=256, max_new_tokens=24)
    examples = tasks.captions("calibration", 6).examples
    policy = trusting(opened.adapter.policy, opened.adapter, 24)
    ways = (policy, replace(policy, trust=0.0), replace(policy, lossless=True, trust=None), FULL)
    with asking.asks(opened, asked) as server:
        assert server.drafts
        for way in ways:
            told = server.answers(examples, way, max_new_tokens=24)
            own = generate_answers(
                opened.adapter, opened.encoder, examples, policy=way, max_new_tokens=24
            )
            for ours, theirs in zip(own, told, strict=True):
                assert (ours.ids, ours.depths) == (theirs.ids, theirs.depths)
                assert [ids for _, ids in ours.offers] == [ids for _, ids in theirs.offers]
                products = pytest.approx([product for product, _ in ours.offers], rel=1e-4)
                assert [product for product, _ in theirs.offers] == products


@pytest.fixture
def drafting_exits(tmp_path: Path) -> Path:
    """The folder of tiny OPT's first exit, untrained to draft on, and without a policy."""
    backbone, _ = load_tiny("opt")
    plain = Adapter.from_pretrained(backbone, str(shipped_exits("tiny-opt")))
    depth = plain.exits.depths[0]
    exits = Exits(backbone, (depth,), kind="drafting")
    exits.load_state_dict(
        {n: w for n, w in plain.exits.modules.state_dict().items() if n in exits.state_dict()},
        strict=False,
    )
    adapter = Adapter(
        backbone, ExitSet(exits.requires_grad_(False)), ExitPolicy(drafts={depth: 0.1})
    )
    adapter.save(tmp_path / "drafting")
    return tmp_path / "drafting"


@pytest.mark.slow
def test_where_nothing_is_guaranteed_a_server_drafts_losslessly(
    run: RunCommand, stand_in: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code, found, _ = calibrated(run, tmp_path, "vllm", "--target", 0.001)
    assert code == 0 and "images" in found["reason"]
    assert "next: offramp serve tiny-opt --engine vllm" in caplog.text


@pytest.mark.slow
def test_a_server_whose_exits_are_off_is_not_calibrated(
    run: RunCommand, stand_in: None, tmp_path: Path
) -> None:
    (tmp_path / "off").touch()
    code, _, err = calibrated(run, tmp_path, "vllm")
    assert code == 1
    assert "switched the exits off" in err and "too few" in err


def test_a_server_that_does_not_start_says_why(
    run: RunCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = python_with_vllm(tmp_path / "python", "echo no memory >&2; exit 1\n")
    monkeypatch.setenv(serving.PYTHON, str(python))
    code, _, err = calibrated(run, tmp_path, "vllm")
    assert code == 1
    assert "vLLM did not start: no memory" in err


@pytest.mark.parametrize("option", [("--first-threshold", 0.5), ("--score", "entropy")])
def test_what_a_server_does_not_tell_is_not_calibrated(
    option: tuple[Any, ...], run: RunCommand, tmp_path: Path
) -> None:
    code, _, err = calibrated(run, tmp_path, "vllm", *option)
    assert code == 1
    assert "one threshold of max_probability" in err


def test_other_commands_do_not_ask_a_server(run: RunCommand) -> None:
    code, _, err = run("generate", "tiny-opt", "--engine", "vllm")
    assert code == 1
    assert "offramp serve NAME --engine vllm" in err
