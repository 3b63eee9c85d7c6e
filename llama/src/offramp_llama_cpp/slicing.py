"""A GGUF file from the hub, cut at an adapter's exits: tensors as they are stored, no PyTorch.

The folder holds what `export_gguf` writes, segment by segment. K-quants stay K-quants, bit by bit;
an exit's head is the rows of the quantised head that its shortlist names. The last segment keeps
embeddings, head and tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offramp.core.errors import AdapterError, InputError, OfframpError, UnsupportedBackboneError
from offramp.core.storage import digest_file
from offramp_llama_cpp.cuts import Cut, about_export, depths_to_write, feeding, write_export
from offramp_llama_cpp.exit_files import ExitFiles, read_exits
from offramp_llama_cpp.gguf_header import Header, TensorPlace, read_header
from offramp_llama_cpp.gguf_writing import add_array, add_value, check_format, new_file
from offramp_llama_cpp.graphs import GRAPHS, Architecture, layer_arrays, window_settings
from offramp_llama_cpp.packages import import_gguf
from offramp_llama_cpp.segment import EMBEDDING_SCALE

_PATTERNS = {"gemma3": 6, "gemma2": 2}
"""Where a file says nothing: one of so many layers sees all, the last of them."""


@dataclass(frozen=True)
class _Source:
    """A GGUF file, by its header."""

    header: Header
    name: str
    architecture: Architecture

    @property
    def path(self) -> Path:
        return self.header.path

    @property
    def tensors(self) -> Mapping[str, TensorPlace]:
        return self.header.tensors

    def get(self, key: str, default: Any = None) -> Any:
        """A setting of the architecture's."""
        return self.header.said.get(f"{self.name}.{key}", default)

    def count(self, key: str, default: int | None = None) -> int:
        """A setting that is a whole number above 0, the same in all layers. Raise `ValueError`
        where it is not."""
        value = self.get(key, default)
        if isinstance(value, list) and len({*value}) == 1:
            value = value[0]
        if type(value) is not int or value < 1:
            raise ValueError(f"its {key} is {str(value)[:60]}")
        return value

    @property
    def layers(self) -> int:
        return self.count("block_count")

    @property
    def width(self) -> int:
        return self.count("embedding_length")

    @property
    def heads(self) -> tuple[int, int]:
        """Return the number of heads, of queries and of keys."""
        heads = self.count("attention.head_count")
        return heads, self.count("attention.head_count_kv", heads)

    @property
    def vocabulary(self) -> int:
        return self.tensors["token_embd.weight"].shape[1]

    @property
    def head(self) -> str:
        """Return the name of the LM head's tensor: the embeddings', where they are tied."""
        return "output.weight" if "output.weight" in self.tensors else "token_embd.weight"

    @property
    def sliding(self) -> list[bool]:
        """Whether each layer looks back through a window, where the architecture has such."""
        pattern = self.get("attention.sliding_window_pattern", _PATTERNS[self.name])
        if isinstance(pattern, list):
            return [bool(each) for each in pattern]
        every = int(pattern)
        return [n % every < every - 1 for n in range(self.layers)]


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
    by = [made.policy.get(part, {}) for part in ("thresholds", "drafts")]
    named = [int(depth) for levels in by for depth in levels if depth.isdigit()]
    kind = str(made.config.get("exit_kind", "layer"))
    remedy = "Train exits of kind 'layer' or 'drafting'."
    chosen = depths_to_write(named if depths is None else depths, [*made.states], kind, remedy)
    _check_kinship(source, made, Path(adapter))

    def write(cut: Cut, part: Path, said: dict[str, Any]) -> None:
        _Part(source, cut, made, exits).write(part, said)

    about = _about(source, made, chosen, exits)
    return write_export(folder, about, write, made.draft_input(chosen[-1]))


def _read(path: Path) -> _Source:
    if not os.path.isfile(path):
        raise AdapterError(f"{path} is no file.", "Name a GGUF file, e.g. model-q4_k_m.gguf.")
    try:
        header = read_header(path, whole=True)
        name = str(header.said["general.architecture"])
        architecture = GRAPHS.get(name)
        if architecture is None or architecture.state_scale != 1.0:
            raise UnsupportedBackboneError(
                f"Exits do not run in the graph {name!r} of {path.name}.",
                f"They run in {', '.join(sorted(GRAPHS))}.",
            )
        source = _Source(header, name, architecture)
        if header.said.get("split.count", 1) not in (0, 1):
            raise InputError(
                f"{path.name} is a part of a file.",
                "Put the parts together: llama-gguf-split --merge.",
            )
        _check_settings(source)
        _check_shapes(source)
    except OfframpError:
        raise
    except (ValueError, KeyError, OSError) as error:
        raise AdapterError(
            f"{path} is no whole GGUF file of a language model ({error}).", "Download it again."
        ) from error
    if architecture.large == source.layers:
        raise UnsupportedBackboneError(
            f"{path.name} has {architecture.large} layers, by which llama.cpp takes it for a model "
            "with another scale of attention scores, and a part of it would not be one.",
            "Export it from PyTorch: offramp export, which folds the scale into the weights.",
        )
    return source


