"""Files are whole or untouched, JSON is valid, digests are stable."""

import contextlib
import hashlib
import os
import resource
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from offramp.common.folders import cache_folder, check_writable, locked_folder
from offramp.common.jsonl_log import JsonlLog
from offramp.core import storage
from offramp.core.errors import DataError, InputError, StorageError
from offramp.core.storage import places


@contextlib.contextmanager
def disk_with_room_for(size: int) -> Iterator[None]:
    """Let the system itself refuse to grow any file past `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# folders


@pytest.mark.parametrize("value", ["", "cache", "./cache", "../cache"])
def test_of_the_working_folder_nothing_kept_is_loaded(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled kernels were, where the variable held no absolute path."""
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("native") == tmp_path / ".cache" / "offramp" / "native"
    monkeypatch.setenv("HOME", "here")
    with pytest.raises(RuntimeError):
        cache_folder("native")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert cache_folder("native") == tmp_path / "own" / "offramp" / "native"


# write_atomic


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_what_is_no_plain_file_is_not_replaced(kind: str, tmp_path: Path) -> None:
    """Such as /dev/null, of which every program of the machine would find a file."""
    place = tmp_path / "place"
    with socket.socket(socket.AF_UNIX) as line:
        if kind == "pipe":
            os.mkfifo(place)
        else:
            line.bind(str(place))
        before = place.lstat()
        for target in (place, tmp_path / "link"):
            if target != place:
                target.symlink_to(place)
            with pytest.raises(StorageError, match="no plain file"):
                check_writable(target)
            with pytest.raises(StorageError, match="no plain file"):
                storage.write_atomic(target, "text")
        assert place.lstat().st_mode == before.st_mode and names(tmp_path) == ["link", "place"]


@pytest.mark.parametrize("name", ["a\x00b", "x" * 5000, "x/" * 3000])
def test_names_that_no_file_can_have_are_refused(name: str, tmp_path: Path) -> None:
    for call in (check_writable, lambda path: storage.write_atomic(path, "text")):
        with pytest.raises(StorageError, match="Cannot write"):
            call(f"{tmp_path}/{name}")


def test_text_is_written_as_utf_8_into_folders_that_are_made(tmp_path: Path) -> None:
    storage.write_atomic(tmp_path / "a" / "b" / "note.txt", "naïve café")
    assert (tmp_path / "a" / "b" / "note.txt").read_bytes() == "naïve café".encode()


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    with disk_with_room_for(1000), pytest.raises(StorageError, match=r"report\.json"):
        storage.write_atomic(path, b"x" * 5000)
    assert (path.read_text(), names(tmp_path)) == ("old", ["report.json"])


def test_who_reads_while_a_file_is_replaced_reads_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    with open(path) as reader:
        storage.write_atomic(path, "new content")
        assert (reader.read(), path.read_text()) == ("old", "new content")


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "report.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        storage.write_atomic(path, "new")
    assert (path.read_text(), names(tmp_path)) == ("old", ["report.json"])


def test_a_folder_in_the_place_of_a_parent_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        storage.write_atomic(tmp_path / "file" / "report.json", "new")


def test_a_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    storage.write_atomic(tmp_path / "atomic", "")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_still_leads_to_the_file_that_was_written(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    storage.write_atomic(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


# atomic_folder


def test_a_new_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    with storage.atomic_folder(tmp_path / "exits") as staging:
        (staging / "a.json").write_text("1")
        assert not (tmp_path / "exits").exists()
    assert names(tmp_path) == ["exits"] and names(tmp_path / "exits") == ["a.json"]


def test_an_error_inside_the_block_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), storage.atomic_folder(tmp_path / "exits") as staging:
        (staging / "a.json").write_text("1")
        _ = 1 / 0
    assert names(tmp_path) == []


def test_other_files_of_an_existing_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "a.json").write_text("old")
    with storage.atomic_folder(tmp_path) as staging:
        (staging / "a.json").write_text("new")
        (staging / "deep").mkdir()
        (staging / "deep" / "b.json").write_text("2")
    assert names(tmp_path) == ["a.json", "deep", "notes.txt"]
    assert (tmp_path / "a.json").read_text() == "new"
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_full_disk_leaves_the_old_folder_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "exits"
    target.mkdir()
    (target / "a.bin").write_text("old a")
    (target / "b.bin").write_text("old b")
    with (
        disk_with_room_for(1000),
        pytest.raises(StorageError),
        storage.atomic_folder(target) as staging,
    ):
        (staging / "a.bin").write_text("new a")
        (staging / "b.bin").write_bytes(b"x" * 5000)
    assert [(target / name).read_text() for name in names(target)] == ["old a", "old b"]
    assert names(tmp_path) == ["exits"]


