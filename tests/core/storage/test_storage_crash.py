"""What a crash leaves on disk: the old or the new, and what was said to be there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offramp.common.jsonl_log import JsonlLog
from offramp.core import storage
from offramp.core.errors import StorageError
from offramp.core.storage import exchange, places

FILES = {"a.bin": "a", "deep/b.bin": "b", "z.json": "z"}


def write(folder: Path, generation: int, **more: Any) -> None:
    with storage.atomic_folder(folder, **more) as staging:
        (staging / "deep").mkdir()
        for name in FILES:
            (staging / name).write_text(f"{generation}")


def held(folder: Path) -> set[str]:
    return {(folder / name).read_text() for name in FILES}


WRITER = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
from test_storage_crash import write
for generation in range(1, 10_000):
    write(Path(sys.argv[1]), generation)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_a_folder_of_one_kind(tmp_path: Path) -> None:
    """Killed at any moment, of ten: all files are the old ones, or all are the new ones."""
    target = tmp_path / "exits"
    write(target, 0)
    (target / "mine.txt").write_text("mine")
    script = WRITER.format(path=[str(Path(__file__).parent)])
    begun = set()
    for turn in range(10):
        writer = subprocess.Popen([sys.executable, "-c", script, target])
        end = time.monotonic() + 60
        before = held(target)
        while held_quietly(target) in (before, None) and time.monotonic() < end:
            assert writer.poll() is None
            time.sleep(0.001)
        time.sleep(0.003 * turn)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        (generation,) = held(target)
        begun.add(generation)
        assert (target / "mine.txt").read_text() == "mine"
    assert len(begun) > 1
    places._tidied.clear()  # once a process
    write(target, 1)
    assert os.listdir(tmp_path) == ["exits"]  # what the dead left is gone


def held_quietly(folder: Path) -> set[str] | None:
    try:
        return held(folder)
    except OSError:
        return None


def test_who_reads_meanwhile_never_finds_half_of_each(tmp_path: Path) -> None:
    """By a folder that is open: what is opened by its path may be of two times."""
    target = tmp_path / "exits"
    write(target, 0)
    script = WRITER.format(path=[str(Path(__file__).parent)])
    writer = subprocess.Popen([sys.executable, "-c", script, target])
    seen = set()
    try:
        for _ in range(3000):
            descriptor = os.open(target, os.O_RDONLY)
            try:
                found = set()
                for name in FILES:
                    file = os.open(name, os.O_RDONLY, dir_fd=descriptor)
                    found.add(os.read(file, 100))
                    os.close(file)
            except FileNotFoundError:
                continue  # the old folder is being removed
            finally:
                os.close(descriptor)
            assert len(found) == 1
            seen |= found
    finally:
        writer.kill()
        writer.wait()
    assert seen


@pytest.mark.parametrize("swaps", [True, False])
def test_files_that_the_writer_owns_and_does_not_write_go(
    swaps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not swaps:
        monkeypatch.setattr(exchange, "_swap", lambda: None)
    target = tmp_path / "exits"
    write(target, 0)
    kept = {"owned.json": "old", "other.txt": "mine", "deep/more/c.txt": "mine"}
    for name, text in kept.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text)
    (target / "link").symlink_to("other.txt")
    (target / "folder").symlink_to("deep")
    os.mkfifo(target / "pipe")
    (target / "empty").mkdir(mode=0o750)
    number = (target / "other.txt").stat().st_ino
    with open(target / "deep" / "more" / "c.txt", "a") as log:
        write(target, 1, owns=("owned.json",))
        log.write(" and more")
    assert held(target) == {"1"}
    assert not (target / "owned.json").exists()
    assert (target / "other.txt").stat().st_ino == number
    assert (target / "deep" / "more" / "c.txt").read_text() == "mine and more"
    assert os.readlink(target / "link") == "other.txt"
    assert (target / "folder").is_symlink() and (target / "pipe").is_fifo()
    assert (target / "empty").stat().st_mode & 0o777 == 0o750
    assert os.listdir(tmp_path) == ["exits"]


def test_folders_are_exchanged_where_the_system_can(tmp_path: Path) -> None:
    target, new = tmp_path / "old", tmp_path / "new"
    for folder in (target, new):
        folder.mkdir()
    assert exchange.exchange_folder(new, target) or sys.platform == "win32"


def test_the_working_folder_stays_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "exits"
    write(target, 0)
    monkeypatch.chdir(target / "deep")
    write(target, 1)
    assert held(target) == {"1"}
    assert Path("b.bin").read_text() == "1"


@pytest.mark.parametrize("fails", ["link", "fsync"])
def test_what_cannot_be_exchanged_is_replaced_or_left(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "exits"
    write(target, 0)
    (target / "other.txt").write_text("mine")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, fails, refuse)
    if fails == "fsync":
        with pytest.raises(StorageError):
            write(target, 1)
    else:
        write(target, 1)
    assert held(target) == {"0" if fails == "fsync" else "1"}
    assert (target / "other.txt").read_text() == "mine"
    assert os.listdir(tmp_path) == ["exits"]


# -- synced ----------------------------------------------------------------------------------------


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was synced and renamed, in order."""
    done: list[str] = []

    def named(descriptor: int) -> str:
        return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))

    def noting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            what = named(arguments[0]) if name == "sync" else Path(arguments[1]).name
            done.append(f"{name} {what}")
            return real(*arguments)

        return call

    monkeypatch.setattr(os, "fsync", noting("sync", os.fsync))
    synced = "offramp.common.jsonl_log._sync_content"
    monkeypatch.setattr(synced, noting("sync", os.fdatasync))
    monkeypatch.setattr(os, "replace", noting("rename", os.replace))
    return done


