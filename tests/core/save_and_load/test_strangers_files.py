"""A stranger's artefacts: nothing hangs, nothing goes unchecked in silence, nothing is obeyed."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import random
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import RunCommand

from offramp.adapter.adapter import Adapter
from offramp.adapter.shipped import load_tiny, tiny_exits
from offramp.core.errors import AdapterError, InputError, OfframpError, StorageError, printable
from offramp.core.save_and_load import CONFIG, EXITS, SEEN, read_config
from offramp.core.save_and_load.config import sealed
from offramp.core.storage import check_plain, digest_file, read_json

SHIPPED = tiny_exits("opt")
ODD = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\u200f\x00\x7f"
"""What a terminal obeys, or what turns the direction of a text."""


@pytest.fixture(scope="module")
def backbone() -> Any:
    return load_tiny("opt", device="cpu")[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED, tmp_path / "exits"))


def entries(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    config.pop("digest", None)
    return config


def write(folder: Path, config: dict[str, Any]) -> None:
    (folder / CONFIG).write_text(json.dumps(sealed(config)))


# -- files that are none ---------------------------------------------------------------------------


def pipe(file: Path) -> None:
    os.mkfifo(file)


def zeros(file: Path) -> None:
    file.symlink_to("/dev/zero")


def terminal(file: Path) -> None:
    file.symlink_to("/dev/tty")


def line(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(file))


def loop(file: Path) -> None:
    file.symlink_to(file.name)


@pytest.mark.parametrize("make", [pipe, zeros, terminal, line, loop])
@pytest.mark.parametrize("name", [CONFIG, EXITS, SEEN])
def test_a_file_that_is_none_is_refused(
    name: str, make: Any, folder: Path, backbone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / name).unlink()
    make(folder / name)
    with pytest.raises(AdapterError):
        Adapter.from_pretrained(backbone, folder)
    for reads in (check_plain, digest_file, read_json):
        with pytest.raises(StorageError):
            reads(folder / name)
    config = folder / CONFIG
    if name != CONFIG:  # also where nothing would be compared with it
        unchecked = {n: v for n, v in entries(folder).items() if n != "files"}
        config.write_text(json.dumps(unchecked))
        if name == EXITS:
            with pytest.raises(AdapterError):
                Adapter.from_pretrained(backbone, folder)


# -- digests ---------------------------------------------------------------------------------------


def test_the_shipped_exits_have_digests_of_all_that_is_read() -> None:
    files = read_config(SHIPPED).files
    assert files is not None and files.keys() == {EXITS, SEEN, "attempts.json"}
    assert "digest" in json.loads((SHIPPED / CONFIG).read_text())


@pytest.mark.parametrize(
    "files", [{}, {SEEN: "0" * 64}, {EXITS: ""}, {EXITS: "x" * 64}, {EXITS: "0" * 63}, [], "x"]
)
def test_digests_that_leave_the_exits_out_are_refused(files: Any, folder: Path) -> None:
    write(folder, {**entries(folder), "files": files})
    with pytest.raises(AdapterError, match="'files'"):
        read_config(folder)


def test_an_adapter_without_digests_is_said_to_be_unchecked(
    folder: Path, backbone: Any, caplog: pytest.LogCaptureFixture, run: RunCommand
) -> None:
    with caplog.at_level(logging.WARNING):
        Adapter.from_pretrained(backbone, folder)
        assert "unchecked" not in caplog.text
        (folder / CONFIG).write_text(json.dumps({**entries(folder), "files": None}))
        Adapter.from_pretrained(backbone, folder)
        assert "unchecked" in caplog.text
        caplog.clear()
        assert run("inspect", folder)[0] == 0
        assert "unchecked" in caplog.text


# -- one spelling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", ["02", "+2", " 2", "2 ", "2.0", "٢", "0x2", "002", "2_0"])
def test_a_depth_has_one_spelling(depth: str, folder: Path) -> None:
    config = entries(folder)
    for name in ("thresholds", "drafts", "first"):
        changed = copy.deepcopy(config)
        changed["policy"].setdefault(name, {})[depth] = 0.5
        write(folder, changed)
        with pytest.raises(AdapterError, match=f"'policy.{name}' holds"):
            read_config(folder)


@pytest.mark.parametrize("twice", ['"depths": [2]', '"policy": {}', '"format": 1'])
def test_a_name_that_stands_there_twice_is_refused(twice: str, folder: Path) -> None:
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text("{" + twice + "," + text.lstrip()[1:])
    with pytest.raises(AdapterError, match="stands there twice"):
        read_config(folder)
    inner = text.replace('"thresholds": {', '"thresholds": {"2": 0.1, ', 1)
    (folder / CONFIG).write_text(inner)
    with pytest.raises(AdapterError, match="stands there twice"):
        read_config(folder)


# -- what is shown ---------------------------------------------------------------------------------


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """All entries of nested objects."""
    for name, part in value.items() if isinstance(value, dict) else ():
        yield (*at, name)
        yield from places(part, (*at, name))


@pytest.mark.slow
def test_what_a_strangers_json_holds_is_shown_and_not_obeyed(
    folder: Path, run: RunCommand, tmp_path: Path
) -> None:
    """Any entry, replaced by anything: no traceback, no escape, no page of text."""
    config = entries(folder)
    long, refused = "x" * 200_000, 0
    odd: tuple[Any, ...] = (ODD, {ODD: ODD}, [ODD], {long: 1}, long, None, -1, 1e308, {"a": [1]})
    for number, at in enumerate(places(config)):
        changed: Any = copy.deepcopy(config)
        holder = changed
        for name in at[:-1]:
            holder = holder[name]
        holder[at[-1]] = odd[number % len(odd)]
        (folder / CONFIG).write_text(json.dumps(changed))
        shown = [run("inspect", folder)]
        if number % 20 == 0:  # which takes longer
            shown.append(run("report", folder, "--out", tmp_path / "r.html"))
        for code, out, err in shown:
            assert code in (0, 1), (at, err)
            assert "Traceback" not in err and len(err) < 10_000, (at, err[:500])
            assert printable(out + err) == out + err, at
            refused += code
    assert refused > 20


def test_json_and_errors_escape_what_terminals_obey(folder: Path, run: RunCommand) -> None:
    config = entries(folder)
    config["provenance"]["command"] = ODD
    write(folder, config)
    code, out, _ = run("inspect", folder, "--json")
    assert code == 0 and printable(out) == out
    assert json.loads(out)["provenance"]["command"] == ODD
    error = InputError(f"{ODD}é\t字", "x" * 7_000_000)
    assert printable(str(error)) == str(error) and "é 字" in str(error)
    assert len(str(error)) < 5000
    assert printable("a\tb\né") == "a\tb\né"


# -- whatever is written there ---------------------------------------------------------------------

THINGS: tuple[Any, ...] = (
    None,
    True,
    -1,
    1.5,
    1e308,
    2**63,
    10**30,
    "",
    "x" * 5000,
    "\x00",
    "\ud800",
    "../../x",
    [],
    [[]],
    [1] * 1000,
    ["2"],
    [2, 2],
    {},
    {"": 0},
    {"2": "x"},
)


@pytest.mark.slow
def test_an_entry_of_any_kind_is_refused_or_written_again(
    folder: Path, backbone: Any, tmp_path: Path
) -> None:
    """By a seed: another thing in one place, or nothing there."""
    draw, config = random.Random(0), entries(folder)
    every, taken = [*places(config)], 0
    for number in range(120):
        changed, at = copy.deepcopy(config), draw.choice(every)
        inside = changed
        for name in at[:-1]:
            inside = inside[name]
        thing = draw.choice(THINGS)
        if draw.random() < 0.15:
            del inside[at[-1]]
        else:
            inside[at[-1]] = thing
        try:
            write(folder, changed)
        except (InputError, UnicodeEncodeError):
            continue
        try:
            adapter = Adapter.load(folder, backbone)
            assert repr(adapter) and adapter.standing() is not None
            if number % 4 == 0:
                adapter.save(tmp_path / "again")
            taken += 1
        except OfframpError as error:
            assert len(str(error).splitlines()) == 2 and len(str(error)) < 5000
        except Exception as error:
            raise AssertionError(f"{at} = {thing!r:.60}: {error!r}") from error
    assert 20 < taken < 110


# -- GGUF ------------------------------------------------------------------------------------------


@pytest.mark.llama_cpp
def test_gguf_files_without_their_keys_are_refused(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from gguf_cases import adapter_of

    from offramp_llama_cpp.gguf_export import export_gguf
    from offramp_llama_cpp.gguf_files import DIGESTS, read_segments

    adapter = adapter_of("llava")
    export_gguf(adapter, tmp_path / "whole", "q8_0")
    read_segments(tmp_path / "whole", adapter)
    reader = gguf.GGUFReader(tmp_path / "whole" / "segment-0.gguf")
    keys = {k: f.contents() for k, f in reader.fields.items() if k.startswith("offramp.")}
    files = sorted((tmp_path / "whole").glob("*.gguf"))
    folder = tmp_path / "broken"

    def write_keys(changes: dict[str, Any]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for place, file in enumerate(files):
            out = gguf.GGUFWriter(folder / file.name, "llama")
            for name, value in {**keys, "offramp.segment": place, **changes}.items():
                add = {int: out.add_uint32, str: out.add_string, list: out.add_array}
                if value is not None:
                    add[type(value)](name, value)
            out.write_header_to_file()
            out.write_kv_data_to_file()
            out.close()
        digests = {file.name: digest_file(folder / file.name) for file in files}
        (folder / DIGESTS).write_text(json.dumps(digests))

    write_keys({})
    read_segments(folder, adapter)
    needed = set(keys) - {f"offramp.{n}" for n in ("shortlist", "policy", "versions", "layers")}
    odd: tuple[Any, ...] = (None, 7, "x", "[]", "{}", "9" * 5000, "[" * 100_000)
    for name in needed:
        for value in odd:
            write_keys({name: value})
            if value is None:
                with pytest.raises(OfframpError, match=name.removeprefix("offramp.")):
                    read_segments(folder, adapter)
            else:
                with contextlib.suppress(OfframpError):
                    read_segments(folder, adapter)
    for content in ("{}", "[]", "5", '{"segment-0.gguf": 5}', '{"x": {}}', "null", ""):
        write_keys({})
        (folder / DIGESTS).write_text(content)
        with pytest.raises(OfframpError):
            read_segments(folder, adapter)
