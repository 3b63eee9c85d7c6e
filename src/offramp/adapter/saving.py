"""The files of an adapter's folder, written: the exits' tensors, and adapter.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from offramp.core.decoding.policy import ExitPolicy, check_policy_depths, policy_to_json
from offramp.core.errors import InputError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import ExitSet
from offramp.core.models.fingerprint import fingerprint
from offramp.core.save_and_load.config import CHECKS, CONFIG, EXITS, FORMAT, LEARNT, sealed
from offramp.core.save_and_load.tensors import write_tensors
from offramp.core.storage import digest_file, write_json


def write_exits(folder: Path, exits: ExitSet) -> None:
    """Write the tensors of exits, and of their shortlist, to a folder.

    Raises:
        InputError: the exits have no tensors.
    """
    if not list(exits.modules.parameters()):
        raise InputError(
            "Lens exits have no tensors, so there is nothing to save.",
            "Build them where they are used: Exits(backbone, depths, kind='lens').",
        )
    write_tensors(exits.modules.state_dict(), folder / EXITS)
    if exits.measured:
        shortlist = {} if exits.shortlist is None else {"shortlist": exits.shortlist}
        write_tensors(shortlist, folder / CHECKS)


def write_config(
    folder: Path, backbone: Backbone, exits: ExitSet, policy: ExitPolicy, **known: Any
) -> dict[str, str]:
    """Write adapter.json for all other files in a folder; return their digests by name.

    known: further entries. Raise `InputError` where the policy names other depths than the exits'.
    """
    check_policy_depths(policy, exits.depths)
    files = {file.name: digest_file(file) for file in sorted(folder.iterdir())}
    entries = {
        "format": FORMAT,
        "backbone": {
            "name": backbone.name,
            "revision": backbone.revision,
            "fingerprint": fingerprint(backbone),
        },
        "depths": list(exits.depths),
        "exit_kind": exits.modules.kind,
        "checks": dict(exits.measured) or None,
        "policy": policy_to_json(policy),
        **known,
        **({"decoding": _learnt(backbone)} if not backbone.tested else {}),
        "files": files,
    }
    write_json(folder / CONFIG, sealed(entries))
    return files


def _learnt(backbone: Backbone) -> dict[str, Any]:
    values = (backbone.family.causal_prompt, backbone.reads_in_parts, backbone.lossless)
    return dict(zip(LEARNT, values, strict=True))
