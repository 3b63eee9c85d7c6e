"""Exported segments on disk: whose they are, and whether they are whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.core.errors import AdapterError, OfframpError
from offramp.core.storage import digest_file, read_json
from offramp_llama_cpp.exit_files import digest_of
from offramp_llama_cpp.gguf_header import read_header

if TYPE_CHECKING:
    from offramp.adapter.adapter import Adapter

FORMAT = 2
DIGESTS = "digests.json"
DRAFTER, DRAFT_INPUT = "drafter.gguf", "drafter.npz"
"""The layer of the exit that drafts on, and what enters it there."""
PROJECTOR = "mmproj.gguf"
"""The vision tower and projector."""
_AGAIN = "Export them again: offramp export FOLDER --gguf q8_0 --out FOLDER."


@dataclass(frozen=True)
class SegmentFiles:
    """The files of an export, in order, and what their metadata says.

    digests: SHA-256 of each. depths: of the exits. cuts: the first decoder layer of each segment,
    and the number of layers. shortlist: token ids [S] of the exits' heads; None: all. formats: of
    layers, exits and head. said: all that offramp wrote into the first file, by key. drafter: of
    the deepest exit, where it drafts on; its digest is the last one.
    """

    files: tuple[Path, ...]
    digests: tuple[str, ...]
    depths: tuple[int, ...]
    cuts: tuple[int, ...]
    shortlist: tuple[int, ...] | None
    formats: dict[str, str]
    said: dict[str, Any]
    drafter: Path | None = None

    @property
    def taps(self) -> list[tuple[Path, int | None]]:
        """Return each file, and the layer in it whose output the next one is fed with; None: no
        one's."""
        layers = [stop - start - 1 for start, stop in pairwise(self.cuts)]
        return [*zip(self.files, [*layers[:-1], None], strict=True)]


def read_segments(
    folder: str | Path, adapter: Adapter | None = None, *, check_digests: bool = True
) -> SegmentFiles:
    """Return what `export_gguf` or `slice_gguf` wrote into `folder`.

    adapter: that it was written of; None: it is not compared. check_digests: read the files
    through and compare their SHA-256.

    Raises:
        AdapterError: there is no export, a file is damaged, or it is of another adapter.
    """
    folder = Path(folder)
    files, digests, drafts = _whole_files(folder, check_digests)
    about = [_metadata(file) for file in files]
    _check_together(folder, about)
    if adapter is not None:
        _check_kinship(folder, about[0], adapter)
    depths = tuple(about[0]["offramp.depths"])
    shortlist = about[0].get("offramp.shortlist")
    return SegmentFiles(
        files,
        digests,
        depths,
        (0, *depths, int(about[0]["offramp.layers"])),
        None if shortlist is None else tuple(shortlist),
        json.loads(about[0]["offramp.formats"]),
        about[0],
        folder / DRAFTER if drafts else None,
    )


def _whole_files(
    folder: Path, check_digests: bool
) -> tuple[tuple[Path, ...], tuple[str, ...], bool]:
    """The segments, the digests that llama.cpp's files were written with, and whether one drafts
    on."""
    if not (folder / DIGESTS).is_file():
        raise AdapterError(f"{folder} holds no exported segments ({DIGESTS} is missing).", _AGAIN)
    try:
        digests: dict[str, str] = dict(read_json(folder / DIGESTS))
        drafts = {DRAFTER, DRAFT_INPUT} <= set(digests)
        others = {DRAFTER, DRAFT_INPUT, PROJECTOR} & set(digests)
        names = [f"segment-{place}.gguf" for place in range(len(digests) - len(others))]
        damaged = [
            name
            for name in (*names, *([DRAFTER, DRAFT_INPUT] if drafts else []))
            if not (folder / name).is_file()
            or (check_digests and digest_file(folder / name) != digests[name])
        ]
    except (OfframpError, KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{folder / DIGESTS} is damaged.", _AGAIN) from error
    if damaged or len(names) < 2:
        raise AdapterError(f"{folder / (damaged or [DIGESTS])[0]} is damaged or missing.", _AGAIN)
    loaded = [*names, *([DRAFTER] if drafts else [])]
    return tuple(folder / name for name in names), tuple(str(digests[n]) for n in loaded), drafts


def whole_projector(folder: Path) -> Path:
    """The vision tower that was exported into `folder`.

    Raises:
        AdapterError: there is none, or it is damaged.
    """
    file = folder / PROJECTOR
    try:
        digest = read_json(folder / DIGESTS).get(PROJECTOR)
    except (OfframpError, AttributeError) as error:
        raise AdapterError(f"{folder / DIGESTS} is missing or damaged.", _AGAIN) from error
    if digest is None:
        raise AdapterError(
            f"{folder} holds no vision tower ({PROJECTOR}).",
            "Export it beside the decoder: offramp export --gguf q8_0 --vision q8_0.",
        )
    if not file.is_file() or digest_file(file) != digest:
        raise AdapterError(f"{file} is damaged or missing.", _AGAIN)
    return file


def _metadata(file: Path) -> dict[str, Any]:
    """The keys that offramp wrote."""
    try:
        said = read_header(file).said
        found = {key: value for key, value in said.items() if key.startswith("offramp.")}
    except (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError) as error:
        raise AdapterError(f"{file} is no whole GGUF file ({error}).", _AGAIN) from error
    wrong = [name for name, fits in _KEYS.items() if not fits(found.get(name))]
    if wrong:
        raise AdapterError(f"{file} has no {wrong[0]!r}, or none of its kind.", _AGAIN)
    return found


def _is_json(value: Any) -> bool:
    try:
        return isinstance(json.loads(value), dict)
    except (TypeError, ValueError, RecursionError):
        return False


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(number, int) for number in value)


