"""Where a decoder is cut, and the folder of an export: a file for each part, and their digests."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

from offramp import __version__
from offramp.core.errors import InputError
from offramp.core.storage import atomic_folder, digest_file, write_json
from offramp_llama_cpp.drafter import write_draft_input
from offramp_llama_cpp.gguf_files import DIGESTS, DRAFT_INPUT, DRAFTER, FORMAT
from offramp_llama_cpp.graphs import Architecture
from offramp_llama_cpp.segment import AHEAD, FIRST_LAYER, INPUT_SCALE, STATE_SCALE


@dataclass(frozen=True)
class Cut:
    """One file: the decoder's layers [start, stop), and after them the exit at `depth`; None: in
    the whole model's last, no exit."""

    start: int
    stop: int
    depth: int | None = None

    @property
    def layers(self) -> list[int]:
        """Return which of the decoder's layers the file's are; an exit's, that which it stands
        before."""
        return [*range(self.start, self.stop), *([] if self.depth is None else [self.stop])]


def depths_to_write(
    named: Collection[int], stand: Collection[int], kind: str, remedy: str
) -> tuple[int, ...]:
    """The depths of the exits of a file. named: those asked for. stand: where there are exits, and
    of which kind. Raise `InputError` where none or another is named, or llama.cpp does not run the
    kind; remedy: then."""
    wrong = sorted({*named} - {*stand})
    if not named or wrong:
        raise InputError(
            f"No exits stand at depths {wrong}." if wrong else "The policy lets no token exit.",
            f"Name depths to write among {sorted(stand)}, e.g. with --depths.",
        )
    if kind not in ("layer", "drafting"):
        raise InputError(
            f"Exits of kind {kind!r} are no decoder layers, which is what llama.cpp runs.", remedy
        )
    return tuple(sorted({*named}))


def about_export(
    depths: Sequence[int],
    layers: int,
    *,
    exits: str,
    backbone: str,
    policy: Mapping[str, Any],
    formats: Mapping[str, str],
    packages: Sequence[str] = ("gguf",),
) -> dict[str, Any]:
    """Metadata that all files of an export share, by key. exits: their digest. packages: whose
    versions are noted."""
    versions = {"offramp": __version__, **{name: metadata.version(name) for name in packages}}
    return {
        "offramp.format": FORMAT,
        "offramp.depths": list(depths),
        "offramp.layers": layers,
        "offramp.exits_digest": exits,
        "offramp.backbone": backbone,
        "offramp.policy": json.dumps(policy, sort_keys=True),
        "offramp.formats": json.dumps(formats),
        "offramp.versions": json.dumps(versions),
    }


def feeding(graph: Architecture, width: int, cut: Cut) -> dict[str, Any]:
    """Metadata: how a file is fed, where that is not as plain as can be. width: of states."""
    scales = {
        INPUT_SCALE: width**-0.5 if graph.divided else graph.state_scale,
        STATE_SCALE: graph.state_scale,
    }
    said: dict[str, Any] = {key: scale for key, scale in scales.items() if scale != 1.0}
    if graph.ahead:
        said[AHEAD] = True
    if graph.deepstack:
        said[FIRST_LAYER] = cut.start
    return said


def write_export(
    folder: str | Path,
    about: Mapping[str, Any],
    write: Callable[[Cut, Path, dict[str, Any]], None],
    drafts: Mapping[str, Any] | None,
    also: Mapping[str, Callable[[Path], object]] | None = None,
) -> list[Path]:
    """Write the files of an export and their digests; each appears whole or not at all.

    about: as of `about_export`. write: a part of the decoder, with metadata of its own. drafts:
    what enters the last exit where it drafts on, by name; its layer is then written once more.
    also: more files, by name. Returns their paths.
    """
    depths = about["offramp.depths"]
    edges = pairwise([0, *depths, about["offramp.layers"]])
    cuts = {
        f"segment-{place}.gguf": Cut(start, stop, depth)
        for place, ((start, stop), depth) in enumerate(zip(edges, [*depths, None], strict=True))
    }
    if drafts:
        cuts[DRAFTER] = Cut(depths[-1], depths[-1], depths[-1])
    names = [*cuts, *([DRAFT_INPUT] if drafts else []), *(also or {})]
    with atomic_folder(folder) as staging:
        for place, (name, cut) in enumerate(cuts.items()):
            write(cut, staging / name, {**about, "offramp.segment": place})
        if drafts:
            write_draft_input(staging / DRAFT_INPUT, drafts)
        for name, other in (also or {}).items():
            other(staging / name)
        write_json(staging / DIGESTS, {name: digest_file(staging / name) for name in names})
    return [Path(folder) / name for name in names]