def test_a_rename_is_on_disk_when_the_write_has_ended(tmp_path: Path, on_disk: list[str]) -> None:
    storage.write_json(tmp_path / "v.json", {})
    temporary, rename, folder = on_disk
    assert temporary.startswith("sync .offramp-") and rename == "rename v.json"
    assert folder == f"sync {tmp_path.name}"
    on_disk.clear()
    write(tmp_path / "exits", 1)
    assert on_disk[-2:] == ["rename exits", f"sync {tmp_path.name}"]
    on_disk.clear()
    write(tmp_path / "exits", 2)
    assert on_disk[-1] == f"sync {tmp_path.name}"
    assert {"sync a.bin", "sync b.bin", "sync z.json", "sync deep"} <= set(on_disk)


def test_a_row_is_on_disk_when_append_has_ended(tmp_path: Path, on_disk: list[str]) -> None:
    with JsonlLog(tmp_path / "log.jsonl") as log:
        assert on_disk == [f"sync {tmp_path.name}"]  # its name
        for _ in range(2):
            on_disk.clear()
            log.append({"a": 1})
            assert on_disk == ["sync log.jsonl"]
    on_disk.clear()
    with JsonlLog(tmp_path / "log.jsonl", synced=False) as log:
        on_disk.clear()
        log.append({"a": 2})
        assert on_disk == []
        log.sync()
        assert on_disk == ["sync log.jsonl"]


def test_a_row_that_is_not_on_disk_is_not_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with JsonlLog(tmp_path / "log.jsonl") as log:
        log.append({"a": 1})
        monkeypatch.setattr("offramp.common.jsonl_log._sync_content", full)
        with pytest.raises(StorageError, match="No space left"):
            log.append({"a": 2})
        with pytest.raises(StorageError, match="No space left"):
            log.sync()
    assert JsonlLog.read(tmp_path / "log.jsonl") == [{"a": 1}]


def test_a_checkpoint_is_never_unknown_to_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between any two writes, a run resumes from the state before or after."""
    import torch

    from offramp.training import checkpoint

    device = torch.device("cpu")
    checkpoint.save_state(tmp_path, {"seed": 1}, {"step": 0})
    real = checkpoint.write_atomic
    for stop in range(3):
        writes = 0

        def stopping(path: Path, data: Any, stop: int = stop) -> None:
            nonlocal writes
            if writes == stop:
                raise KeyboardInterrupt
            writes += 1
            real(path, data)

        monkeypatch.setattr(checkpoint, "write_atomic", stopping)
        before = checkpoint.load_state(tmp_path, {"seed": 1}, device)
        try:
            checkpoint.save_state(tmp_path, {"seed": 1}, {"step": stop + 1})
        except KeyboardInterrupt:
            assert stop < 2
        after = checkpoint.load_state(tmp_path, {"seed": 1}, device)
        assert before is not None and after is not None
        assert after["step"] in (before["step"], stop + 1)
    assert after["step"] == 3
    known = (tmp_path / checkpoint.DIGEST).read_text().split()
    assert known[0] == storage.digest_file(tmp_path / checkpoint.STATE)
