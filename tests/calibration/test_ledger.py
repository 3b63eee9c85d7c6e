"""Laws of attempts by images: exits that are trained again share the errors of those before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import families
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.adapter.adapter import Adapter
from offramp.calibration.attempts import Attempt, images_of, recorded, turn_of
from offramp.calibration.ledger import ledger_of, merged_attempts, note_attempts, with_ledger
from offramp.common.folders import locked_folder
from offramp.core.errors import DataError, StorageError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Adapter:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    backbone = Backbone(families.build("blip2-opt"))
    return Adapter(backbone, Exits(backbone, (2,)).requires_grad_(False))


def attempt(asked: str, n: int, start: int = 0) -> Attempt:
    images = images_of(fakes.examples(n)[start:])
    members = tuple(sorted({member for image in images for member in image.members}))
    return Attempt(asked, {}, 1, tuple(image.name for image in images), (), {}, members)


def test_a_state_folder_that_is_no_absolute_path_is_left_alone(opt, tmp_path, monkeypatch):
    """Else what was tried would depend on the working folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    assert ledger_of(opt).parent == tmp_path / ".local" / "state" / "offramp"


def test_an_adapter_that_knows_of_none_has_the_attempts_of_others_of_its_model(
    adapter: Adapter,
) -> None:
    first = attempt("exits a", 6)
    with with_ledger(adapter) as before:
        assert list(before.attempts) == []
        note_attempts(adapter.backbone, [first])
    again = replace(adapter, attempts=[])
    with with_ledger(again) as known:
        assert [Attempt.from_json(a) for a in known.attempts] == [first]
    other = Backbone(families.build("blip2-t5"))
    with with_ledger(Adapter(other, Exits(other, (2,)))) as elsewhere:
        assert list(elsewhere.attempts) == []


def test_the_same_asked_of_other_images_is_an_attempt_of_its_own(adapter: Adapter) -> None:
    """Whatever order images are used in, none of the attempts on any of them is forgotten."""
    sets = {"a": (0, 6), "b": (6, 12), "c": (12, 15)}
    taken: list[tuple[str, int]] = []
    for asked, of in (
        ("20%", "a"),
        ("20%", "b"),
        ("21%", "a"),
        ("20%", "c"),
        ("22%", "a"),
        ("21%", "b"),
    ):
        start, end = sets[of]
        images = images_of(fakes.examples(end)[start:])
        with with_ledger(replace(adapter, attempts=[])) as found:
            known = [Attempt.from_json(value) for value in found.attempts]
            turn = turn_of(known, asked, images, any_time=True)
            made = replace(attempt(asked, end, start), number=turn.number)
            note_attempts(adapter.backbone, recorded(known, made, turn.continues))
        taken.append((of, turn.number))
    assert taken == [("a", 1), ("b", 1), ("a", 2), ("c", 1), ("a", 3), ("b", 2)]


def test_an_attempt_that_both_know_counts_once_and_as_the_longer_list(adapter: Adapter) -> None:
    whole = attempt("a", 9)
    short = replace(whole, images=whole.images[:6], members=("a name",))
    with with_ledger(adapter):
        note_attempts(adapter.backbone, [whole])
    with with_ledger(replace(adapter, attempts=[short.to_json()])) as found:
        assert [len(a["images"]) for a in found.attempts] == [9]
        assert "a name" in found.attempts[0]["members"]


def test_two_calibrations_of_one_model_are_not_made_at_once(adapter: Adapter) -> None:
    file = ledger_of(adapter.backbone)
    with (
        locked_folder(file.parent, f"{file.name}.lock"),
        pytest.raises(StorageError, match="calibrated at this moment"),
        with_ledger(adapter),
    ):
        pass


@pytest.mark.parametrize("content", ["{", "3", '[{"asked": 1}]', "[3]"])
def test_a_damaged_list_is_said_and_not_taken_for_an_empty_one(
    adapter: Adapter, content: str
) -> None:
    file = ledger_of(adapter.backbone)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    with pytest.raises(DataError, match="does not list attempts"), with_ledger(adapter):
        pass


def test_where_it_cannot_be_kept_a_calibration_goes_on(
    adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with with_ledger(adapter) as found:
        assert found is adapter
    assert "not known" in caplog.text


def test_a_link_in_the_ledgers_place_is_replaced(adapter: Adapter, tmp_path: Path) -> None:
    file, system = ledger_of(adapter.backbone), tmp_path / "system"
    file.parent.mkdir(parents=True)
    system.write_text("the system's")
    file.symlink_to(system)
    note_attempts(adapter.backbone, [attempt("exits a", 6)])
    assert system.read_text() == "the system's" and not file.is_symlink() and file.is_file()


RECORDS = st.lists(
    st.builds(
        Attempt,
        asked=st.sampled_from("ab"),
        settings=st.just({}),
        number=st.integers(1, 2),
        images=st.lists(st.sampled_from("xyz"), max_size=3, unique=True).map(tuple),
        path=st.just(()),
        outcome=st.just({}),
        members=st.lists(st.sampled_from("mn"), unique=True).map(tuple),
    ),
    max_size=6,
)


@given(own=RECORDS, others=RECORDS)
def test_of_any_records_those_that_differ_all_survive(
    own: list[Attempt], others: list[Attempt]
) -> None:
    told = [[each.to_json() for each in records] for records in (own, others)]
    kept = [Attempt.from_json(value) for value in merged_attempts(*told)]
    for one in (*own, *others):
        assert any(
            (one.asked, one.number) == (it.asked, it.number)
            and it.images[: len(one.images)] == one.images
            and {*one.members} <= {*it.members}
            for it in kept
        )
    twice = [each.to_json() for each in kept]
    assert len(merged_attempts(twice, twice)) == len(kept)
