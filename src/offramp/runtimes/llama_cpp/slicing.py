"""A GGUF file from the hub, cut at an adapter's exits: tensors as they are stored, no PyTorch.

The folder holds what `export_gguf` writes, segment by segment. K-quants stay K-quants, bit by bit;
an exit's head is the rows of the quantised head that its shortlist names. The last segment keeps
embeddings, head and tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offramp.errors import AdapterError, InputError, UnsupportedBackboneError
from offramp.runtimes.llama_cpp.cuts import (
    Cut,
    about_export,
    depths_to_write,
    feeding,
    write_export,
)
from offramp.runtimes.llama_cpp.exit_files import ExitFiles, read_exits
from offramp.runtimes.llama_cpp.gguf_writing import add_array, add_value, check_format, new_file
from offramp.runtimes.llama_cpp.graphs import GRAPHS, Architecture, layer_arrays, window_settings
from offramp.runtimes.llama_cpp.packages import import_gguf
from offramp.runtimes.llama_cpp.segment import EMBEDDING_SCALE
from offramp.storage import digest_file

_PATTERNS = {"gemma3": 6, "gemma2": 2}
"""Where a file says nothing: one of so many layers sees all, the last of them."""


@dataclass(frozen=True)
class _Source:
    """A GGUF file: what is said of it by key, and its tensors by name."""

    path: Path
    said: Mapping[str, Any]
    kinds: Mapping[str, Any]
    tensors: Mapping[str, Any]
    architecture: Architecture

    def get(self, key: str, default: Any = None) -> Any:
        """A setting of the architecture's."""
        return self.said.get(f"{self.said['general.architecture']}.{key}", default)

    @property
    def layers(self) -> int:
        return int(self.get("block_count"))

    @property
    def width(self) -> int:
        return int(self.get("embedding_length"))

    @property
    def vocabulary(self) -> int:
        return int(self.tensors["token_embd.weight"].shape[1])

    @property
    def head(self) -> Any:
        """The tensor; embeddings, where they are tied to it."""
        return self.tensors.get("output.weight", self.tensors["token_embd.weight"])


def slice_gguf(
    file: str | Path,
    adapter: str | Path,
    folder: str | Path,
    *,
    depths: Sequence[int] | None = None,
    exits: str = "q8_0",
) -> list[Path]:
    """Cut a GGUF file at the exits of the adapter in a folder; returns the segments' paths.

    Each file appears whole or not at all. depths: of the exits to write; left out, those where the
    policy lets tokens exit or draft. exits: number format of their layers.

    Raises:
        AdapterError: one of the two is missing or damaged, or the exits are of another model.
        InputError: no exit to write, or an unknown format.
        UnsupportedBackboneError: exits do not run in this file's graph.
    """
    check_format(exits)
    source, made = _read(Path(file)), read_exits(adapter)
    named = [int(d) for part in ("thresholds", "drafts") for d in made.policy.get(part, {})]
    kind = str(made.config.get("exit_kind", "layer"))
    remedy = "Train exits of kind 'layer' or 'drafting'."
    chosen = depths_to_write(named if depths is None else depths, [*made.states], kind, remedy)
    _check_kinship(source, made, Path(adapter))

    def write(cut: Cut, part: Path, said: dict[str, Any]) -> None:
        _Part(source, cut, made, exits).write(part, said)

    about = _about(source, made, chosen, exits)
    return write_export(folder, about, write, made.draft_input(chosen[-1]))


