"""What each library is compiled with. A wheel's build runs this file by its path, so it imports
nothing but the standard library."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

COMMAND = ("-std=gnu11", "-O3", "-shared", "-fPIC")
AVX2 = ("-mavx2", "-mf16c", "-mfma")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni")
INSTRUCTIONS = (AVX512, AVX2)
"""What the kernels are compiled for: a processor takes the first that it has."""
LIBM = ("-lm",)
FLAGS: dict[str, tuple[tuple[str, ...], ...]] = {
    "tap": ((),),
    "drafts": (LIBM,),
    "products": INSTRUCTIONS,
}
"""By library, the flags of each of its builds."""
WITHOUT_HEADERS = ("tap",)
"""Libraries that need no header files of llama.cpp."""


def sources(source: Path, headers: Path | None) -> Iterable[Path]:
    """The files that a library is made of: its C file, the headers beside it and llama.cpp's."""
    others = [] if headers is None else [*headers.glob("ggml*.h"), *headers.glob("llama.h")]
    return (source, *sorted(source.parent.glob("*.h")), *sorted(others))


def built(source: Path, flags: tuple[str, ...], headers: Path | None) -> Path:
    """The file of a library that a wheel brought, by the digest of all that it is made of."""
    digest = hashlib.sha256(repr((COMMAND, flags)).encode())
    for file in sources(source, headers):
        digest.update(file.read_bytes())
    return source.with_name("built") / f"{source.stem}-{digest.hexdigest()[:16]}.so"
