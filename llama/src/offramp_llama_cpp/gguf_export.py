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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import policy_to_json, shortlist_of_policy
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import check_depths
from offramp.core.models.fingerprint import dump_fingerprint, fingerprint
from offramp_llama_cpp.architectures import (
    architecture_of,
    array_of,
    layer_tensors,
    rope_factors,
    settings,
)
from offramp_llama_cpp.cuts import Cut, about_export, depths_to_write, feeding, write_export
from offramp_llama_cpp.exit_files import digest_of
from offramp_llama_cpp.gguf_files import PROJECTOR
from offramp_llama_cpp.gguf_writing import add_array, add_value, check_format, new_file
from offramp_llama_cpp.graphs import Architecture, Array
from offramp_llama_cpp.packages import import_gguf
from offramp_llama_cpp.vision_export import Looks, export_vision, features_of


@dataclass(frozen=True)
class ExportFormats:
    """Number formats: of the decoder's layers, of the exits' layers and of the head.

    exits, head: left out, the layers' own where that has 8 bits or more, else q8_0. At 4 bits an
    exit's score is too far from the one that its threshold was chosen for.
    """

    layers: str = "q8_0"
    exits: str = ""
    head: str = ""

    def __post_init__(self) -> None:
        careful = self.layers if self.layers in ("f32", "f16", "bf16") else "q8_0"
        for name in ("exits", "head"):
            if not getattr(self, name):
                object.__setattr__(self, name, careful)
        for kind in (self.layers, self.exits, self.head):
            check_format(kind)


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
    backbone, exits, policy = adapter.backbone, adapter.exits, adapter.policy
    backbone.check_whole("A GGUF file")
    graph = architecture_of(backbone)
    named = policy.depths if depths is None else depths
    remedy = "Export exits of kind 'layer' or 'drafting'."
    chosen = depths_to_write(named, exits.depths, exits.modules.kind, remedy)
    check_depths(chosen, backbone.depth)
    shortlist = shortlist_of_policy(policy, exits)
    about = about_export(
        chosen,
        backbone.depth,
        exits=digest_of(adapter),
        backbone=backbone.name,
        policy=policy_to_json(policy),
        formats=vars(formats),
        packages=("torch", "transformers", "gguf"),
    )
    about["offramp.fingerprint"] = dump_fingerprint(fingerprint(backbone))

    def write(cut: Cut, file: Path, said: dict[str, Any]) -> None:
        exit, rows = (None, None) if cut.depth is None else (exits.at(cut.depth), shortlist)
        _write(file, backbone, graph, formats, cut, said, exit, rows)

    drafts = exits.modules.draft_input(chosen[-1])
    state = {} if drafts is None else {n: array_of(t) for n, t in drafts.state_dict().items()}
    also: dict[str, Callable[[Path], object]] = {}
    if vision is not None:
        also[PROJECTOR] = lambda file: export_vision(backbone, file, vision, Looks.of(processor))
    return write_export(folder, about, write, state, also)


def export_whole(backbone: Backbone, file: Path, formats: ExportFormats) -> None:
    """Write the decoder without exits as one file, which llama.cpp runs alone, for comparison."""
    _write(file, backbone, architecture_of(backbone), formats, Cut(0, backbone.depth), {})


def _write(
    file: Path,
    backbone: Backbone,
    graph: Architecture,
    formats: ExportFormats,
    cut: Cut,
    about: dict[str, Any],
    exit: nn.Module | None = None,
    rows: Tensor | None = None,
) -> None:
    """Write one segment. about: metadata by key. exit: after the cut's layers; None: there is
    none. rows: token ids [S] of the head's rows; None: all."""
    added = max(0, min(cut.stop, features_of(backbone)) - cut.start)
    with new_file(file, graph.name) as out:
        out.add_vocab_size(backbone.vocabulary if rows is None else len(rows))
        out.add_tokenizer_model("none")
        for key, value in settings(backbone, graph, cut.layers, added):
            add_value(out, f"{graph.name}.{key}", value)
        if rows is not None:
            out.add_array("offramp.shortlist", rows.tolist())
        for key, value in {**about, **feeding(graph, backbone.width, cut)}.items():
            add_value(out, key, value)
        head = backbone.head.weight if rows is None else backbone.head.weight[rows]
        add_array(out, "token_embd.weight", array_of(head), formats.head)
        for name, array, kind in _tensors(backbone, graph, formats, cut, exit):
            add_array(out, name, array, kind)


def _tensors(
    backbone: Backbone,
    graph: Architecture,
    formats: ExportFormats,
    cut: Cut,
    exit: nn.Module | None,
) -> Iterator[tuple[str, Array, str]]:
    """Names, tensors and formats of all but the head."""
    assert backbone.norm is not None, "every architecture here ends with a norm"
    norm = array_of(backbone.norm.weight) + np.float32(graph.norm_offset)
    yield "output_norm.weight", norm, "f32"
    if getattr(backbone.norm, "bias", None) is not None:
        yield "output_norm.bias", array_of(backbone.norm.bias), "f32"
    if backbone.positions is not None:  # the states bring theirs along
        places = int(backbone.text_config.max_position_embeddings)
        yield "position_embd.weight", np.zeros((places, backbone.width), np.float32), "f16"
    factors = rope_factors(backbone) if graph.rope_factors else None
    if factors is not None:
        yield "rope_freqs.weight", array_of(factors), "f32"
    layers = [(layer, formats.layers) for layer in backbone.layers[cut.start : cut.stop]]
    if exit is not None:
        layers.append((exit, formats.exits))
    for number, (layer, kind) in enumerate(layers):
        for name, array in layer_tensors(layer, graph, backbone, len(layers)):
            yield f"blk.{number}.{name}", array, kind
