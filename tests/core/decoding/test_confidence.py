"""Laws of the scores: in [0, 1], larger is safer, finite in any precision."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from offramp.core.decoding import scores
from offramp.core.decoding.confidence import check_score, check_thresholds
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.decoding.scores import SCORES
from offramp.core.errors import InputError
from offramp.features import registration
from offramp.features.registration import register_score

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def slow(name, row):
    """The score of one row of logits, in plain Python floats."""
    top = max(row)
    weights = [math.exp(x - top) for x in row]
    p = sorted((w / sum(weights) for w in weights), reverse=True)
    if name == "max_probability":
        return p[0]
    if name == "margin":
        return p[0] - p[1]
    return 1.0 + sum(x * math.log(x) for x in p if x > 0) / math.log(len(p))


def logits(dtype=torch.float32, scale=4.0):
    return (scale * torch.randn(16, 50)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCORES)
def test_a_score_equals_its_slow_loop(name, dtype):
    given = logits(DTYPES[dtype])
    expected = torch.tensor([slow(name, row) for row in given.tolist()])
    assert torch.allclose(SCORES[name](given), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0, 60000.0])
@pytest.mark.parametrize("name", SCORES)
def test_a_score_is_finite_and_in_range_at_any_scale(name, scale, dtype):
    found = SCORES[name](logits(DTYPES[dtype], scale).clamp(-60000, 60000))
    assert found.shape == (16,)
    assert ((found >= 0) & (found <= 1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCORES)
def test_forbidden_tokens_do_not_spoil_a_score(name, dtype):
    given = logits(DTYPES[dtype])
    given[:, ::3] = -math.inf
    expected = torch.tensor([slow(name, row) for row in given.tolist()])
    assert torch.allclose(SCORES[name](given), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCORES)
def test_a_single_allowed_token_is_certain(name, dtype):
    given = torch.full((1, 50), -math.inf, dtype=DTYPES[dtype])
    given[0, 3] = 1.0
    assert SCORES[name](given).item() == pytest.approx(1.0)


@pytest.mark.parametrize("name", SCORES)
def test_the_more_one_token_stands_out_the_larger_the_score(name):
    given = torch.zeros(20, 50)
    given[:, 7] = torch.linspace(0, 10, 20)
    assert (SCORES[name](given).diff() > 0).all()


@pytest.mark.parametrize("name", ["margin", "entropy"])
def test_a_uniform_row_scores_zero(name):
    assert SCORES[name](torch.zeros(1, 50)).item() == pytest.approx(0.0, abs=1e-6)


# -- names and thresholds --------------------------------------------------------------


@pytest.mark.parametrize("name", ["max_probabilty", "", None])
def test_an_unknown_score_is_refused_with_the_names_there_are(name):
    with pytest.raises(InputError, match="max_probability"):
        check_score(name)


@pytest.mark.parametrize("name", [*SCORES])
def test_the_known_scores_are_accepted(name):
    assert check_score(name) == name


def test_a_score_added_to_the_table_is_known(monkeypatch):
    monkeypatch.setitem(SCORES, "mine", scores.margin)
    assert check_score("mine") == "mine"


@pytest.mark.parametrize(
    ("gives", "said"),
    [
        (lambda logits: logits.amax(), "shape"),
        (lambda logits: logits.softmax(-1), "shape"),
        (lambda _: 0.5, "float"),
        (lambda _: None, "NoneType"),
        (lambda logits: logits.amax(-1) + 1.5, "outside"),
        (lambda logits: logits.amax(-1) * math.nan, "outside"),
    ],
)
def test_a_registered_score_that_gives_no_scores_is_refused_by_its_name(gives, said, monkeypatch):
    for reads, registry in registration._REGISTRIES.items():
        monkeypatch.setitem(registry, "mine", None)
        register_score("mine", gives if reads == "logits" else READING[reads](gives), reads=reads)
        with pytest.raises(InputError, match=f"'mine' gave.*{said}"):
            SCORED[reads](registry["mine"], torch.zeros(2, 5))


READING = {"check": lambda gives: lambda check: gives(check.entry)}
SCORED = {
    "logits": lambda score, logits: score(logits),
    "check": lambda score, logits: score(SimpleNamespace(entry=logits)),
}


def test_a_registered_score_is_looked_at_once(monkeypatch):
    """At each token it would wait for a GPU."""
    given = iter([torch.ones(2), torch.full((2,), 7.0)])
    monkeypatch.setitem(SCORES, "mine", None)
    register_score("mine", lambda logits: next(given))
    assert SCORES["mine"](torch.zeros(2, 5)).tolist() == [1.0, 1.0]
    assert SCORES["mine"](torch.zeros(2, 5)).tolist() == [7.0, 7.0]


@pytest.mark.parametrize("value", ["0.9", "high", [1], math.nan])
@pytest.mark.parametrize("name", ["thresholds", "first", "drafts"])
def test_a_policy_of_what_is_no_number_is_refused_when_it_is_made(name, value):
    with pytest.raises(InputError, match="number"):
        ExitPolicy(**{name: {2: value}})


@pytest.mark.parametrize("value", [-0.01, 1.01, math.inf])
def test_a_threshold_outside_its_range_is_refused(value):
    with pytest.raises(InputError, match="outside"):
        check_thresholds({2: value}, (2, 4))


def test_a_threshold_where_no_exit_stands_is_refused():
    with pytest.raises(InputError, match=r"\[3\]"):
        check_thresholds({2: 0.5, 3: 0.5}, (2, 4))


def test_none_switches_an_exit_off():
    assert check_thresholds({4: 1, 2: None}, (2, 4)) == {4: 1.0}
