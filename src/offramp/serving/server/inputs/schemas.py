"""What a JSON schema costs, tried in a process that can be ended: llguidance cannot be stopped.

Patterns that meet (`allOf`) double time and memory with each, `patternProperties` are compared in
pairs, and no limit of llguidance counts either.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import CancelledError
from hashlib import sha256
from threading import Event
from typing import Any

from offramp.core.errors import InputError

CPU_SECONDS = 1
"""Of one core, to prepare a schema; the server then needs as many."""
SECONDS = 20.0
"""With the start of the process, on a machine that is busy."""
_MEMORY = 2**30
_CODE = f"""
import sys
try:
    from resource import RLIMIT_AS, RLIMIT_CORE, RLIMIT_CPU, setrlimit
except ImportError:
    pass
else:
    setrlimit(RLIMIT_CORE, (0, 0))
    setrlimit(RLIMIT_AS, ({_MEMORY}, {_MEMORY}))
    setrlimit(RLIMIT_CPU, ({CPU_SECONDS}, {CPU_SECONDS} + 1))
try:
    from llguidance import LLMatcher, LLTokenizer
    grammar = LLMatcher.grammar_from_json_schema(sys.stdin.read())
except (ImportError, ValueError):
    sys.exit()  # the server says why
matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0)
if not matcher.is_error():
    matcher.compute_bitmask()
"""

passed: set[bytes] = set()
"""Digests of schemas that were tried."""


def check_cost(schema: Mapping[str, Any], unwanted: Event) -> None:
    """Try a JSON schema in a process of its own. unwanted: set to abort.

    Raises:
        InputError: it takes more than a second of one core, or a gibibyte.
        CancelledError: `unwanted` was set; the process is ended.
    """
    text = json.dumps(schema).encode()
    digest = sha256(text).digest()
    if digest in passed:
        return
    end = time.monotonic() + SECONDS
    unsent: bytes | None = text
    with started() as process:
        try:
            while process.returncode is None and time.monotonic() < end:
                try:
                    process.communicate(unsent, timeout=0.05)
                except subprocess.TimeoutExpired:
                    unsent = None
                    if unwanted.is_set():
                        raise CancelledError from None
        finally:
            process.kill()
    if process.returncode:
        raise InputError(
            f"The JSON schema takes more than {CPU_SECONDS} CPU second to prepare, or too much "
            "memory.",
            "Use a simpler one: fewer alternatives, fewer patterns that apply to the same text.",
        )
    if len(passed) >= 1000:
        passed.clear()
    passed.add(digest)


def started() -> subprocess.Popen[bytes]:
    """Start a process that reads a schema and exits with success if the schema is cheap."""
    # -P: nothing is imported from the working folder.
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _CODE],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