# JSON


def test_json_reads_back_as_it_was_written(tmp_path: Path) -> None:
    value = {"caption": "ein Hündchen", "depths": [1, 2], "score": 0.5, "split": None}
    storage.write_json(tmp_path / "v.json", value)
    assert storage.read_json(tmp_path / "v.json") == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), Path("x"), "\ud800"])
def test_what_is_not_json_is_refused_before_the_old_file_is_touched(
    tmp_path: Path, value: object
) -> None:
    path = tmp_path / "v.json"
    path.write_text("{}")
    with pytest.raises(InputError):
        storage.write_json(path, {"value": value})
    assert path.read_text() == "{}"


@pytest.mark.parametrize("content", [b'{"a": ', b"", b"\xff\xfe{}"])
def test_invalid_json_is_a_data_error_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "v.json").write_bytes(content)
    with pytest.raises(DataError, match=r"v\.json"):
        storage.read_json(tmp_path / "v.json")


def test_a_missing_file_is_a_storage_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"v\.json"):
        storage.read_json(tmp_path / "v.json")


# JsonlLog


def test_a_row_can_be_read_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    with JsonlLog(tmp_path / "log.jsonl") as log:
        for step in range(3):
            log.append({"step": step})
            assert JsonlLog.read(log.path)[-1] == {"step": step}


def test_a_log_that_is_opened_again_goes_on(tmp_path: Path) -> None:
    for step in range(3):
        with JsonlLog(tmp_path / "log.jsonl") as log:
            log.append({"step": step})
    assert [row["step"] for row in JsonlLog.read(log.path)] == [0, 1, 2]


