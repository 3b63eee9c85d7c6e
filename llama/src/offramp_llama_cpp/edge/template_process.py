"""The process in which chat templates are rendered: lines of JSON in, lines of JSON out.

A template comes with a stranger's file, and may loop without end or ask for any amount of memory.
It runs here, where both can be bounded; run as a script, so that nothing but Jinja is imported.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from functools import lru_cache
from typing import Any

from jinja2 import Template, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 512 * 2**20
"""Bytes of address space."""
LONGEST = 4 * 2**20
"""Letters of a rendered text."""
_CPU_SECONDS = 60
"""That one template may take where whoever asked is gone, and ends this process no more."""


class _Generation(Extension):
    """`{% generation %}`: transformers notes what stands in it, which nobody asks for here."""

    tags = {"generation"}  # noqa: RUF012 -- jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _refuse(message: str) -> None:
    raise ValueError(message)


@lru_cache(maxsize=1)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template)


def _rendered(template: str, values: dict[str, Any]) -> dict[str, str]:
    try:
        text = _compiled(template).render(values)
    except MemoryError:
        return {"refusal": f"it needs more than {MEMORY // 2**20} MiB"}
    except Exception as error:  # a template raises nearly every builtin
        return {"refusal": str(error) or type(error).__name__}
    if len(text) > LONGEST:
        return {"refusal": f"it writes more than {LONGEST} letters"}
    return {"text": text}


def main() -> None:
    """Render templates until stdin ends."""
    _limit(memory=True)
    for line in sys.stdin:
        _limit()
        template, values = json.loads(line)
        sys.stdout.write(json.dumps(_rendered(template, values)) + "\n")
        sys.stdout.flush()


def _limit(*, memory: bool = False) -> None:
    """Limit memory and the seconds of the next template, where the system can."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        if memory:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        seconds = int(time.process_time()) + _CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
