"""Vision towers that an inference engine runs in PyTorch's place: ONNX Runtime or OpenVINO.

A tower is convolutions or matrix multiplications over one picture's patches. PyTorch on a processor
lays out their weights at every call; engines do so once, with the norms folded into them. So the
tower is exported once, as ONNX, and kept under a digest of its weights. It runs in float32, one
picture at a time (a batch of several is no faster there). When it is loaded it is compared with the
model's own on two pictures; where they differ by more than rounding, PyTorch is used. OpenVINO also
computes in bfloat16, faster on processors that have it, with less precise features.
"""

from __future__ import annotations

import inspect
import logging
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from offramp.common.folders import cache_folder
from offramp.core.errors import InputError, StorageError
from offramp.core.missing import how_to_install, missing_package
from offramp.core.models.change import Unchanged
from offramp.core.models.discovery.twin import graft, twin
from offramp.core.models.stand_in import StandIn
from offramp.core.models.weights import float_copy, float_dtype, scheme
from offramp.core.storage import atomic_folder
from offramp.features.vision_cache import digest

log = logging.getLogger(__name__)

TOLERANCE, TOLERANCE_ROUNDED = 1e-4, 0.4
"""How far an engine's output may be from the tower's own in float32, as a share of its length. What
rounds is held to the first in float32; noise, which it is tried on, is rounded worst."""
IN_BF16, IN_INT8 = "openvino-bf16", "onnxruntime-int8"
ROUNDED = {IN_BF16: "openvino", IN_INT8: "onnxruntime"}
"""Engines that round, and what they are without: answers are other ones, and a guarantee is of such
an engine alone."""
FILE = "tower.onnx"
LAYOUT = 1
"""Raised where the same tower would be exported otherwise."""

Array = npt.NDArray[Any]
Run = Callable[[Sequence[Array]], Sequence[Array]]
"""Outputs of one picture's inputs."""


class VisionEngine(StandIn):
    """A vision tower that runs in an inference engine.

    PyTorch's tower answers, with one warning, once its weights have changed or it is called in
    another way than at the export.
    """

    def __init__(self, name: str, tower: nn.Module, call: _Call, outputs: _Outputs, run: Run):
        super().__init__(name, tower)
        self._call, self._outputs, self._run = call, outputs, run
        self._as_exported, self._said = Unchanged(lambda: (tower,)), set[str]()

    def forward(self, *args: Any, **kw: Any) -> Any:
        call = _Call.of(self.tower, args, kw)
        if call.way != self._call.way:
            return self._own("it is called in another way than it was exported for", args, kw)
        if not self._as_exported():
            return self._own("its weights or modules are no longer those exported", args, kw)
        return self._outputs.joined([self._run(one) for one in call.pictures()])

    def _own(self, why: str, args: Any, kw: Any) -> Any:
        if why not in self._said:
            self._said.add(why)
            log.warning("The vision tower runs in PyTorch, not in %s: %s.", self.name, why)
        return self.tower(*args, **kw)


def vision_engine(name: str, model: nn.Module, path: str, example: Any) -> VisionEngine | None:
    """Return the tower at `path` of a model, run by an engine of `ENGINES`; None, with a warning,
    where the export fails or the engine's features of two pictures are not the tower's own.

    example: the processor's output for a prompt with an image; None: there is none.
    """
    tower = model.get_submodule(path)
    try:
        with torch.inference_mode():
            call, outputs = _watched(model, path, tower, example)
        return VisionEngine(name, tower, call, outputs, _checked(name, tower, call, outputs))
    except Exception as error:  # exporters and engines raise nearly anything
        said = " ".join(str(error).split())[:300] or type(error).__name__
        log.warning("The vision tower runs in PyTorch, not in %s: %s", name, said)
        return None


def check_vision_engine(name: str) -> None:
    """Raise `InputError` where a package that the engine needs is missing."""
    try:
        for package in (ROUNDED.get(name, name), *_EXPORTER):
            import_module(package)
    except ImportError as error:
        package = missing_package(error) or name
        raise InputError(
            f"The vision tower cannot run in {name}: the package {package} is missing or broken.",
            how_to_install(package),
        ) from error


_EXPORTER = ("onnx", "onnxscript")


@cache
def _names(forward: Any) -> tuple[str, ...]:
    """Arguments of a tower that may be given by place."""
    _, *given = inspect.signature(forward).parameters.values()
    return tuple(each.name for each in given if each.kind is each.POSITIONAL_OR_KEYWORD)