def _read(path: Path) -> _Source:
    if not path.is_file():
        raise AdapterError(f"{path} is no file.", "Name a GGUF file, e.g. model-q4_k_m.gguf.")
    try:
        reader = import_gguf().GGUFReader(path)
        said = {key: field.contents() for key, field in reader.fields.items()}
        kinds = {key: field.types for key, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        name = str(said["general.architecture"])
        int(said[f"{name}.block_count"]), int(said[f"{name}.embedding_length"])
        tensors["token_embd.weight"], tensors["output_norm.weight"]
    except (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError, TypeError) as error:
        raise AdapterError(
            f"{path} is no whole GGUF file of a language model ({error}).", "Download it again."
        ) from error
    architecture = GRAPHS.get(name)
    if architecture is None or architecture.state_scale != 1.0:
        raise UnsupportedBackboneError(
            f"Exits do not run in the graph {name!r} of {path.name}.",
            f"They run in {', '.join(sorted(GRAPHS))}.",
        )
    if int(said.get("split.count", 1)) > 1:
        raise InputError(
            f"{path.name} is a part of a file.", "Put the parts together: llama-gguf-split --merge."
        )
    if architecture.large == int(said[f"{name}.block_count"]):
        raise UnsupportedBackboneError(
            f"{path.name} has {architecture.large} layers, by which llama.cpp takes it for a model "
            "with another scale of attention scores, and a part of it would not be one.",
            "Export it from PyTorch: offramp export, which folds the scale into the weights.",
        )
    return _Source(path, said, kinds, tensors, architecture)


def _check_kinship(source: _Source, made: ExitFiles, folder: Path) -> None:
    """Raise `AdapterError` where sizes say that the exits are of another model. That it is this
    one's weights cannot be seen: they are quantised."""
    said = made.config["backbone"].get("fingerprint", {})
    here = {"layers": source.layers, "width": source.width, "vocabulary": source.vocabulary}
    for name, value in here.items():
        if said.get(name) is not None and int(said[name]) != value:
            raise AdapterError(
                f"The exits in {folder} are of a model whose {name} is {said[name]}; that of "
                f"{source.path.name} is {value}.",
                "Use the model that they were trained for, or train exits for this one.",
            )


def _about(source: _Source, made: ExitFiles, depths: tuple[int, ...], exits: str) -> dict[str, Any]:
    stored = sorted(
        {t.tensor_type.name.lower() for t in source.tensors.values() if len(t.shape) > 1}
    )
    head = source.head.tensor_type.name.lower()
    formats = {"layers": "+".join(stored), "exits": exits, "head": head}
    about = about_export(
        depths,
        source.layers,
        exits=made.digest,
        backbone=str(source.said.get("general.name", source.path.stem)),
        policy=made.policy,
        formats=formats,
    )
    about["offramp.source"] = json.dumps(_fingerprint(source))
    return about


def _fingerprint(source: _Source) -> dict[str, Any]:
    """What identifies the file: its name, its SHA-256, and that of its tensors' names, shapes and
    number formats."""
    rows = [[t.name, t.shape.tolist(), t.tensor_type.name] for t in source.tensors.values()]
    shapes = hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()
    return {"file": source.path.name, "sha256": digest_file(source.path), "tensors": shapes}


@dataclass(frozen=True)
class _Part:
    """A file that a source is cut into. exits: number format of the exits' layers."""

    source: _Source
    cut: Cut
    made: ExitFiles
    exits: str

    def write(self, file: Path, about: dict[str, Any]) -> None:
        name, depth = str(self.source.said["general.architecture"]), self.cut.depth
        with new_file(file, name) as out:
            shortlist = self.made.shortlist if self.made.policy.get("shortlist") else None
            for key, value in self._settings(name):
                add_value(out, f"{name}.{key}", value)
            if depth is None:
                self._keep_tokenizer(out)
            else:
                out.add_tokenizer_model("none")
                out.add_vocab_size(self.source.vocabulary if shortlist is None else len(shortlist))
                if shortlist is not None:
                    out.add_array("offramp.shortlist", shortlist.tolist())
            for key, value in {**about, **self._feeding()}.items():
                add_value(out, key, value)
            self._add_tensors(out, shortlist)
            if depth is not None:
                self._add_exit(out, self.made.states[depth])

    def _feeding(self) -> dict[str, Any]:
        graph = self.source.architecture
        said = feeding(graph, self.source.width, self.cut)
        scale = self.source.get("embedding_scale", self.source.width**0.5 if graph.ahead else None)
        if scale is not None and self.cut.depth is None:  # beside the embeddings
            said[EMBEDDING_SCALE] = float(scale)
        return said

    # -- metadata -------------------------------------------------------------------------------

    def _settings(self, name: str) -> Iterator[tuple[str, Any]]:
        """The architecture's, for these layers."""
        source = self.source
        own = ("block_count", "vocab_size", "n_deepstack_layers", "embedding_scale")
        window = ("attention.sliding_window", "attention.sliding_window_pattern")
        for key, value in source.said.items():
            setting = key.removeprefix(f"{name}.")
            if (
                key == setting
                or setting in own
                or (source.architecture.windows and setting in window)
            ):
                continue
            if isinstance(value, list) and len(value) == source.layers:
                yield setting, [value[layer] for layer in self.cut.layers]
            else:
                yield setting, value.item() if isinstance(value, np.generic) else value
        yield "block_count", len(self.cut.layers)
        if self.cut.depth is None and source.get("vocab_size") is not None:
            yield "vocab_size", source.vocabulary
        deepstack = source.get("n_deepstack_layers")
        if deepstack is not None:
            yield "n_deepstack_layers", max(0, min(self.cut.stop, int(deepstack)) - self.cut.start)
        yield from self._windows(name)

    def _windows(self, name: str) -> Iterator[tuple[str, Any]]:
        graph, window = self.source.architecture, self.source.get("attention.sliding_window")
        if not graph.windows:
            return
        if window is None and graph.always_windows:
            window = 4096
        pattern = self.source.get("attention.sliding_window_pattern", _PATTERNS[name])
        if not isinstance(pattern, list):
            every = int(pattern)
            pattern = [n % every < every - 1 for n in range(self.source.layers)]
        sliding = [bool(pattern[layer]) for layer in self.cut.layers]
        yield from window_settings(graph, sliding, window)

    def _keep_tokenizer(self, out: Any) -> None:
        value_type = import_gguf().GGUFValueType
        for key, value in self.source.said.items():
            if not key.startswith(("tokenizer.", "general.")) or key in (
                "general.architecture",
                "general.alignment",
            ):
                continue
            kinds = self.source.kinds[key]
            inner = kinds[-1] if kinds[0] == value_type.ARRAY else None
            out.add_key_value(key, value, kinds[0], inner)

    # -- tensors --------------------------------------------------------------------------------

    def _add_tensors(self, out: Any, shortlist: Any) -> None:
        tensors = self.source.tensors
        for name, tensor in tensors.items():
            layer = name.split(".")[1] if name.startswith("blk.") else None
            if layer is None:
                if name not in ("token_embd.weight", "output.weight") or self.cut.depth is None:
                    _add(out, name, tensor)
            elif self.cut.start <= int(layer) < self.cut.stop:
                rest = name.removeprefix(f"blk.{layer}.")
                _add(out, f"blk.{int(layer) - self.cut.start}.{rest}", tensor)
        if self.cut.depth is not None:
            _add(out, "token_embd.weight", self.source.head, shortlist)

    def _add_exit(self, out: Any, state: Mapping[str, Any]) -> None:
        source, place = self.source, self.cut.stop - self.cut.start
        heads = int(source.get("attention.head_count"))
        groups = int(source.get("attention.head_count_kv", heads))
        try:
            arrays = layer_arrays(state, source.architecture, (heads, groups))
        except KeyError as error:
            raise AdapterError(
                f"An exit holds the tensor {error}, which the graph of {source.path.name} has not.",
                "Use the model that the exits were trained for.",
            ) from error
        for name, array in arrays.items():
            add_array(out, f"blk.{place}.{name}", array, self.exits)


def _add(out: Any, name: str, tensor: Any, rows: Any = None) -> None:
    """A tensor as it is stored; rows: of it; None: all."""
    data = np.asarray(tensor.data) if rows is None else np.ascontiguousarray(tensor.data[rows])
    out.add_tensor(name, data, raw_dtype=tensor.tensor_type)
