"""Models with their shipped exits, and images that no one trained or chose thresholds on."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offramp.adapter import Adapter
from offramp.data.example import Example, examples_digest
from offramp.data.scenes.tasks import captions, questions
from offramp.models.input_processor import InputProcessor
from offramp.models.shipped import load_tiny, tiny_exits
from offramp.provenance import provenance
from offramp.storage import read_json, write_json
from offramp_lab.places import RECORDS

RECORD = RECORDS / "loads.json"


@dataclass(frozen=True)
class Subject:
    """longest: tokens of an answer."""

    name: str
    adapter: Adapter
    encoder: InputProcessor
    examples: Sequence[Example]
    longest: int

    @property
    def options(self) -> dict[str, Any]:
        """Of generation: greedy."""
        return {"max_new_tokens": self.longest, "do_sample": False}


def tiny(kind: str, images: int, exits: Path | None = None) -> Subject:
    """A model that ships, on captions and questions of the test split.

    exits: those that ship with it, if no other folder is named.
    """
    backbone, processor = load_tiny(kind)
    adapter = Adapter.from_pretrained(backbone, exits or tiny_exits(kind))
    encoder = InputProcessor(backbone, processor)
    half = images // 2
    examples = captions("test", half).examples + questions("test", half, half, 1).examples
    return Subject(f"tiny-{kind}", adapter, encoder, examples, 48)


def photo(folder: Path, data: Path, images: int, dtype: str = "float32") -> Subject:
    """The photo model that was built into `folder`, on held-out photographs of the half on which
    figures are measured."""
    from examples.photo_vlm.caption import ADAPTER, load
    from examples.photo_vlm.evaluate import LONGEST
    from examples.photo_vlm.rows import half_of, read_photographs

    backbone, encoder = load(folder, getattr(torch, dtype))
    held_out = [e for e in read_photographs(data)["captions_val"] if half_of(e) == 1]
    adapter = Adapter.load(ADAPTER, backbone)
    return Subject("photo model", adapter, encoder, held_out[:images], LONGEST["captions"])


def add_photo(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """The options that say where the photo model and its photographs are."""
    parser.add_argument("--photo", type=Path, required=required, help="folder of the built model")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="photographs")


def keep(
    part: str, figures: Mapping[str, Any], command: str, examples: Sequence[Example] = ()
) -> None:
    """Put figures into a part of the record, beside the others there, with where they come from."""
    record = read_json(RECORD) if RECORD.is_file() else {}
    known = record.get(part, {}).get("figures", {})
    digest = examples_digest(examples) if examples else None
    origin = {**provenance(0, [command], digest), "load": os.getloadavg()[0]}
    record[part] = {"figures": {**known, **figures}, "provenance": origin}
    write_json(RECORD, record)
