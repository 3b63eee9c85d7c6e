"""What `make quick` runs: the laws, and the test files that mirror what changed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FAMILIES = frozenset({"blip2-opt", "blip2-t5", "llava"})
"""Of the laws: learnt positions, an encoder, rotary positions."""
LONG = (
    "test_12_metrics_equal_published_cases",
    "test_13_every_mistake_in_a_table",
    "test_change_table",
    "test_discovery",
    "test_home_made",
    "test_proven_by_kind",
    "test_read_again",
    "test_text_only",
)
"""Files that take longer than all others together, since they start Java or go through a table.
A quick run has them, as tests marked slow, where their file is named."""
CASES = 3
"""Of one law, at most, in a quick run."""


def changed() -> list[str]:
    """Files that differ from the last commit; where none does, those of the last commit."""

    def git(*words: str) -> list[str]:
        made = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        return made.stdout.splitlines()

    now = [*git("diff", "--name-only", "HEAD"), *git("ls-files", "--others", "--exclude-standard")]
    return now or git("diff", "--name-only", "HEAD~1", "HEAD")


def mirrors(files: Iterable[str]) -> Iterator[str]:
    """The test files of source files, and the test files among them.

    `src/offramp/a/b/c.py` is mirrored by `tests/a/b/test_c.py` or, where there is none, by
    `tests/a/test_c.py`, `tests/a/test_b.py` or `tests/test_c.py`.
    """
    for file in map(Path, files):
        if file.parts[:1] == ("tests",) and file.name.startswith("test_"):
            candidates = [file]
        elif file.parts[:2] == ("src", "offramp") and file.suffix == ".py":
            *rooms, _ = file.parts[2:]
            names = [file.stem, *reversed(rooms)]
            folders = [Path("tests", *rooms[:n]) for n in range(len(rooms), -1, -1)]
            candidates = [folder / f"test_{name}.py" for folder in folders for name in names]
        else:
            continue
        yield from [str(one) for one in candidates if (ROOT / one).is_file()][:1]


def chosen(items: Iterable[Any]) -> list[Any]:
    """The tests of a quick run: at most `CASES` of each law, spread over its table."""
    laws: dict[str, list[Any]] = {}
    for item in filter(keeps, items):
        laws.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {id(item) for cases in laws.values() for item in spread(cases)}
    return [item for item in items if id(item) in kept]


def spread(cases: list[Any]) -> list[Any]:
    """`CASES` of them, the first and the last of their table among them, in whatever order."""
    if len(cases) <= CASES:
        return cases
    table = sorted(cases, key=lambda item: [*item.callspec.indices.values()])
    return [table[round(number * (len(table) - 1) / (CASES - 1))] for number in range(CASES)]


def keeps(item: Any) -> bool:
    """Whether a test belongs to a quick run: none of another family, and none that is slow or of
    `LONG` unless its file is named."""
    from families import KINDS

    path = Path(item.path)
    long = path.stem in LONG or item.get_closest_marker("slow")
    if long and not any(path.name in word for word in item.config.args):
        return False
    given = getattr(item, "callspec", None)
    values = () if given is None else given.params.values()
    return all(value in FAMILIES for value in values if str(value) in KINDS)


if __name__ == "__main__":
    print(*dict.fromkeys(["tests/laws", *mirrors(changed())]), sep="\n")