def _check_settings(source: _Source) -> None:
    """Raise `ValueError` where what is read of the settings has no meaning."""
    heads, groups = source.heads
    if source.layers > len(source.tensors):
        raise ValueError(f"it says that it has {source.layers} layers")
    if heads % groups:
        raise ValueError(f"it has {heads} heads of queries and {groups} of keys")
    for key in ("n_deepstack_layers", "attention.sliding_window"):
        if type(value := source.get(key, 0)) is not int or value < 0:
            raise ValueError(f"its {key} is {str(value)[:60]}")
    if type(source.get("embedding_scale", 1.0)) not in (int, float):
        raise ValueError(f"its embedding_scale is {str(source.get('embedding_scale'))[:60]}")
    if source.architecture.windows:
        if not isinstance(source.get("attention.sliding_window_pattern", []), list):
            source.count("attention.sliding_window_pattern")
        if len(source.sliding) != source.layers:
            raise ValueError(f"it says of {len(source.sliding)} layers whether they have windows")
    words = source.header.said.get("tokenizer.ggml.tokens")
    if words is not None and len(words) != source.vocabulary:
        raise ValueError(f"it has {len(words)} words and {source.vocabulary} embeddings")


def _check_shapes(source: _Source) -> None:
    """Raise `ValueError` where tensors are not as large as the settings say, or not in every layer:
    llama.cpp would end the process, or read one's bytes as another's."""
    width, expected = source.width, _shapes_by(source)
    layers: dict[str, dict[str, tuple[int, ...]]] = {str(n): {} for n in range(source.layers)}
    for name, place in source.tensors.items():
        if name.startswith("blk."):
            number, _, rest = name.removeprefix("blk.").partition(".")
            if number not in layers:
                raise ValueError(f"the tensor {name[:60]!r} is of no layer")
            layers[number][rest] = place.shape
            stem, _, part = rest.rpartition(".")
            wanted = expected.get(stem)
            wanted = wanted[-1:] if wanted and part == "bias" else wanted
        else:
            table = (width, source.vocabulary)
            known = {"token_embd.weight": table, "output.weight": table}
            wanted = known.get(name, (width,) if name.startswith("output_norm.") else None)
        if wanted is not None and place.shape != wanted:
            raise ValueError(f"the tensor {name[:60]!r} has the shape {place.shape}, not {wanted}")
    source.tensors["output_norm.weight"]
    odd = [layer for layer, shapes in layers.items() if shapes != layers["0"] or not shapes]
    if odd:
        raise ValueError(f"layer {odd[0]} has other tensors than the first")


