"""Models with their shipped exits, and images that no one trained or chose thresholds on."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offramp.adapter import Adapter
from offramp.data.example import Example
from offramp.data.scenes.tasks import captions, questions
from offramp.models.input_processor import InputProcessor
from offramp.models.shipped import load_tiny, tiny_exits
from offramp.storage import write_json
from offramp_lab.records.record import Record


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


def photo(arguments: argparse.Namespace) -> Subject:
    """The photo model, by what a command was `asked`, on held-out photographs of the half on which
    figures are measured."""
    from examples.photo_vlm.evaluate import LONGEST

    from offramp_lab.records.photo import halves, load_photo

    dtype = getattr(torch, arguments.dtype)
    adapter, encoder = load_photo(arguments.photo, arguments.adapter, dtype)
    examples = halves(arguments.data)[1][: arguments.images]
    return Subject("photo model", adapter, encoder, examples, LONGEST["captions"])


def keep(part: str, figures: Mapping[str, Any], examples: Sequence[Example] = ()) -> None:
    """Put figures into a part of the record, which is called as its command, beside the others
    there, with where they come from."""
    record = Record("loads", f"loads.{part}")
    parts = record.read()
    known = parts.get(part, {}).get("figures", {})
    origin = {**record.origin(examples=examples), "load": os.getloadavg()[0]}
    parts[part] = {"figures": {**known, **figures}, "provenance": origin}
    write_json(record.path, parts)
