"""Properties of the readers of policies and of attempts: what was written comes back, and anything
else is an error in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.calibration.attempts import Attempt
from offramp.core.decoding.policy import ExitPolicy, Thresholds, policy_to_json
from offramp.core.errors import AdapterError
from offramp.core.save_and_load.config import read_policy
from offramp.core.storage import schema
from offramp_llama_cpp.exit_files import known_policy

MANY = settings(max_examples=60, deadline=None)
SHARES = st.floats(0, 1, allow_nan=False)
BY_DEPTH = st.dictionaries(st.integers(1, 40), SHARES, max_size=4)
POLICIES = st.builds(
    ExitPolicy,
    thresholds=BY_DEPTH,
    lossless=st.booleans(),
    max_draft=st.integers(1, 64),
    drafts=BY_DEPTH,
    shortlist=st.booleans(),
    first=st.none() | BY_DEPTH,
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from(["max_probability", "recompute", "2", "02", "-1", "\u0662", "9" * 12]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
FILE = Path("adapter.json")


def readers(values: Any) -> list[ExitPolicy]:
    return [read_policy(values, FILE), known_policy(values, FILE)]


@MANY
@given(POLICIES)
def test_a_policy_comes_back(policy: ExitPolicy) -> None:
    values = json.loads(json.dumps(policy_to_json(policy)))
    assert readers(values) == [policy, policy]


@MANY
@given(POLICIES, st.sampled_from([*policy_to_json(ExitPolicy()), "of tomorrow"]), JSON)
def test_a_policy_with_anything_in_it_is_read_or_refused_in_words(
    policy: ExitPolicy, name: str, value: Any
) -> None:
    values = {**policy_to_json(policy), name: value}
    for read in (lambda: read_policy(values, FILE), lambda: known_policy(values, FILE)):
        try:
            found = read()
        except AdapterError as error:
            assert len(str(error).splitlines()) == 2
            continue
        assert name != "of tomorrow"
        again = json.loads(json.dumps(policy_to_json(found)))
        assert read_policy(again, FILE) == found


ATTEMPTS = st.builds(
    Attempt,
    asked=st.text(max_size=8),
    settings=st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
    number=st.integers(1, 99),
    images=st.lists(st.text(max_size=8), max_size=3).map(tuple),
    path=st.lists(BY_DEPTH.map(Thresholds), max_size=3).map(tuple),
    outcome=st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
    members=st.lists(st.text(max_size=8), max_size=3).map(tuple),
)


def is_attempt(values: Any) -> bool:
    try:
        schema.shaped(values, schema.Attempt)
    except ValueError:
        return False
    return True


@MANY
@given(ATTEMPTS)
def test_an_attempt_comes_back(attempt: Attempt) -> None:
    values = json.loads(json.dumps(attempt.to_json()))
    assert is_attempt(values) and Attempt.from_json(values) == attempt


@MANY
@given(ATTEMPTS, st.sampled_from(["number", "images", "path", "members"]), JSON)
def test_whatever_counts_as_an_attempt_can_be_read(attempt: Attempt, name: str, value: Any) -> None:
    values = json.loads(json.dumps(attempt.to_json()))
    if not isinstance(value, type(values[name])):
        value = [value] if name != "number" else 0
    values[name] = value
    if is_attempt(values):
        assert Attempt.from_json(values).number >= 1
