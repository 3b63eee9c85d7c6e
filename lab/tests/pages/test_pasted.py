"""What a page tells to paste runs as pasted: every block of README and getting started, in their
order, in a fresh folder.

A block is labelled with its language. One that needs more than this machine offline says so in a
comment before it, `<!-- needs: WORD -->`, and runs where `OFFRAMP_PASTED` names the word, with
commas between: index (a package index, in an environment of its own), minutes.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import parser_of

from offramp.cli.command_line import COMMANDS
from offramp.data.scenes import world
from offramp_lab.places import ROOT

INSTALLED = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
"""PATH where offramp is installed, as these tests are run by."""
PAGES = ("README.md", "docs/getting-started.md")
NEEDS = {"index", "minutes"}
PRINTS = {
    "README.md": (
        "one object on white",
        "of 12 layers",
        '"status":"ready"',
        "chat.completion",
        "Guaranteed with 95% confidence",
        "report.html",
    ),
    "docs/getting-started.md": ("proposed_depths", "Guaranteed with 95% confidence", "one object"),
}
"""Of what a page's blocks print."""
_BLOCK = re.compile(
    r"^(?:<!-- needs: (?P<needs>\S+) -->\n)?```(?P<kind>\S*)\n(?P<text>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    kind: str
    text: str
    needs: str | None


def blocks(page: str) -> list[Block]:
    found = _BLOCK.finditer((ROOT / page).read_text(encoding="utf-8"))
    return [Block(m["kind"], m["text"], m["needs"]) for m in found]


def asked_for() -> set[str]:
    return set(filter(None, os.environ.get("OFFRAMP_PASTED", "").split(",")))


def session(found: list[Block]) -> str:
    """One shell that is typed into; Python's blocks are one program, run where the last stands."""
    programs = [b.text for b in found if b.kind == "python"]
    lines, left = ["set -e"], len(programs)
    for block in found:
        if block.kind == "bash":
            lines.append(block.text)
        elif block.kind == "python":
            left -= 1
            if not left:
                lines.append("python - <<'PASTED'\n" + "\n".join(programs) + "PASTED")
    return "\n".join(lines) + "\n"


def check_port(found: list[Block]) -> None:
    """Skip where the server's port, 8000, is taken and the blocks start one."""
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("127.0.0.1", 8000))
        except OSError:
            if any("offramp serve" in block.text for block in found):
                pytest.skip("another program has port 8000, which the page's server takes")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_as_pasted(page: str, tmp_path: Path) -> None:
    found = [b for b in blocks(page) if b.needs is None]
    check_port(found)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "HOME": str(tmp_path),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "PATH": INSTALLED,
    }
    folder = tmp_path / "fresh"
    folder.mkdir()
    shell = subprocess.Popen(
        ["bash"],
        cwd=folder,
        env=environment,
        text=True,
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=(tmp_path / "out").open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        shell.communicate(session(found), timeout=1800)
    finally:
        with contextlib.suppress(ProcessLookupError):  # nothing was started behind it
            os.killpg(shell.pid, signal.SIGKILL)
    said = (tmp_path / "out").read_text(encoding="utf-8")
    assert shell.returncode == 0, said
    assert not [words for words in PRINTS[page] if words not in said], said


CASES = [(p, n) for p in PAGES for n, b in enumerate(blocks(p)) if b.needs is not None]


@pytest.mark.parametrize(("page", "place"), CASES)
def test_a_block_with_a_need_runs_where_that_is_met(page: str, place: int, tmp_path: Path) -> None:
    block = blocks(page)[place]
    assert block.needs in NEEDS
    if block.needs not in asked_for():
        pytest.skip(f"needs {block.needs}: OFFRAMP_PASTED={block.needs} runs it")
    world.render(world.scene("test", 1)).save(tmp_path / "dog.jpg")
    start = ""
    if block.needs == "index":  # in an environment and a clone of its own
        start = f"python3 -m venv {tmp_path / 'env'}; . {tmp_path / 'env'}/bin/activate\n"
        if "git clone" not in block.text:
            start += f"git clone -q {ROOT} clone; cp dog.jpg clone; cd clone\n"
    text = f"set -e\n{start}{session([block])}"
    environment = {**os.environ, "REPOSITORY": str(ROOT), "PATH": INSTALLED}
    if block.needs == "index":  # what is installed answers, and not this checkout
        environment.pop("PYTHONPATH", None)
    subprocess.run(["bash", "-c", text], cwd=tmp_path, env=environment, check=True, timeout=3600)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_known_kind_and_reads_as_such(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = blocks(page)
    assert len(found) == len(re.findall(r"^```", text, re.M)) // 2
    for block in found:
        if block.kind == "python":
            ast.parse(block.text)
        elif block.kind == "diff":
            after = [line[1:] for line in block.text.splitlines() if not line.startswith("-")]
            ast.parse("\n".join(after))
        elif block.kind == "json":
            [json.loads(line) for line in block.text.splitlines()]
        else:
            assert block.kind in ("bash", "console", "yaml"), block.kind


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_a_page_names_has_the_options_it_is_given(page: str) -> None:
    """Those of blocks that do not run here, and those in sentences and lists."""
    text = (ROOT / page).read_text(encoding="utf-8")
    spans = re.findall(r"`(offramp [^`\n]+)`", text)
    lines = [line for b in blocks(page) if b.kind == "bash" for line in b.text.splitlines()]
    for line in [*spans, *(line for line in lines if line.startswith("offramp "))]:
        words = shlex.split(line, comments=True)[1:]
        if not words or words[0] not in COMMANDS:
            assert words[:1] == [] or words[0].startswith("-"), line
            continue
        known = {flag for action in parser_of(words[0]).loaded() for flag in action.option_strings}
        assert not [w for w in words if w.startswith("--") and w not in known], line
