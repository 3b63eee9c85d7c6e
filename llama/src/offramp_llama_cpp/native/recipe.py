"""What each library is compiled with. A wheel's build runs this file by its path, so it imports
nothing but the standard library."""

from __future__ import annotations

import hashlib
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
BUILT = "built"
"""The folder of libraries that a wheel brings."""
WITHOUT_HEADERS = ("tap",)
"""Libraries that need no header files of llama.cpp."""


def digest_of(source: Path, headers: Path | None, made_by: object) -> str:
    """Return the digest of what makes a library, and of all files that it is made of: its C file,
    the headers beside it and llama.cpp's."""
    digest = hashlib.sha256(repr(made_by).encode())
    others = [] if headers is None else [*headers.glob("ggml*.h"), *headers.glob("llama.h")]
    for file in (source, *sorted(source.parent.glob("*.h")), *sorted(others)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def built(source: Path, flags: tuple[str, ...], headers: Path | None) -> Path:
    """Return the file of a library that a wheel brings."""
    digest = digest_of(source, headers, (COMMAND, flags))
    return source.with_name(BUILT) / f"{source.stem}-{digest}.so"
