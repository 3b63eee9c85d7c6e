"""Laws of compiled libraries that are kept: only what this user compiled here is ever loaded."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from offramp_llama_cpp.native import compiling
from offramp_llama_cpp.native.recipe import built

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler on this machine")
GOOD = "int answer(void) { return 42; }\n"
PLANTED = """
#include <stdio.h>
__attribute__((constructor)) static void run(void) { FILE *f = fopen("%s", "w"); if (f) fclose(f); }
int answer(void) { return 13; }
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache folder, and a source of one function beside the module."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "made.c").write_text(GOOD)
    monkeypatch.setattr(compiling, "__file__", str(source / "compiling.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    compiling.compiled.cache_clear()
    yield tmp_path / "cache" / "offramp" / "native"
    compiling.compiled.cache_clear()


def answer() -> int:
    """Of the library as a process that just starts has it."""
    compiling.compiled.cache_clear()
    library = compiling.compiled("made")
    assert library is not None
    return int(library.answer())


def kept(cache: Path) -> Path:
    [library] = cache.glob("made-*.so")
    return library


def planted(tmp_path: Path) -> tuple[bytes, Path]:
    """A library that leaves a trace when it is loaded, and the trace."""
    trace = tmp_path / "trace"
    (tmp_path / "evil.c").write_text(PLANTED % trace)
    made = tmp_path / "evil.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", made, tmp_path / "evil.c"], check=True)
    return made.read_bytes(), trace


def seal(library: Path) -> None:
    """Write the digest that belongs to a file."""
    beside = library.with_name(f"{library.name}.sha256")
    beside.write_text(hashlib.sha256(library.read_bytes()).hexdigest())
    for file in (library, beside):
        file.chmod(0o600)


def test_a_library_is_compiled_once_and_kept_for_its_user_alone(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.umask(before := os.umask(0))
    os.umask(0)
    try:
        assert answer() == 42
    finally:
        os.umask(before)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert [stat.S_IMODE(file.stat().st_mode) for file in cache.iterdir()] == [0o600, 0o600]

    def never(*_: object) -> None:
        raise AssertionError("it was compiled again")

    monkeypatch.setattr(compiling, "_compile", never)
    assert answer() == 42


def test_a_file_without_its_digest_is_not_loaded(cache: Path, tmp_path: Path) -> None:
    """As anybody could have planted it, before the first start or after it."""
    content, trace = planted(tmp_path)
    assert answer() == 42
    library = kept(cache)
    library.unlink()  # who has it loaded keeps the old one
    library.write_bytes(content)
    assert answer() == 42 and not trace.exists()
    shutil.rmtree(cache)
    cache.mkdir()
    library.write_bytes(content)
    assert answer() == 42 and not trace.exists()


def other_owner(file: Path) -> None:
    os.chown(file, 12345, 12345)


def writable(file: Path) -> None:
    file.chmod(0o666)


def group_writable(file: Path) -> None:
    file.chmod(0o620)


def link(file: Path) -> None:
    moved = file.parent.parent / f"moved-{file.name}"
    file.rename(moved)
    file.symlink_to(moved)


def fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file, 0o600)


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


CHANGES: list[Callable[[Path], None]] = [writable, group_writable, link, fifo]
if hasattr(os, "geteuid") and os.geteuid() == 0:
    CHANGES.append(other_owner)


@pytest.mark.parametrize("part", ["library", "digest", "folder"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_others_could_have_written_is_not_loaded(
    change: Callable[[Path], None], part: str, cache: Path, tmp_path: Path
) -> None:
    if part == "folder" and change is fifo:
        change = link
    content, trace = planted(tmp_path)
    assert answer() == 42
    library = kept(cache)
    library.unlink()
    library.write_bytes(content)
    seal(library)
    beside = library.with_name(f"{library.name}.sha256")
    change({"library": library, "digest": beside, "folder": cache}[part])
    assert answer() == 42
    assert not trace.exists()


@pytest.mark.parametrize("cut", [0, 1, 100, 5000, -1])
def test_a_library_that_was_cut_short_is_compiled_again(cut: int, cache: Path) -> None:
    """In a process of its own: it would end by a signal."""
    assert answer() == 42
    library = kept(cache)
    whole = library.read_bytes()
    library.unlink()  # this process has it loaded
    library.write_bytes(whole[:cut])
    script = (
        "from offramp_llama_cpp.native import compiling\n"
        f"compiling.__file__ = {compiling.__file__!r}\n"
        "print(compiling.compiled('made').answer())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr
    assert library.read_bytes() == whole


def test_where_nothing_can_be_kept_it_is_compiled_each_time(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert answer() == 42
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    cache.mkdir(parents=True)
    (cache / "offramp").symlink_to(cache / "elsewhere")
    assert answer() == 42


def test_where_nothing_that_is_kept_may_be_run_it_is_compiled_each_time(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system that was mounted so."""
    load = ctypes.CDLL

    def run(path: str) -> ctypes.CDLL:
        if Path(path).parent == cache:
            raise OSError("failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(ctypes, "CDLL", run)
    assert [answer(), answer(), answer()] == [42, 42, 42]


@pytest.mark.parametrize("cc", ["env cc", "cc -DX='1 2'", " cc ", ""])
def test_a_compiler_may_have_arguments(
    cc: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", cc)
    assert answer() == 42


@pytest.mark.parametrize("cc", ["no-such-compiler", "cc 'x", "/etc/passwd", "env no-such-compiler"])
def test_a_compiler_that_is_none_is_no_error(
    cc: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", cc)
    assert compiling.compiled("made") is None


def test_what_a_wheel_brought_is_compiled_where_it_does_not_load(cache: Path) -> None:
    """As on an older system than the one that built it."""
    source = Path(compiling.__file__).with_name("made.c")
    brought = built(source, (), None)
    brought.parent.mkdir()
    brought.write_bytes(b"no library")
    assert answer() == 42 and kept(cache).is_file()