@pytest.mark.parametrize("tail", ['{"step": 1', '{"step": 1}x', "12"])
def test_a_torn_last_line_costs_only_itself(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n' + tail)
    assert JsonlLog.read(path) == [{"step": 0}]
    with JsonlLog(path) as log:
        log.append({"step": 2})
    assert JsonlLog.read(path) == [{"step": 0}, {"step": 2}]


def test_a_whole_last_line_without_its_newline_counts(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}')
    with JsonlLog(path) as log:
        log.append({"step": 2})
    assert [row["step"] for row in JsonlLog.read(path)] == [0, 1, 2]


def test_a_damaged_line_in_the_middle_is_reported_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(DataError, match="line 2"):
        JsonlLog.read(path)


def test_a_full_disk_costs_only_the_row_that_did_not_fit(tmp_path: Path) -> None:
    with JsonlLog(tmp_path / "log.jsonl") as log:
        log.append({"step": 0})
        with disk_with_room_for(100), pytest.raises(StorageError):
            log.append({"text": "x" * 500})
        log.append({"step": 2})
    assert JsonlLog.read(log.path) == [{"step": 0}, {"step": 2}]


def test_a_row_with_nan_is_refused_and_not_written(tmp_path: Path) -> None:
    with JsonlLog(tmp_path / "log.jsonl") as log:
        with pytest.raises(InputError):
            log.append({"loss": float("nan")})
        assert log.path.read_bytes() == b""


# Digests


def test_digest_file_is_the_sha_256_of_its_content(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"content")
    assert storage.digest_file(tmp_path / "f") == hashlib.sha256(b"content").hexdigest()


def test_digest_rows_is_the_same_on_every_machine_and_version() -> None:
    compact = b'{"a":[1,2.5,"\\u00e9"],"b":null}\n[]\n'
    rows = [{"b": None, "a": (1, 2.5, "é")}, []]
    assert storage.digest_rows(rows) == hashlib.sha256(compact).hexdigest()


def test_digest_rows_sees_the_order_of_rows() -> None:
    assert storage.digest_rows([1, 2]) != storage.digest_rows([2, 1])


def test_digest_rows_sees_where_a_row_ends() -> None:
    assert len({storage.digest_rows(rows) for rows in ([12], [1, 2], ["1\n2"], [])}) == 4


# -- places ------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_files_have_the_modes_that_the_umask_allows(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with storage.atomic_folder(tmp_path / "exits") as staging:
            (staging / "private").touch(mode=0o600)
        storage.write_atomic(tmp_path / "file", "text")
    finally:
        os.umask(before)
    for path in (tmp_path / "exits" / "private", tmp_path / "file"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask


KILLED = """
import os, signal
from offramp.core import storage
from offramp.core.storage import places
with storage.atomic_folder({path!r}) as staging:
    (staging / "file").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_dead_save_left_is_removed_by_the_next(tmp_path: Path) -> None:
    code = KILLED.format(path=str(tmp_path / "exits"))
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode < 0
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".tmp")
    mine = tmp_path / places.temporary_name()  # of a process that lives
    mine.mkdir()
    places._tidied.discard(tmp_path)
    storage.write_atomic(tmp_path / "report.json", "{}")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([mine.name, "report.json"])


def test_a_folder_is_locked_for_one_run_until_that_has_ended(tmp_path: Path) -> None:
    with locked_folder(tmp_path):
        lock = f"locked_folder({str(tmp_path)!r}).__enter__()"
        other = f"from offramp.common.folders import locked_folder; {lock}"
        done = subprocess.run([sys.executable, "-c", other], capture_output=True, check=False)
        assert done.returncode == 1 and b"Another run" in done.stderr
    with locked_folder(tmp_path):
        pass


@pytest.mark.parametrize("folder", [False, True])
def test_what_could_not_be_written_is_told_before(folder: bool, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    wrong = [
        tmp_path / "file" / "below",
        tmp_path / "file" / "below" / "that",
        tmp_path / ("x" * 300),
        tmp_path / ("x" * 300) / "below",
        tmp_path / "new" / ("x" * 300),
        tmp_path / ("file" if folder else "folder"),
    ]
    for path in wrong:
        with pytest.raises(StorageError, match="Cannot write"):
            check_writable(path, folder=folder)
    for path in (tmp_path / "new", tmp_path / "new" / "and" / "deeper"):
        check_writable(path, folder=folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_pipe_is_refused_rather_than_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StorageError, match="not a plain file"):
        storage.read_json(tmp_path / "pipe")


def test_json_that_is_too_deep_or_too_large_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="nested too deeply"):
        storage.read_json(tmp_path / "deep.json")
    (tmp_path / "large.json").write_text("[1, 2, 3]")
    with pytest.raises(DataError, match="9 bytes; at most 8"):
        storage.read_json(tmp_path / "large.json", largest=8)


def test_a_folder_is_not_put_in_a_files_place(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(StorageError, match="not a folder"), storage.atomic_folder(file) as staging:
        (staging / "adapter.json").write_text("{}")
    assert file.read_text() == "mine" and [*tmp_path.iterdir()] == [file]


def test_what_lies_in_folders_of_a_folder_stays_where_it_is(tmp_path: Path) -> None:
    inner = tmp_path / "exits" / "photos"
    inner.mkdir(parents=True)
    (inner / "one.jpg").write_bytes(b"1")
    before = os.stat(inner).st_ino, os.stat(inner / "one.jpg").st_ino
    with storage.atomic_folder(tmp_path / "exits") as staging:
        (staging / "adapter.json").write_text("{}")
    assert (os.stat(inner).st_ino, os.stat(inner / "one.jpg").st_ino) == before
    assert (tmp_path / "exits" / "adapter.json").read_text() == "{}"


def test_a_link_in_a_cache_is_replaced_and_not_followed(tmp_path: Path) -> None:
    system, kept = tmp_path / "system", tmp_path / "kept"
    system.write_text("the system's")
    kept.symlink_to(system)
    storage.write_atomic(kept, "ours", follow=False)
    assert system.read_text() == "the system's" and kept.read_text() == "ours"
    assert not kept.is_symlink()


def test_a_file_keeps_its_mode_when_it_is_written_again(tmp_path: Path) -> None:
    file = tmp_path / "secret.json"
    storage.write_json(file, {"a": 1})
    file.chmod(0o600)
    storage.write_json(file, {"a": 2})
    assert file.stat().st_mode & 0o777 == 0o600 and storage.read_json(file) == {"a": 2}


@contextlib.contextmanager
def as_somebody() -> Iterator[tuple[Path, int]]:
    """A folder of a user who is not root, and that user, who acts inside the block."""
    user = 65534 if os.geteuid() == 0 else os.geteuid()
    with tempfile.TemporaryDirectory() as name:
        folder, root = Path(name), os.geteuid()
        os.chown(folder, user, -1)
        os.seteuid(user)
        try:
            yield folder, user
        finally:
            os.seteuid(root)


def test_folders_that_cannot_be_read_keep_what_they_hold() -> None:
    with as_somebody() as (folder, _):
        closed = folder / "exits" / "private"
        closed.mkdir(parents=True)
        (closed / "letter").write_text("mine")
        (folder / "exits" / "notes.txt").write_text("mine")
        closed.chmod(0)
        with storage.atomic_folder(folder / "exits") as staging:
            (staging / "adapter.json").write_text("{}")
        assert closed.stat().st_mode & 0o777 == 0
        closed.chmod(0o700)
        assert (closed / "letter").read_text() == "mine"
        assert names(folder / "exits") == ["adapter.json", "notes.txt", "private"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root writes into others' folders")
def test_a_users_folder_stays_the_users_when_root_saves_there(tmp_path: Path) -> None:
    target = tmp_path / "exits"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    for path in (target, target / "notes.txt"):
        os.chown(path, 65534, -1)
    with storage.atomic_folder(target) as staging:
        (staging / "adapter.json").write_text("{}")
    assert {target.stat().st_uid, (target / "notes.txt").stat().st_uid} == {65534}
    assert names(target) == ["adapter.json", "notes.txt"]


@pytest.mark.parametrize("apart", ["boot", "namespace"])
def test_two_containers_of_one_name_leave_each_others_files_alone(
    apart: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process numbers of one mean nothing in the other."""
    mine = places._machine()
    if apart == "boot":
        monkeypatch.setattr(Path, "read_text", lambda *_, **__: "another start")
    else:
        monkeypatch.setattr(os, "readlink", lambda _: "pid:[1]")
    assert places._machine() != mine and places._machine().split()[0] == mine.split()[0]
    theirs = hashlib.sha256(places._machine().encode()).hexdigest()[:8]
    half = tmp_path / f".offramp-{theirs}-999999999-{'0' * 16}.tmp"
    half.mkdir()
    places.remove_dead(tmp_path)
    assert half.is_dir()


def test_where_there_are_no_signals_to_ask_by_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows, where a signal of 0 is Ctrl+C, and the longest name is not told."""
    monkeypatch.delattr(os, "pathconf")
    check_writable(tmp_path / "report.json")
    with pytest.raises(StorageError, match="Cannot write"):
        check_writable(tmp_path / ("x" * 300))
    sent: list[int] = []
    monkeypatch.setattr(os, "kill", lambda process, _: sent.append(process))
    monkeypatch.setattr(os, "name", "nt")
    alive = places._is_alive(999_999_999)
    monkeypatch.setattr(os, "name", "posix")
    assert alive and not sent
