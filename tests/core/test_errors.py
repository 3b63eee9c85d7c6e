"""What every error of offramp guarantees its reader."""

import pickle

import pytest

from offramp.core import errors

CLASSES = [
    (errors.OfframpError, Exception),
    (errors.InputError, ValueError),
    (errors.DataError, ValueError),
    (errors.AdapterError, ValueError),
    (errors.UnsupportedBackboneError, TypeError),
    (errors.TrainingError, RuntimeError),
    (errors.StorageError, OSError),
]


@pytest.mark.parametrize("kind", [kind for kind, _ in CLASSES])
def test_an_error_reads_as_problem_then_remedy(kind: type[errors.OfframpError]) -> None:
    assert str(kind("The disk is full.", "Free some space.")) == (
        "The disk is full.\nFree some space."
    )


@pytest.mark.parametrize(("kind", "builtin"), CLASSES)
def test_an_error_is_caught_by_its_builtin(
    kind: type[errors.OfframpError], builtin: type[Exception]
) -> None:
    with pytest.raises(builtin):
        raise kind("problem", "remedy")


@pytest.mark.parametrize("kind", [kind for kind, _ in CLASSES])
def test_an_error_survives_the_way_back_from_a_worker_process(
    kind: type[errors.OfframpError],
) -> None:
    back = pickle.loads(pickle.dumps(kind("problem", "remedy")))
    assert (type(back), back.problem, back.remedy) == (kind, "problem", "remedy")


def test_a_message_of_another_library_cannot_add_lines() -> None:
    error = errors.DataError("first\n\n  second\r\nthird", "one\ntwo")
    assert str(error) == "first second third\none two"


def test_did_you_mean_names_the_closest_word_and_all_allowed() -> None:
    assert errors.did_you_mean("tt5", ["opt", "t5"]) == "Did you mean 't5'? Allowed: opt, t5."


def test_did_you_mean_ignores_case_but_answers_as_written() -> None:
    assert errors.did_you_mean("OPT", ["Opt", "t5"]).startswith("Did you mean 'Opt'?")


def test_did_you_mean_does_not_guess_wildly() -> None:
    assert errors.did_you_mean("zebra", ["opt", "t5"]) == "Allowed: opt, t5."


def test_did_you_mean_says_nothing_where_nothing_is_allowed() -> None:
    assert errors.did_you_mean("opt", []) == ""
