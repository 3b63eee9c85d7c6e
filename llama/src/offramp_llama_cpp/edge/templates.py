"""A chat template of a stranger's file, rendered in a process of its own that has an end."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from offramp.core.errors import InputError
from offramp_llama_cpp.edge import template_process

SECONDS = 10.0
"""That a template may take for one chat, with the start of its process."""


class Refused(Exception):
    """A template refuses its messages, in words of its own."""


class Renderer:
    """Renders a template. Any thread may ask; its process begins with the first chat and is ended
    with the object."""

    def __init__(self, template: str) -> None:
        self._template, self._lock = template, threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def render(self, values: Mapping[str, Any]) -> str:
        """The text for values by name.

        Raises:
            Refused: the template raises.
            InputError: it takes longer than `SECONDS`, or its process does not run.
        """
        line = json.dumps([self._template, values]) + "\n"
        with self._lock:
            said = self._asked(line)
        if "text" not in said:
            raise Refused(said["refusal"])
        return said["text"]

    def _asked(self, line: str) -> dict[str, str]:
        if self._process is None or self._process.poll() is not None:
            self._process = _started()
            weakref.finalize(self, _end, self._process)
        process, found = self._process, Future[str]()
        threading.Thread(target=_exchange, args=(process, line, found), daemon=True).start()
        try:
            return dict(json.loads(found.result(SECONDS)))
        except TimeoutError as error:
            raise InputError(
                f"The model's chat template takes longer than {SECONDS:g} seconds for these "
                "messages.",
                "Ask without it: a text (--plain) in place of messages.",
            ) from error
        except (OSError, ValueError) as error:  # it ended, or did not begin
            raise InputError(
                "The process that renders the model's chat template has ended.",
                "Ask without it: a text (--plain) in place of messages.",
            ) from error
        finally:
            if not found.done() or found.exception() is not None:
                _end(process)


def _started() -> subprocess.Popen[str]:
    # -P, and a file: of the working folder nothing is imported, and of the package nothing else.
    return subprocess.Popen(
        [sys.executable, "-P", str(Path(template_process.__file__))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="ascii",
    )


def _exchange(process: subprocess.Popen[str], line: str, found: Future[str]) -> None:
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(line)
        process.stdin.flush()
        found.set_result(process.stdout.readline())
    except (OSError, ValueError) as error:
        found.set_exception(error)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
