"""A backbone's decoder and its exits as GGUF files for llama.cpp, cut where the exits stand.

segment-0.gguf    layers below the first exit, the exit's own layer, norm, the head's rows
...               one segment more for each further exit
segment-N.gguf    the layers above the last exit, norm, the whole head
drafter.gguf      where the last exit drafts on: its layer once more, norm, the head's rows
drafter.npz       what enters it there, of `DraftInput`
mmproj.gguf       where it is asked for, vision tower and projector (`vision_export`)
digests.json      SHA-256 of each file

Weights are the model's own. Embeddings and everything before the decoder stay in PyTorch: a segment
is fed with states, and its `token_embd` is the head. Where the adapter's policy reads a shortlist,
a segment with an exit has the head's rows of those tokens alone, and `offramp.shortlist` holds
their ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from offramp import __version__
from offramp.adapter import Adapter
from offramp.engine.exit_check import shortlist_of_policy
from offramp.engine.policy import policy_to_json
from offramp.errors import InputError, did_you_mean
from offramp.models.backbone import Backbone
from offramp.models.exits import check_depths
from offramp.models.fingerprint import dump_fingerprint, fingerprint
from offramp.runtimes.llama_cpp.architectures import (
    architecture_of,
    input_scale,
    layer_tensors,
    rope_factors,
    settings,
)
from offramp.runtimes.llama_cpp.drafter import write_draft_input
from offramp.runtimes.llama_cpp.exit_files import digest_of
from offramp.runtimes.llama_cpp.gguf_files import (
    DIGESTS,
    DRAFT_INPUT,
    DRAFTER,
    FORMAT,
    PROJECTOR,
)
from offramp.runtimes.llama_cpp.gguf_writing import (
    FORMATS,
    add_array,
    add_value,
    depths_to_write,
    new_file,
)
from offramp.runtimes.llama_cpp.graphs import Architecture, Array
from offramp.runtimes.llama_cpp.packages import import_gguf
from offramp.runtimes.llama_cpp.segment import AHEAD, FIRST_LAYER, INPUT_SCALE, STATE_SCALE
from offramp.runtimes.llama_cpp.vision_export import Looks, export_vision, features_of
from offramp.storage import atomic_folder, digest_file, write_json


@dataclass(frozen=True)
class ExportFormats:
    """Number formats: of the decoder's layers, of the exits' layers and of the head.

    exits, head: left out, the layers' own where that has 8 bits or more, else q8_0. At 4 bits an
    exit's score is too far from the one that its threshold was chosen for.
    """

    layers: str = "q8_0"
    exits: str = field(default="")
    head: str = field(default="")

    def __post_init__(self) -> None:
        careful = "q8_0" if self.layers.startswith(("q4", "q5", "iq4")) else self.layers
        for name in ("exits", "head"):
            if not getattr(self, name):
                object.__setattr__(self, name, careful)
        for name in ("layers", "exits", "head"):
            value = getattr(self, name)
            if value not in FORMATS:
                raise InputError(
                    f"GGUF format {value!r} is not known.", did_you_mean(value, FORMATS)
                )


@dataclass(frozen=True)
class SegmentPlan:
    """One file: the decoder layers [start, stop), and behind them an exit or, in the whole model's
    last, none."""

    index: int
    start: int
    stop: int
    exit: nn.Module | None
    file: str


def export_gguf(
    adapter: Adapter,
    folder: str | Path,
    formats: ExportFormats | str = "q8_0",
    *,
    depths: Sequence[int] | None = None,
    vision: str | None = None,
    processor: Any = None,
) -> list[Path]:
    """Write the segments of an adapter on its backbone, and return their paths.

    Each file appears whole or not at all. formats: of all, or of layers, exits and head. depths: of
    the exits to write; left out, those where the policy lets tokens exit or draft. vision:
    number format of the vision tower; None: it is left out. processor: the model's, which says how
    the tower's images are made.

    Raises:
        InputError: no exit to write, an unknown format, or the package `gguf` is missing.
        UnsupportedBackboneError: llama.cpp does not run this decoder, or this vision tower.
        StorageError: the files could not be written.
    """
    import_gguf()
    formats = ExportFormats(formats) if isinstance(formats, str) else formats
    architecture = architecture_of(adapter.backbone)
    named = adapter.policy.depths if depths is None else depths
    remedy = "Export exits of kind 'layer' or 'drafting'."
    chosen = depths_to_write(named, adapter.exits.depths, adapter.exits.modules.kind, remedy)
    check_depths(chosen, adapter.backbone.depth)
    shortlist = shortlist_of_policy(adapter.policy, adapter.exits)
    about = _about(adapter, chosen, formats)
    plans = plan_segments(adapter, chosen)
    files = [plan.file for plan in plans]
    with atomic_folder(folder) as staging:
        for plan in plans:
            rows = shortlist if plan.exit is not None else None
            writer = _Writer(adapter.backbone, architecture, formats, plan)
            writer.write(staging / plan.file, rows, {**about, "offramp.segment": plan.index})
        if (drafts := adapter.exits.modules.draft_input(chosen[-1])) is not None:
            state = {name: _array(tensor) for name, tensor in drafts.state_dict().items()}
            write_draft_input(staging / DRAFT_INPUT, state)
            files.append(DRAFT_INPUT)
        if vision is not None:
            export_vision(adapter.backbone, staging / PROJECTOR, vision, Looks.of(processor))
            files.append(PROJECTOR)
        write_json(staging / DIGESTS, {file: digest_file(staging / file) for file in files})
    return [Path(folder) / file for file in files]


def export_whole(backbone: Backbone, file: Path, formats: ExportFormats) -> None:
    """The decoder without exits in one file, which is what llama.cpp runs alone: for comparison."""
    plan = SegmentPlan(0, 0, backbone.depth, None, file.name)
    _Writer(backbone, architecture_of(backbone), formats, plan).write(file, None, {})


def plan_segments(adapter: Adapter, depths: Sequence[int]) -> list[SegmentPlan]:
    """The chain of segments for the exits at `depths`, and the layer of one that drafts on."""
    edges = [0, *depths, adapter.backbone.depth]
    exits = [*(adapter.exits.at(depth) for depth in depths), None]
    plans = [
        SegmentPlan(i, edges[i], edges[i + 1], exit_module, f"segment-{i}.gguf")
        for i, exit_module in enumerate(exits)
    ]
    last = depths[-1]
    if adapter.exits.modules.draft_input(last) is not None:
        plans.append(SegmentPlan(len(plans), last, last, adapter.exits.at(last), DRAFTER))
    return plans


def _about(adapter: Adapter, depths: Sequence[int], formats: ExportFormats) -> dict[str, Any]:
    """Metadata that all segments share, by key."""
    versions = {"offramp": __version__}
    versions |= {name: metadata.version(name) for name in ("torch", "transformers", "gguf")}
    return {
        "offramp.format": FORMAT,
        "offramp.depths": list(depths),
        "offramp.layers": adapter.backbone.depth,
        "offramp.exits_digest": digest_of(adapter),
        "offramp.backbone": adapter.backbone.name,
        "offramp.fingerprint": dump_fingerprint(fingerprint(adapter.backbone)),
        "offramp.policy": json.dumps(policy_to_json(adapter.policy), sort_keys=True),
        "offramp.formats": json.dumps(vars(formats)),
        "offramp.versions": json.dumps(versions),
    }


class _Writer:
    """Writes one segment."""

    def __init__(
        self,
        backbone: Backbone,
        architecture: Architecture,
        formats: ExportFormats,
        plan: SegmentPlan,
    ) -> None:
        self.backbone = backbone
        self.architecture = architecture
        self.formats = formats
        self.plan = plan

    def write(self, file: Path, rows: Tensor | None, about: dict[str, Any]) -> None:
        """rows: token ids [S] of the head's rows; None: all. about: metadata by key."""
        with new_file(file, self.architecture.name) as out:
            self._describe(out, self.backbone.vocabulary if rows is None else len(rows))
            if rows is not None:
                out.add_array("offramp.shortlist", rows.tolist())
            for key, value in {**about, **self._feeding()}.items():
                add_value(out, key, value)
            for name, array, kind in self._tensors(rows):
                add_array(out, name, array, kind)

    @property
    def _layers(self) -> list[int]:
        """Which of the decoder's layers the file's are; an exit's, that which it stands before."""
        plan = self.plan
        return [*range(plan.start, plan.stop), *([] if plan.exit is None else [plan.stop])]

    def _describe(self, out: Any, vocabulary: int) -> None:
        """The architecture's own metadata."""
        out.add_vocab_size(vocabulary)
        out.add_tokenizer_model("none")
        first, stop = self.plan.start, self.plan.stop
        added = max(0, min(stop, features_of(self.backbone)) - first)
        for key, value in settings(self.backbone, self.architecture, self._layers, added):
            add_value(out, f"{self.architecture.name}.{key}", value)

    def _feeding(self) -> dict[str, Any]:
        """How a segment is fed, where that is not as plain as can be."""
        said: dict[str, Any] = {
            INPUT_SCALE: input_scale(self.backbone, self.architecture),
            STATE_SCALE: self.architecture.state_scale,
        }
        said = {key: value for key, value in said.items() if value != 1.0}
        if self.architecture.ahead:
            said[AHEAD] = True
        if self.architecture.deepstack:
            said[FIRST_LAYER] = self.plan.start
        return said

    def _tensors(self, rows: Tensor | None) -> Iterator[tuple[str, Array, str]]:
        """Names, tensors and formats."""
        backbone, plan, formats = self.backbone, self.plan, self.formats
        head = backbone.head.weight
        yield "token_embd.weight", _array(head if rows is None else head[rows]), formats.head
        assert backbone.norm is not None, "every architecture here ends with a norm"
        norm = _array(backbone.norm.weight) + np.float32(self.architecture.norm_offset)
        yield "output_norm.weight", norm, "f32"
        if getattr(backbone.norm, "bias", None) is not None:
            yield "output_norm.bias", _array(backbone.norm.bias), "f32"
        if backbone.positions is not None:  # the states bring theirs along
            places = int(backbone.text_config.max_position_embeddings)
            yield "position_embd.weight", np.zeros((places, backbone.width), np.float32), "f16"
        factors = rope_factors(backbone) if self.architecture.rope_factors else None
        if factors is not None:
            yield "rope_freqs.weight", _array(factors), "f32"
        layers = [(layer, formats.layers) for layer in backbone.layers[plan.start : plan.stop]]
        if plan.exit is not None:
            layers.append((plan.exit, formats.exits))
        for number, (layer, kind) in enumerate(layers):
            tensors = layer_tensors(layer, self.architecture, backbone, len(layers))
            for name, array in tensors:
                # A router's weights are few, and choose experts.
                careful = "f32" if name == "ffn_gate_inp.weight" else kind
                yield f"blk.{number}.{name}", array, careful


def _array(tensor: Tensor) -> Array:
    return np.asarray(tensor.detach().float().cpu().contiguous().numpy())
