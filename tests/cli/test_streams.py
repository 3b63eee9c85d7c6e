"""Laws of streams and signals: a command whose output cannot be written, or that is stopped, ends
in two lines or fewer, and with the exit code that tells why.

Each case is a process of its own, with a command that says something and loads no torch.
"""

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

COMMAND = """
import os, sys, time
if os.environ.get("WAIT") == "import":
    print("ready", file=sys.stderr, flush=True); time.sleep(60)
from offramp.cli.options import add_command
from offramp.cli.output import print_json, print_text
from offramp.core.errors import InputError

def say(arguments):
    if os.environ.get("WAIT") == "command":
        print("ready", file=sys.stderr, flush=True); time.sleep(60)
    if os.environ.get("WAIT") == "mistake":
        raise InputError("This is wrong.", "Make it right.")
    print_json({"said": "h\\xe9 \\u4f60 \\udcff"})
    for part in os.environ.get("PARTS", "").split():
        print_text(part, end="")
    for _ in range(int(os.environ.get("LINES", 0))):
        print_text("line " * 1000)

def add(commands):
    add_command(commands, "say", "Say something.", "offramp say", say, lambda parser: None)
"""
START = (
    "import sys; from offramp.cli import command_line; command_line.COMMANDS['say'] = 'say'; "
    "from offramp.cli import main; sys.exit(main())"
)


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Any]:
    (tmp_path / "say.py").write_text(COMMAND)
    source = str(Path(__file__).parents[2] / "src")

    def heed_signals() -> None:  # a shell's background jobs ignore Ctrl-C, and so would these
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def run(
        *words: str, preexec_fn: Any = heed_signals, stdout: Any = subprocess.PIPE, **more: str
    ) -> Any:
        path = os.pathsep.join([str(tmp_path), source])
        return subprocess.Popen(
            [sys.executable, "-c", START, *(words or ("say",))],
            env={**os.environ, "PYTHONPATH": path, **more},
            stdout=stdout,
            stderr=subprocess.PIPE,
            preexec_fn=preexec_fn,  # noqa: PLW1509
        )

    return run


def end(process: Any) -> tuple[int, bytes, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err.decode()


def is_two_lines(err: str, words: str) -> bool:
    return err.startswith("error: ") and err.count("\n") == 2 and words in err


def test_a_reader_that_goes_is_no_mistake(start: Any) -> None:
    process = start(LINES="10000")
    process.stdout.readline()
    process.stdout.close()
    assert (process.wait(timeout=60), process.stderr.read()) == (128 + signal.SIGPIPE, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
@pytest.mark.parametrize("words", [("say",), ("--help",), ("--version",), ("say", "--help")])
def test_a_full_disk_is_told(start: Any, words: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        code, _, err = end(start(*words, stdout=full))
    assert code == 1 and is_two_lines(err, "Cannot write to stdout")


def test_a_closed_stdout_is_told(start: Any) -> None:
    code, out, err = end(start(preexec_fn=lambda: os.close(1)))
    assert code == 1 and not out and is_two_lines(err, "stdout is closed")


def test_parts_of_a_line_are_one_line(start: Any) -> None:
    code, out, _ = end(start(PARTS="a b c", LINES="0"))
    assert code == 0 and out.endswith(b"}\nabc")


def test_without_stderr_a_command_does_what_it_did(start: Any) -> None:
    code, out, _ = end(start(preexec_fn=lambda: os.close(2)))
    assert code == 0 and b"said" in out
    assert end(start(preexec_fn=lambda: os.close(2), WAIT="mistake"))[:2] == (1, b"")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_any_text_can_be_printed(start: Any, encoding: str) -> None:
    code, out, err = end(start(PYTHONIOENCODING=encoding))
    assert code == 0 and not err
    assert out.decode(encoding).startswith('{"said": "h')


@pytest.mark.parametrize("when", ["import", "command"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_command_in_a_word(start: Any, name: str, when: str) -> None:
    number = getattr(signal, name)
    if signal.getsignal(number) == signal.SIG_IGN:  # under nohup, where commands ignore it too
        pytest.skip(f"{name} is ignored here")
    process = start(WAIT=when)
    assert process.stderr.readline() == b"ready\n"
    time.sleep(0.02)
    process.send_signal(number)
    code, out, err = end(process)
    assert (code, out, err) == (128 + number, b"", "interrupted\n")
