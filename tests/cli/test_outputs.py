"""A command writes over what it wrote itself, and over nothing else unless it is told."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from command_line import RunCommand, assert_two_lines

TEXT = "what nobody wants to lose"
Contents = dict[str, bytes]


def contents(folder: Path) -> Contents:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter.json", "exits.safetensors", "README.md", "seen.json"])
def test_a_report_replaces_no_part_of_an_adapter(name: str, adapter: Path, run: RunCommand) -> None:
    before = contents(adapter)
    assert name in before
    found = run("report", adapter, "--out", adapter / name)
    assert_two_lines(found, name, "Give another --out")
    assert contents(adapter) == before


def test_a_report_replaces_reports_alone(adapter: Path, run: RunCommand, tmp_path: Path) -> None:
    asked = ("report", adapter, "--out")
    page = tmp_path / "page.html"
    assert run(*asked, page)[0] == 0
    assert run(*asked, page)[0] == 0
    first = page.read_bytes()
    page.write_text(f"<html>{TEXT}</html>")
    assert_two_lines(run(*asked, page), "page.html", "--overwrite")
    assert TEXT in page.read_text()
    link = tmp_path / "link.html"
    link.symlink_to(adapter / "adapter.json")
    assert_two_lines(run(*asked, link), "link.html")
    assert json.loads((adapter / "adapter.json").read_text())
    assert run(*asked, page, "--overwrite")[0] == 0
    assert page.read_bytes() == first
    page.write_bytes(b"")  # as mktemp makes it
    assert run(*asked, page)[0] == 0


@pytest.mark.parametrize("name", ["adapter.json", "exits.safetensors", "README.md"])
def test_no_word_has_a_report_replace_a_part_of_what_it_shows(
    name: str, adapter: Path, run: RunCommand, tmp_path: Path
) -> None:
    before = contents(adapter)
    (tmp_path / "link.html").symlink_to(adapter / name)
    for out in (adapter / name, tmp_path / "link.html"):
        found = run("report", adapter, "--out", out, "--overwrite")
        assert_two_lines(found, "reads")
        assert "--overwrite" not in found[2]
    assert contents(adapter) == before
    page = adapter / "report.html"
    for more in ((), (), ("--overwrite",)):
        assert run("report", adapter, "--out", page, *more)[0] == 0


@pytest.mark.parametrize("command", ["report", "verify"])
def test_a_pipe_is_not_waited_for(
    command: str, adapter: Path, run: RunCommand, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    read = (adapter,)
    found = run(command, *read, "--out", tmp_path / "pipe", "--overwrite")
    assert_two_lines(found, "no plain file")
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("command", ["train", "calibrate", "report", "export", "demo"])
def test_an_empty_name_is_no_place(command: str, run: RunCommand, tmp_path: Path) -> None:
    """Which would be the working folder."""
    assert_two_lines(run(command, "--out", ""), "--out", "empty")
    assert_two_lines(run(command, "--out=--"), "--out")


def test_a_command_never_replaces_what_it_reads(
    photos: Path, adapter: Path, run: RunCommand, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(photos, tmp_path / "photos")) / "rows.jsonl"
    before = data.read_bytes()
    for out in (data, tmp_path / "photos" / "." / "rows.jsonl"):
        for more in ((), ("--overwrite",)):
            found = run("report", adapter, "--data", data, "--out", out, *more)
            assert_two_lines(found, "rows.jsonl")
    hard = tmp_path / "hard.html"
    hard.hardlink_to(data)
    found = run("report", adapter, "--data", data, "--out", hard, "--overwrite")
    assert_two_lines(found, "reads")
    assert data.read_bytes() == before


# -- folders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("--lossless",)])
def test_another_adapter_is_not_replaced(
    more: tuple[str, ...], adapter: Path, held_out: Path, run: RunCommand, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    damaged = Path(shutil.copytree(adapter, tmp_path / "damaged"))
    (damaged / "adapter.json").write_text("{")
    tensors = bytearray((other / "exits.safetensors").read_bytes())
    tensors[-1] ^= 1
    (other / "exits.safetensors").write_bytes(tensors)
    config = json.loads((other / "adapter.json").read_text())
    del config["digest"]
    config["files"]["exits.safetensors"] = "0" * 64
    (other / "adapter.json").write_text(json.dumps(config))
    for out in (other, damaged):
        before = contents(out)
        asked = ("calibrate", "--adapter", adapter, "--data", held_out, "--out", out)
        found = run(*asked, *more)
        assert_two_lines(found, "already holds another adapter", "--overwrite")
        assert contents(out) == before


@pytest.mark.slow
def test_a_copy_of_the_same_exits_and_the_adapter_itself_are_written_to(
    adapter: Path, held_out: Path, run: RunCommand, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    asked = ("calibrate", "--adapter", adapter, "--data", held_out, "--target", 0.5, "--write")
    asked = (*asked, "--limit", 4, "--max-new-tokens", 3)
    for out in (copy, copy, adapter):
        code, _, err = run(*asked, "--out", out)
        assert code == 0, err
        assert json.loads((out / "adapter.json").read_text())["calibration"] is not None


def test_eval_replaces_no_result_of_another_run(
    adapter: Path, held_out: Path, run: RunCommand, tmp_path: Path
) -> None:
    (tmp_path / "result.json").write_text(TEXT)
    found = run(
        "eval", "--adapter", adapter, "--task", "captions", "--data", held_out, "--out", tmp_path
    )
    assert_two_lines(found, "result.json", "--out")
    assert (tmp_path / "result.json").read_text() == TEXT
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_demo_replaces_demos_alone(adapter: Path, run: RunCommand, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "a" / "opt")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "report.json").write_text(json.dumps({"mine": TEXT}))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "report-opt.json").write_text(TEXT)
    for name in "abc":
        before = contents(tmp_path / name)
        assert_two_lines(run("demo", "--out", tmp_path / name), "--overwrite")
        assert contents(tmp_path / name) == before
