"""Laws of simulated guarantees: what the rules are for is shown, small, in every record."""

from __future__ import annotations

from offramp_lab.records import simulated, watched


def test_rules_keep_what_was_broken_without_them() -> None:
    found = simulated.simulate(trials=60)
    for row in [*found["lookalikes"], found["still_merged"], found["choices"]]:
        assert row["broken_now"] <= 0.15 < row["broken_before"] + 0.1
    assert found["lookalikes"][0]["broken_before"] > 0.5
    assert (
        found["unequal_rows"]["passed_by_image"] > 0.5 > found["unequal_rows"]["passed_by_answer"]
    )
    assert all(row["broken"] <= 0.15 for row in found["boundary"])
    names = ("rare_groups", "forgotten", "handed", "kinds", "two_steps", "grown")
    for row in [*found["groups"], *map(found.get, names)]:
        assert row["interval"][0] <= 0.05 and row["broken"] <= 0.15
    assert all(row["more"] <= 0.1 for row in found["needed"])


def test_a_watch_sees_what_exits_doubted() -> None:
    answers = watched.DOUBTS["a twentieth holds 90%"]
    delays = watched.active("", answers, 20, 1_000)["delays"]["3"]
    assert delays["active"]["median_images"] < delays["uniform"]["median_images"] / 2
    found = watched.judged(20, 400)
    assert found["false_alarms"] <= 0.1 and found["delays"]["4"]["noticed"] > 0.9