def _shapes_by(source: _Source) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's weights, by the settings."""
    width, (heads, groups) = source.width, source.heads
    key = source.count("attention.key_length", width // heads)
    value = source.count("attention.value_length", width // heads)
    norms = ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm")
    found: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(norms, (width,)),
        **dict.fromkeys(("attn_q_norm", "attn_k_norm"), (key,)),
        "attn_q": (width, heads * key),
        "attn_k": (width, groups * key),
        "attn_v": (width, groups * value),
        "attn_output": (heads * value, width),
    }
    if not source.architecture.experts:
        inner = source.count("feed_forward_length")
        found |= dict.fromkeys(("ffn_gate", "ffn_up"), (width, inner))
        found["ffn_down"] = (inner, width)
    return found


def _check_kinship(source: _Source, made: ExitFiles, folder: Path) -> None:
    """Raise `AdapterError` where sizes say that the exits are of another model. That it is this
    one's weights cannot be seen: they are quantised."""
    said = dict(made.config["backbone"].get("fingerprint") or {})
    here = {"layers": source.layers, "width": source.width, "vocabulary": source.vocabulary}
    for name, value in here.items():
        if said.get(name) not in (None, value):
            raise AdapterError(
                f"The exits in {folder} are of a model whose {name} is {said[name]}; that of "
                f"{source.path.name} is {value}.",
                "Use the model that they were trained for, or train exits for this one.",
            )


def _about(source: _Source, made: ExitFiles, depths: tuple[int, ...], exits: str) -> dict[str, Any]:
    stored = sorted({_format(t) for t in source.tensors.values() if len(t.shape) > 1})
    head = _format(source.tensors[source.head])
    formats = {"layers": "+".join(stored), "exits": exits, "head": head}
    about = about_export(
        depths,
        source.layers,
        exits=made.digest,
        backbone=str(source.header.said.get("general.name", source.path.stem)),
        policy=made.policy,
        formats=formats,
    )
    about["offramp.source"] = json.dumps(_fingerprint(source))
    return about


def _format(place: TensorPlace) -> str:
    """A tensor's number format, in small letters."""
    return str(import_gguf().GGMLQuantizationType(place.kind).name.lower())


def _fingerprint(source: _Source) -> dict[str, Any]:
    """What identifies the file: its name, its SHA-256, and that of its tensors' names, shapes and
    number formats."""
    rows = [[n, [*t.shape], _format(t).upper()] for n, t in source.tensors.items()]
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
        name, depth = self.source.name, self.cut.depth
        with new_file(file, name) as out:
            shortlist = self.made.shortlist if self.made.policy.get("shortlist") else None
            self._keep_settings(out)
            for key, value in self._settings():
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

    def _keep_settings(self, out: Any) -> None:
        """Copy the architecture's settings of the whole file, or of each of its layers."""
        source = self.source
        own = ("block_count", "vocab_size", "n_deepstack_layers", "embedding_scale")
        window = ("attention.sliding_window", "attention.sliding_window_pattern")
        left = (*own, *(window if source.architecture.windows else ()))
        for key, value in source.header.said.items():
            setting = key.removeprefix(f"{source.name}.")
            if key == setting or setting in left:
                continue
            by_layer = isinstance(value, list) and len(value) == source.layers
            self._keep(out, key, [value[n] for n in self.cut.layers] if by_layer else value)

    def _settings(self) -> Iterator[tuple[str, Any]]:
        """The architecture's settings of this part alone."""
        source = self.source
        yield "block_count", len(self.cut.layers)
        if self.cut.depth is None and source.get("vocab_size") is not None:
            yield "vocab_size", source.vocabulary
        deepstack = source.get("n_deepstack_layers")
        if deepstack is not None:
            yield "n_deepstack_layers", max(0, min(self.cut.stop, deepstack) - self.cut.start)
        graph, window = source.architecture, source.get("attention.sliding_window")
        if graph.windows:
            window = 4096 if window is None and graph.always_windows else window
            sliding = [source.sliding[layer] for layer in self.cut.layers]
            yield from window_settings(graph, sliding, window)

    def _keep_tokenizer(self, out: Any) -> None:
        for key, value in self.source.header.said.items():
            own = ("general.architecture", "general.alignment")
            if key.startswith(("tokenizer.", "general.")) and key not in own:
                self._keep(out, key, value)

    def _keep(self, out: Any, key: str, value: Any) -> None:
        """Copy a value by its key, in the type that the file has it in."""
        kind, inner = self.source.header.kinds[key]
        types = import_gguf().GGUFValueType
        out.add_key_value(key, value, types(kind), None if inner is None else types(inner))

    # -- tensors --------------------------------------------------------------------------------

    def _add_tensors(self, out: Any, shortlist: Any) -> None:
        for name in self.source.tensors:
            layer = name.split(".")[1] if name.startswith("blk.") else None
            if layer is None:
                if name not in ("token_embd.weight", "output.weight") or self.cut.depth is None:
                    self._add(out, name, name)
            elif self.cut.start <= int(layer) < self.cut.stop:
                rest = name.removeprefix(f"blk.{layer}.")
                self._add(out, f"blk.{int(layer) - self.cut.start}.{rest}", name)
        if self.cut.depth is not None:
            self._add(out, "token_embd.weight", self.source.head, shortlist)

    def _add(self, out: Any, name: str, of: str, rows: Any = None) -> None:
        """Copy a tensor as it is stored. of: its name in the source. rows: of it; None: all."""
        place, data = self.source.tensors[of], self.source.header.rows(of)
        data = data if rows is None else np.ascontiguousarray(data[rows])
        shape = [*reversed(place.shape[1:])] if rows is None else [len(data)]
        kind = import_gguf().GGMLQuantizationType(place.kind)
        out.add_tensor(name, data.reshape(*shape, -1), raw_dtype=kind)

    def _add_exit(self, out: Any, state: Mapping[str, Any]) -> None:
        source, place = self.source, self.cut.stop - self.cut.start
        try:
            arrays = layer_arrays(state, source.architecture, source.heads)
        except (KeyError, ValueError) as error:
            raise self._other(str(error)) from error
        for name, array in arrays.items():
            own = source.tensors.get(f"blk.0.{name}")
            if own is None or array.shape != tuple(reversed(own.shape)):
                raise self._other(f"{name!r} of the shape {array.shape}")
            add_array(out, f"blk.{place}.{name}", array, self.exits)

    def _other(self, what: str) -> AdapterError:
        return AdapterError(
            f"An exit holds the tensor {what}, which no layer of {self.source.path.name} has.",
            "Use the model that the exits were trained for.",
        )
