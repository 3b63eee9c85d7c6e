"""Laws of the engine's benchmark: the script holds, and each case is told whole."""

from __future__ import annotations

from functools import partial

import pytest

from offramp.engine.decoding.decoder import Decoder
from offramp.engine.decoding.scheduler import Schedule
from offramp.engine.policy import ExitPolicy
from offramp.errors import InputError
from offramp.models.exits import Exits, ExitSet
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Request
from offramp.storage import read_json
from offramp_lab import cli
from offramp_lab.experiments.benchmark.engine_bench import (
    EngineCase,
    bench_engine,
    predict_case,
    run_case,
    table,
)
from offramp_lab.experiments.benchmark.scripted_reader import ScriptedReader, drawn
from offramp_lab.experiments.benchmark.unit_costs import CallCosts, seconds
from offramp_lab.inputs.shapes import shape

CONFIG = EngineConfig(slots=3, limit=128, schedule=Schedule.of(3))


@pytest.fixture(scope="module")
def mini():
    known = shape("mini-opt")
    backbone = known.build()
    exits = Exits(backbone, (2,)).requires_grad_(False)
    return backbone, ExitSet.of(exits), known.inputs(backbone, words=4)


def test_tokens_exit_and_guesses_are_right_as_the_script_says(mini):
    backbone, exits, inputs = mini
    found = {}
    for right in (0.0, 1.0):
        reader = partial(ScriptedReader, says=drawn(0.6, right))
        core = EngineCore(backbone, exits, ExitPolicy({2: 0.5}), CONFIG, make_reader=reader)
        options = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None}
        handles = [core.add(Request(inputs, "early_exit", options=options)) for _ in range(3)]
        core.run()
        depths = [d for h in handles for d in h.result().output.depths[0, 1:].tolist()]
        assert sum(d == 2 for d in depths) / len(depths) == pytest.approx(0.6, abs=0.12)
        found[right] = core.calls["feed"]
    assert found[1.0] < found[0.0]  # nothing falls with a guess that is right


def test_each_case_is_predicted_measured_and_shown(mini):
    backbone, exits, inputs = mini
    cases = [EngineCase("early_exit", 0.75, 0.7), EngineCase("lossless", right=0.9)]
    costs, entries = bench_engine(backbone, exits, inputs, cases, CONFIG, rounds=1, lengths=(6, 9))
    assert [e["mode"] for e in entries] == ["full", "early_exit", "lossless"]
    for e in entries:
        assert min(e["predicted"], e["measured"], e["against_static"]) > 0
        assert e["p50"] <= e["p95"] <= e["p99"]
    shown = table(costs, entries)
    assert all(e["name"] in shown for e in entries)


@pytest.mark.parametrize(
    "case",
    [
        EngineCase("early_exit", 0.75, 0.7),
        EngineCase("early_exit", 0.75, guess=False),
        EngineCase("lossless", right=0.9),
    ],
    ids=lambda case: case.label,
)
def test_the_simulator_makes_the_calls_that_the_engine_makes(mini, case, monkeypatch):
    backbone, exits, inputs = mini
    costs = CallCosts(3, 0, ((1, 1.0),), ((1, 3.0), (20, 5.0)), ((1, 0.5),), ((1, 7.0),), 1.0)
    now = 0.0

    def taking(made, kind):
        def call(decoder, **more):
            nonlocal now
            asks = any(sequence.asked for sequence in decoder.sequences)
            tokens = made(decoder, **more)
            now += seconds(getattr(costs, kind), tokens) + 0.5 * (kind == "deep" and asks)
            return tokens

        return call

    for kind in ("feed", "deep", "full"):
        monkeypatch.setattr(Decoder, kind, taking(getattr(Decoder, kind), kind))
    measured = run_case(backbone, exits, inputs, case, CONFIG, (6, 12), seed=3, clock=lambda: now)
    predicted = predict_case(costs, case, CONFIG, (6, 12), seed=3)
    assert measured.tokens_per_second == pytest.approx(predicted.tokens_per_second)


def test_the_command_writes_what_it_shows(tmp_path, capsys):
    out = tmp_path / "engine.json"
    arguments = [
        "bench", "--batch-engine", "--shape", "mini-opt", "--dtype", "float32", "--slots", "2",
        "--lengths", "3", "4", "--rates", "0.9", "--acceptance", "--rounds", "1", "--out", str(out),
    ]  # fmt: skip
    assert not cli.main(arguments)
    shown, written = capsys.readouterr().out, read_json(out)
    assert [entry["mode"] for entry in written["entries"]] == ["full", "early_exit"]
    assert all(entry["name"] in shown for entry in written["entries"])
    assert written["costs"]["slots"] == 2


def test_a_case_out_of_range_is_refused():
    with pytest.raises(InputError):
        EngineCase("early_exit", 1.5)
