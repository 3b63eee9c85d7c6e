"""Laws of attempts by images: exits that are trained again share the errors of those before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import families
import pytest

from offramp.adapter.adapter import Adapter
from offramp.calibration.attempts import Attempt, images_of
from offramp.calibration.ledger import ledger_of, note_attempts, with_ledger
from offramp.core.errors import DataError, StorageError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits
from offramp.core.storage.folders import locked_folder


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Adapter:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    backbone = Backbone(families.build("blip2-opt"))
    return Adapter(backbone, Exits(backbone, (2,)).requires_grad_(False))


def attempt(asked: str, n: int) -> Attempt:
    names = tuple(image.name for image in images_of(fakes.examples(n)))
    return Attempt(asked, {}, 1, names, (), {})


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


def test_an_attempt_that_both_know_counts_once_and_as_the_longer_list(adapter: Adapter) -> None:
    short, whole = attempt("a", 6), attempt("a", 9)
    with with_ledger(adapter):
        note_attempts(adapter.backbone, [whole])
    with with_ledger(replace(adapter, attempts=[short.to_json()])) as found:
        assert [len(a["images"]) for a in found.attempts] == [9]


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
