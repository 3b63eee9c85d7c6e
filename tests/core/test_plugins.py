"""What a plug-in that fails does: it harms nobody but who asks for it."""

from __future__ import annotations

from typing import Any

import pytest
from command_line import RunCommand, assert_two_lines

from offramp.core import plugins
from offramp.core.decoding.confidence import check_score
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.decoding.scores import SCORES, max_probability
from offramp.core.errors import InputError
from offramp.engines import ENGINES, all_engines, engine_named
from offramp.extend import register_engine, register_score


class Point:
    """An entry point that does what it is told when it is loaded."""

    def __init__(self, load: Any) -> None:
        self.value, self._load = "their.module", load

    def load(self) -> Any:
        return self._load()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Entry points by seam and name, in the place of those of installed packages."""
    points: dict[str, dict[str, Any]] = {}
    monkeypatch.setattr(plugins, "_points", lambda seam: points.get(seam, {}))
    monkeypatch.setattr("offramp.features.registration.SCORES", SCORES)
    for registry in (SCORES, ENGINES):
        for name, value in list(registry.items()):
            monkeypatch.setitem(registry, name, value)
    yield points
    for registry, name in ((SCORES, "theirs"), (ENGINES, "theirs")):
        registry.pop(name, None)


def raises() -> None:
    raise ZeroDivisionError("by zero")


def leaves() -> None:
    raise SystemExit(3)


BROKEN = [raises, leaves, lambda: None]


@pytest.mark.parametrize("load", BROKEN)
def test_one_that_fails_is_told_in_two_lines_to_who_asks_for_it(load: Any, installed: Any) -> None:
    installed["scores"] = {"theirs": Point(load)}
    with pytest.raises(InputError, match=r"'theirs' \(their.module\)") as caught:
        ExitPolicy({2: 0.5}, score="theirs")
    assert len(str(caught.value).splitlines()) == 2


def test_nobody_else_notices(installed: Any, run: RunCommand) -> None:
    """Of some at each seam, side by side."""
    for seam in ("scores", "engines", "exits", "exporters", "commands"):
        installed[seam] = {"theirs": Point(raises), "others": Point(leaves)}
    for words in (["env", "--json"], ["inspect", "tiny-opt", "--json"]):
        code, out, _ = run(*words)
        assert code == 0 and out.startswith("{")


def test_what_takes_a_built_in_name_is_never_loaded(installed: Any) -> None:
    installed["scores"] = {"margin": Point(raises)}
    installed["engines"] = {"packed": Point(lambda: register_engine("packed", print))}
    assert check_score("margin") == "margin"
    assert engine_named("packed").ships
    assert all_engines()["packed"].ships  # and a line of the log says why theirs is left out


def test_a_name_is_found_when_it_is_asked_for(installed: Any) -> None:
    installed["scores"] = {
        "theirs": Point(lambda: register_score("theirs", max_probability)),
        "broken": Point(raises),
    }
    assert ExitPolicy({2: 0.5}, score="theirs").score == "theirs"


@pytest.mark.parametrize("name", ["llama.cpp", "propagate"])
def test_an_engine_of_a_package_that_is_missing_is_named_with_it(
    name: str, installed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(ENGINES, name, raising=False)
    with pytest.raises(InputError, match=rf"{plugins.PACKAGES[name]}[^\n]*pip install"):
        engine_named(name)


def test_so_it_is_on_the_command_line(
    installed: Any, run: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(ENGINES, "llama.cpp", raising=False)
    told = run("generate", "tiny-opt", "--image", "x.png", "--engine", "llama.cpp")
    assert_two_lines(told, "--engine 'llama.cpp' is not known", "offramp-llama-cpp")
