"""Attempts at a guarantee by images, beside those that an adapter keeps.

Exits that are trained again and calibrated on the same images are one more attempt on these, though
the new adapter knows of none. So attempts are also kept by model, in a file of the machine's user,
and all that share an image share one error budget (`offramp.calibration.attempts`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from offramp.adapter.adapter import Adapter
from offramp.calibration.attempts import Attempt
from offramp.common.folders import check_writable, locked_folder, user_folder
from offramp.core.errors import DataError, StorageError
from offramp.core.models.backbone import Backbone
from offramp.core.storage import digest_rows, read_json, schema, write_json

log = logging.getLogger(__name__)

_LARGEST = 2**28
"""Bytes of the largest file that is read."""


def ledger_of(backbone: Backbone) -> Path:
    """Return the ledger file of a model, named by what its precision and folder do not change."""
    base = user_folder("XDG_STATE_HOME", ".local/state")
    kinds = [config.model_type for config in (backbone.model.config, backbone.text_config)]
    sizes = [*kinds, backbone.depth, backbone.width, backbone.vocabulary]
    return base / "offramp" / f"attempts-{digest_rows([sizes])[:16]}.json"


@contextmanager
def with_ledger(adapter: Adapter) -> Iterator[Adapter]:
    """Yield the adapter with the attempts of other adapters of its model on this machine. The
    ledger is locked meanwhile.

    Raises:
        DataError: the file is damaged. StorageError: another calibration of this model runs.
    """
    file = ledger_of(adapter.backbone)
    try:
        check_writable(file)
    except StorageError as error:
        log.warning("Attempts of other adapters are not known: %s", error.problem)
        yield adapter
        return
    held = ExitStack()
    try:
        held.enter_context(locked_folder(file.parent, f"{file.name}.lock"))
    except StorageError as error:
        raise StorageError(
            "Other exits of this model are calibrated at this moment, on images that may be the "
            "same.",
            "Wait until that has ended: of two at once it is not known which is the first.",
        ) from error
    with held:
        yield replace(adapter, attempts=merged_attempts(adapter.attempts, _read(file)))


def note_attempts(backbone: Backbone, attempts: Sequence[Attempt]) -> None:
    """Add new attempts to the ledger, inside `with_ledger`. A failed write is only reported."""
    file = ledger_of(backbone)
    try:
        write_json(file, [attempt.to_json() for attempt in attempts], follow=False)
    except StorageError as error:
        log.warning("The attempt is kept in the adapter alone: %s", error.problem)


def _read(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    try:
        found = read_json(file, largest=_LARGEST, unique=True)
        schema.shaped(found, schema.Attempts)
        return [Attempt.from_json(value).to_json() for value in found]
    except (DataError, ValueError) as error:
        raise DataError(
            f"{file} does not list attempts, so it is not known which were made.",
            "Restore the file; without it each adapter's attempts are counted alone.",
        ) from error


def merged_attempts(own: Sequence[Any], others: Sequence[Any]) -> list[dict[str, Any]]:
    """Return each attempt once. Two records are of one attempt where the question is equal and one
    list of images begins the other; on other images they are different attempts."""
    known: list[Attempt] = []
    for value in [*others, *own]:
        attempt = Attempt.from_json(value)
        same = next((before for before in known if before.is_part_of(attempt)), None)
        if same is None:
            known.append(attempt)
        else:
            known[known.index(same)] = same.joined(attempt)
    return [attempt.to_json() for attempt in known]