# -- calls of a tower ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """A call of a tower. leaves: of its arguments `spec`, of which `tensors` [N, ...] are those
    with a row for each picture."""

    leaves: tuple[Any, ...]
    spec: Any
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, tower: nn.Module, args: tuple[Any, ...], kw: dict[str, Any]) -> _Call:
        """The call with its arguments by name, however they were given."""
        kind: Any = type(tower)
        names = _names(kind.forward)
        if len(args) <= len(names):
            args, kw = (), {**dict(zip(names, args, strict=False)), **kw}
        leaves, spec = tree_flatten((args, dict(sorted(kw.items()))))
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        return cls(tuple(None if isinstance(x, Tensor) else (x,) for x in leaves), spec, tensors)

    @property
    def way(self) -> Any:
        """The inputs of an export besides the pictures."""
        shapes = [(tensor.shape[1:], tensor.dtype) for tensor in self.tensors]
        return str(self.spec), repr(self.leaves), str(shapes), self.has_rows

    @property
    def has_rows(self) -> bool:
        """Whether each tensor has as many rows as the others."""
        return len({len(tensor) if tensor.dim() else 0 for tensor in self.tensors} - {0}) == 1

    def pictures(self) -> Iterator[list[Array]]:
        """The engine's inputs for each picture."""
        arrays = [_plain(tensor).numpy() for tensor in self.tensors]
        for row in range(len(arrays[0])):
            yield [array[row : row + 1] for array in arrays]

    def run(self, tower: nn.Module, tensors: Sequence[Tensor]) -> Any:
        """Return the tower's outputs for other tensors."""
        rest = iter(tensors)
        args, kw = tree_unflatten(
            [next(rest) if leaf is None else leaf[0] for leaf in self.leaves], self.spec
        )
        return tower(*args, **kw)


@dataclass(frozen=True)
class _Outputs:
    """What a tower returns: its leaves and, where they are tensors, which of the engine's outputs
    and in which precision. Some return a tensor in several places."""

    leaves: tuple[Any, ...]
    spec: Any
    places: tuple[int, ...]

    @classmethod
    def of(cls, returned: Any) -> _Outputs:
        leaves, spec = tree_flatten(returned)
        firsts: dict[int, int] = {}
        made: list[Any] = []
        for place, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                made.append((None, leaf))
                continue
            firsts.setdefault(id(leaf), place)
            made.append((list(firsts).index(id(leaf)), leaf.dtype))
        return cls(tuple(made), spec, tuple(firsts.values()))

    def chosen(self, returned: Any) -> tuple[Tensor, ...]:
        """The output tensors that the engine returns."""
        leaves, _ = tree_flatten(returned)
        return tuple(leaves[place] for place in self.places)

    def joined(self, pictures: Sequence[Sequence[Array]]) -> Any:
        """What the tower returns, of what an engine made of each picture."""
        arrays = pictures[0]
        if len(pictures) > 1:
            arrays = [np.concatenate(rows) for rows in zip(*pictures, strict=True)]
        tensors = [torch.from_numpy(array) for array in arrays]
        leaves = [x if at is None else tensors[at].to(x) for at, x in self.leaves]
        return tree_unflatten(leaves, self.spec)


def _plain(tensor: Tensor) -> Tensor:
    return (tensor.float() if tensor.is_floating_point() else tensor).detach().contiguous()


class _Called(Exception):
    """Raised out of a tower's place, once it is known how it is called."""

    def __init__(self, call: _Call) -> None:
        super().__init__()
        self.call = call


class _Stops(nn.Module):
    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.__dict__["_tower"] = tower

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_tower"], name)

    def __call__(self, *args: Any, **kw: Any) -> Any:
        raise _Called(_Call.of(self._tower, args, kw))


def _watched(model: nn.Module, path: str, tower: nn.Module, example: Any) -> tuple[_Call, _Outputs]:
    """How the model calls its tower for an example, with two pictures that are drawn in place of
    the example's, and what it gets."""
    if example is None:
        raise ValueError("the model's processor made nothing of a picture to try it on.")
    root = twin(model)
    graft(root, path, _Stops(tower))
    call = None
    try:
        root.generate(**example, max_new_tokens=1, do_sample=False)  # type: ignore[operator]
    except _Called as called:
        call = called.call
    if call is None:
        raise ValueError("the model answered without it.")
    if not (call.has_rows and any(map(_is_pictures, call.tensors))):
        raise ValueError(
            f"{type(tower).__name__} reads images in patches of no one size, which is not exported."
        )
    call = replace(call, tensors=tuple(map(_drawn, call.tensors)))
    return call, _Outputs.of(call.run(tower, call.tensors))


