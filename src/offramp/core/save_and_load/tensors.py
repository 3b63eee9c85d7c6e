"""Tensors on disk as safetensors: what a file's header says is compared before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from offramp.core.errors import AdapterError, StorageError
from offramp.core.storage import check_plain

_FLOATS = {"F64", "F32", "F16", "BF16"}
_WHOLE = {"I64", "I32"}
_RESTORE = "Restore the folder, or train the exits again."

Shapes = Mapping[str, tuple[int, ...]]


def write_tensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors. Raise OSError where the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {n: t.detach().cpu().contiguous() for n, t in state.items()}
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # safetensors has its own error for a full disk
        raise OSError(str(error)) from error


def read_shapes(path: Path, whole: tuple[str, ...] = ()) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a file's tensors by name, from its header alone.

    whole: names of tensors that hold whole numbers; all others hold floating-point ones.

    Raises:
        AdapterError: the file cannot be read, or holds tensors of another kind.
    """
    from safetensors import SafetensorError, safe_open

    _check(path)
    try:
        with safe_open(path, framework="pt") as file:
            headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            kinds = {name: header.get_dtype() for name, header in headers.items()}
            shapes = {name: tuple(header.get_shape()) for name, header in headers.items()}
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    for name, kind in kinds.items():
        if kind not in (_WHOLE if name in whole else _FLOATS):
            raise AdapterError(f"{path}: the tensor {name[:60]!r} is of type {kind}.", _RESTORE)
    return shapes


def check_shapes(path: Path, expected: Shapes, whole: tuple[str, ...] = ()) -> None:
    """Raise `AdapterError` where the header's names and shapes are not exactly these."""
    shapes = read_shapes(path, whole)
    missing, unknown = expected.keys() - shapes.keys(), shapes.keys() - expected.keys()
    if missing or unknown:
        which = f"no {min(missing)!r}" if missing else f"{min(unknown)[:60]!r}, which is not known"
        raise AdapterError(f"{path} holds {which}.", _RESTORE)
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise AdapterError(
                f"{path}: the tensor {name!r} is {_shown(shapes[name])}, not {_shown(shape)}.",
                _RESTORE,
            )


def read_tensors(path: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the tensors of a file, on the CPU; floating-point ones as `dtype`, if one is given.

    Raises:
        AdapterError: the file cannot be read, or a value is not finite in that precision.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _check(path)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    for name, tensor in tensors.items():
        # A copy: the file's own memory is not aligned, which changes the last bit of a product.
        tensors[name] = tensor.to(dtype if tensor.is_floating_point() else None, copy=True)
        if tensor.is_floating_point() and not bool(tensors[name].isfinite().all()):
            precision = str(tensors[name].dtype).removeprefix("torch.")
            raise AdapterError(
                f"{path}: the tensor {name!r} is not finite in {precision}.", _RESTORE
            )
    return tensors


def _check(path: Path) -> None:
    try:
        check_plain(path)
    except StorageError as error:
        raise AdapterError(error.problem, _RESTORE) from error


def _unreadable(path: Path, error: Exception) -> AdapterError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return AdapterError(f"{path} cannot be read as tensors: {reason}.", _RESTORE)


def _shown(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"
