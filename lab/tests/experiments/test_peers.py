"""Laws of the race between exits and what else there is."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from offramp.adapter import Adapter
from offramp.engine.policy import FULL, ExitPolicy
from offramp.errors import InputError
from offramp.evaluation.timing import Timing
from offramp.models.exits import Exits
from offramp_lab.experiments.benchmark import peers
from offramp_lab.experiments.benchmark.peers import table, time_peers
from offramp_lab.experiments.drawing import speeds
from offramp_lab.inputs.shapes import shape

NAMES = [
    "full", "generate", "assistant_early_exit", "prompt_lookup", "assisted", "truncation",
    "early_exit", "lossless",
]  # fmt: skip
OPTIONS = {"max_new_tokens": 6, "eos_token_id": None}


def adapter(name: str, threshold: float = 1.0) -> tuple[Adapter, list[dict[str, Any]]]:
    backbone = shape(name).build()
    exits = Exits(backbone, (2,)).requires_grad_(False)
    inputs = [shape(name).inputs(backbone, words=6, seed=s) for s in range(2)]
    return Adapter(backbone, exits, ExitPolicy({2: threshold})), inputs


@pytest.fixture(scope="module")
def raced() -> dict[str, Any]:
    some, inputs = adapter("mini-llava")
    draft = shape("mini-llava").build().model
    return time_peers(some, inputs, draft=draft, rounds=1, **OPTIONS)


@pytest.fixture(scope="module")
def without_draft() -> tuple[Adapter, dict[str, Any]]:
    """An OPT that every token exits at the exit, and its race."""
    some, inputs = adapter("mini-opt", threshold=0.0)
    return some, time_peers(some, inputs[:1], rounds=1, **OPTIONS)


def test_every_peer_is_listed(raced: dict[str, Any]) -> None:
    assert list(raced) == NAMES


def test_peers_that_must_write_what_the_full_model_writes_do(raced: dict[str, Any]) -> None:
    for name in ("full", "generate", "prompt_lookup", "assisted", "lossless"):
        assert raced[name]["identical"] == 1.0, name


def test_full_depth_is_what_speed_is_measured_in(raced: dict[str, Any]) -> None:
    assert raced["full"]["speedup_decode"] == raced["full"]["speedup_end_to_end"] == 1.0
    for name, found in raced.items():
        if "not_applicable" not in found:
            assert found["speedup_decode"] > 0 and found["speedup_end_to_end"] > 0, name


def test_the_plot_shows_every_peer_that_ran_and_its_speed(raced: dict[str, Any]) -> None:
    svg = speeds({"mini-llava": raced})
    for name, found in raced.items():
        assert (name in svg) == ("speedup_decode" in found)
        assert "not_applicable" in found or f"{found['speedup_decode']:.2f}" in svg


def test_what_the_backbone_cannot_run_is_listed_with_the_reason(raced: dict[str, Any]) -> None:
    assert "num_hidden_layers" in raced["assistant_early_exit"]["not_applicable"]
    assert raced["assistant_early_exit"]["not_applicable"] in table(raced)


def test_without_a_draft_model_there_is_no_assisted_generation(without_draft: Any) -> None:
    assert "No smaller model" in without_draft[1]["assisted"]["not_applicable"]


def test_a_peer_that_fails_leaves_the_model_as_it_was(without_draft: Any) -> None:
    """HF's early exit sets the number of layers in OPT's config, and fails before it resets it."""
    some, raced = without_draft
    assert "IndexError" in raced["assistant_early_exit"]["not_applicable"]
    assert some.backbone.text_config.num_hidden_layers == 8


def test_truncation_runs_as_deep_as_the_exits_do_on_average(without_draft: Any) -> None:
    """All six tokens ran 2 layers, the first too."""
    assert without_draft[1]["truncation"]["setting"] == "depth 2"


def test_knobs_are_set_to_what_is_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = Timing([3.0], [3.0], [(1,)]), Timing([2.0], [2.0], [(1,)])
    monkeypatch.setattr(peers, "time_interleaved", lambda *_, **__: {"a": slow, "b": fast})
    assert peers._fastest({"a": None, "b": None}, []) == "b"  # type: ignore[dict-item]


def test_decoding_of_a_bursting_peer_is_what_the_stock_prefill_leaves() -> None:
    timings = {
        "full": Timing([12.0], [10.0], [(1, 2, 3)]),
        "generate": Timing([14.0], [11.0], [(1, 2, 3)]),
        "lookup": Timing([8.0], [1.0], [(1, 2, 3)]),
    }
    speeds = peers._speeds(timings, ["lookup"])
    assert speeds["lookup"]["speedup_decode"] == pytest.approx(10 / (8 - 3))
    assert speeds["generate"]["speedup_decode"] == pytest.approx(10 / 11)


def test_decoding_speed_is_per_token() -> None:
    timings = {
        "full": Timing([12.0], [10.0], [(1, 2, 3)]),
        "generate": Timing([12.0], [10.0], [(1, 2, 3)]),
        "other": Timing([22.0], [20.0], [(1, 2, 3, 4, 5)]),
    }
    found = peers._speeds(timings, [])["other"]
    assert found["speedup_decode"] == pytest.approx(1.0)
    assert found["identical"] == 0.0


def test_nothing_to_race_is_refused() -> None:
    some, inputs = adapter("mini-opt")
    with pytest.raises(InputError, match="no prompts"):
        time_peers(some, [])
    with pytest.raises(InputError, match="exits are all off"):
        time_peers(some.with_policy(ExitPolicy()), inputs)


def test_lossless_drafts_by_the_adapters_own_shortlist_and_score(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is timed is the head that `offramp draft` would choose thresholds for."""
    some, inputs = adapter("mini-opt", threshold=0.5)
    ids = torch.arange(5, 45)
    exits = replace(some.exits, shortlist=ids)
    some = replace(some, exits=exits, policy=replace(some.policy, shortlist=True, score="margin"))
    drafted: list[ExitPolicy] = []
    timed = peers.exit_generate_fn

    def spy(*given: Any, policy: ExitPolicy = FULL, **options: Any) -> Any:
        drafted.append(policy)
        return timed(*given, **({"policy": policy} if len(given) < 3 else {}), **options)

    monkeypatch.setattr(peers, "exit_generate_fn", spy)
    time_peers(some, inputs[:1], rounds=1, **OPTIONS)
    lossless = [policy for policy in drafted if policy.lossless]
    assert lossless
    assert all(policy.shortlist and policy.score == "margin" for policy in lossless)