_KEYS: dict[str, Callable[[Any], bool]] = {
    "offramp.format": lambda value: isinstance(value, int),
    "offramp.segment": lambda value: isinstance(value, int),
    "offramp.depths": lambda value: _are_numbers(value) and sorted(set(value)) == value != [],
    "offramp.shortlist": lambda value: value is None or _are_numbers(value),
    "offramp.backbone": lambda value: isinstance(value, str),
    "offramp.exits_digest": lambda value: isinstance(value, str),
    "offramp.fingerprint": lambda value: value is None or _is_json(value),
    "offramp.formats": _is_json,
}
"""What every file of an export says of itself."""


_NEEDED = ("depths", "layers", "exits_digest", "formats", "backbone", "policy")


def _check_together(folder: Path, about: list[dict[str, Any]]) -> None:
    """Raise `AdapterError` where the files are not of one export."""
    first = about[0]
    if first.get("offramp.format") not in (1, FORMAT):  # 1: without what says how to feed a file
        raise AdapterError(
            f"{folder} has export format {first.get('offramp.format')}; this version reads 1 and "
            f"{FORMAT}.",
            _AGAIN,
        )
    missing = [name for name in _NEEDED if f"offramp.{name}" not in first]
    if missing or not {"offramp.fingerprint", "offramp.source"} & set(first):
        raise AdapterError(
            f"The files in {folder} do not say their {(missing or ['fingerprint'])[0]}.", _AGAIN
        )
    shared = ("format", "depths", "exits_digest", "fingerprint", "source")
    for place, metadata in enumerate(about):
        if metadata.get("offramp.segment") != place or any(
            metadata.get(f"offramp.{name}") != first.get(f"offramp.{name}") for name in shared
        ):
            raise AdapterError(f"The segments in {folder} are not of one export.", _AGAIN)
    if len(about) != len(first["offramp.depths"]) + 1:
        raise AdapterError(f"Segments are missing in {folder}.", _AGAIN)


def _check_kinship(folder: Path, first: dict[str, Any], adapter: Adapter) -> None:
    """Raise `AdapterError` where the files are not of this adapter.

    A slice of a file from the hub has quantised weights: of the backbone its sizes are compared.
    """
    from offramp.core.models.fingerprint import fingerprint, same_backbone

    said = first.get("offramp.fingerprint")
    if said is None:
        here, layers = adapter.backbone.depth, int(first["offramp.layers"])
        difference = None if here == layers else f"layers is {here}, not {layers}"
    else:
        try:
            difference = same_backbone(json.loads(said), fingerprint(adapter.backbone))
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise AdapterError(f"The fingerprint in {folder} is damaged.", _AGAIN) from error
    if difference is not None:
        raise AdapterError(
            f"{folder} was exported for {first['offramp.backbone']!r}, not for this backbone: "
            f"{difference}.",
            "Use the backbone it was exported from, or export this one.",
        )
    if first["offramp.exits_digest"] != digest_of(adapter):
        raise AdapterError(f"{folder} was exported from exits other than this adapter's.", _AGAIN)