def _is_pictures(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_floating_point()


def _drawn(like: Tensor) -> Tensor:
    """Two pictures, of coarse and of fine noise, in the range that processors give; of another
    tensor its first row twice."""
    if not _is_pictures(like):
        return like[:1].repeat(2, *[1] * (like.dim() - 1))
    draw = torch.Generator().manual_seed(0)
    _, channels, height, width = like.shape
    coarse = torch.randn(1, channels, 8, 8, generator=draw)
    coarse = F.interpolate(coarse, size=(height, width), mode="bilinear")
    fine = torch.rand(1, channels, height, width, generator=draw) * 2 - 1
    return torch.cat((coarse, fine)).to(like)


# -- exports ---------------------------------------------------------------------------------------


def _checked(name: str, tower: nn.Module, call: _Call, outputs: _Outputs) -> Run:
    """What runs the tower, as it was kept or is exported now. Raise where it is not the tower."""
    own = tower
    if scheme(tower) is not None or float_dtype(tower) != torch.float32:
        own = float_copy(tower, torch.float32).float()
    inputs = [_plain(tensor) for tensor in call.tensors]
    with torch.inference_mode():
        expected = [t.numpy() for t in outputs.chosen(call.run(own, inputs))]
    folder = cache_folder("vision") / _digest_of(tower, call)

    def loaded(file: Path) -> Run:
        plain = ROUNDED.get(name, name)
        run = _near(ENGINES[plain](file), call, expected, TOLERANCE)  # the export is the tower
        if name == plain:
            return run
        return _near(ENGINES[name](file), call, expected, TOLERANCE_ROUNDED)

    with suppress(Exception):  # nothing is kept, or it is damaged
        return loaded(folder / FILE)
    log.info("exporting the vision tower to %s; this is done once", folder)
    try:
        with atomic_folder(folder, owns=(FILE, f"{FILE}.data")) as staging:
            _export(own, call, outputs, inputs, staging / FILE)
        return loaded(folder / FILE)
    except StorageError as error:
        log.info("The exported tower is not kept (%s): it is exported again.", error.problem)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as staging_name:
            file = Path(staging_name) / FILE
            _export(own, call, outputs, inputs, file)
            return loaded(file)


def _near(run: Run, call: _Call, expected: Sequence[Array], allowed: float) -> Run:
    """`run` itself. Raise `ValueError` where its outputs are not those expected, to rounding."""
    made = [np.concatenate(rows) for rows in zip(*map(run, call.pictures()), strict=True)]
    far = max(_distance(*pair) for pair in zip(made, expected, strict=True))
    if not far <= allowed:
        raise ValueError(
            f"what it makes of two pictures is {far:.1e} away from the tower's own, and rounding "
            f"is at most {allowed:g}."
        )
    return run


def _distance(one: Array, other: Array) -> float:
    if one.shape != other.shape:
        return float("inf")
    length = float(np.linalg.norm(other.astype(np.float64)))
    return float(np.linalg.norm(one.astype(np.float64) - other)) / (length or 1.0)


def _digest_of(tower: nn.Module, call: _Call) -> str:
    """The digest of all that an export is made of, except code, whose changes its outputs show."""
    import onnxscript
    import transformers

    versions = (LAYOUT, torch.__version__, transformers.__version__, onnxscript.__version__)
    tensors = [*tower.named_parameters(), *tower.named_buffers()]
    kinds = [type(part).__qualname__ for part in tower.modules()]
    config = str(getattr(tower, "config", ""))
    return digest([versions, kinds, config, call.way, *tensors])


class _Exported(nn.Module):
    """A tower as a function of tensors."""

    def __init__(self, tower: nn.Module, call: _Call, outputs: _Outputs) -> None:
        super().__init__()
        self.tower, self._call, self._outputs = tower, call, outputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self._outputs.chosen(self._call.run(self.tower, tensors))


def _export(
    tower: nn.Module, call: _Call, outputs: _Outputs, inputs: Sequence[Tensor], file: Path
) -> None:
    one = tuple(tensor[:1].clone() for tensor in inputs)
    with _plain_attention(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Exported(tower, call, outputs).eval(), one, dynamo=True, verbose=False
        )
        assert program is not None
        program.save(os.fspath(file))


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Switch PyTorch's fused encoder layer off: no exporter knows it."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


# -- engines ---------------------------------------------------------------------------------------


def _onnxruntime(file: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Its threads would spin on where others compute, between two pictures.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        os.fspath(file), options, providers=["CPUExecutionProvider"]
    )
    names = [given.name for given in session.get_inputs()]
    return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))


def _in_int8(file: Path) -> Run:
    """Weights of products are 8 bits a row, and states are rounded to 8 as they come. Convolutions
    stay: in int8 they lose the layout that makes them fast."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        rounded, heard = Path(folder) / FILE, root.disabled
        root.disabled = True  # it advises, on the root logger, what the exporter has done
        try:
            quantize_dynamic(
                file,
                rounded,
                op_types_to_quantize=["MatMul", "Gemm"],
                weight_type=QuantType.QInt8,
                per_channel=True,
            )
        finally:
            root.disabled = heard
        return _onnxruntime(rounded)


def _openvino(file: Path, precision: str = "f32") -> Run:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": precision,  # else bfloat16, where the processor has it
    }
    request = openvino.Core().compile_model(os.fspath(file), "CPU", settings).create_infer_request()
    turn = threading.Lock()

    def run(arrays: Sequence[Array]) -> list[Array]:
        with turn:
            request.infer(dict(enumerate(arrays)), share_inputs=True)
            return [np.array(tensor.data) for tensor in request.output_tensors]

    return run


ENGINES: dict[str, Any] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    IN_BF16: partial(_openvino, precision="bf16"),
    IN_INT8: _in_int8,
}
"""What can run a tower, and how a file of it is loaded."""
