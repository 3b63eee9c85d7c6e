"""How many options the product asks its users to know; writes lab/records/options.json.

Flags: of every command, as `offramp COMMAND --help` lists them; `--config`, `--json`, `--quiet` and
`--help`, which every command has, once. Fields: of the frozen dataclasses of the product whose
names say that they are settings. Counted is what is there, so the record changes with the code.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import pkgutil
from typing import Any

import offramp
from offramp.cli.command_line import build_parser
from offramp_lab.records.record import Record, asked

RECORD = Record("options")
SHARED = {"--help", "--config", "--json", "--quiet", "--version"}
SETTINGS = ("Config", "Limits", "Options", "Policy", "Guarantee", "Settings")
"""Endings of the names of settings; classes that share a name are counted together."""


def main() -> None:
    asked(__doc__)
    counted = count()
    for name, number in counted.items():
        print(f"{name}: {number if isinstance(number, int) else sum(number.values())}")
    RECORD.write(counted)


def count() -> dict[str, Any]:
    """Flags by command, those that are shown by none, and fields by class."""
    by_command, hidden = {}, 0
    for name, command in commands().items():
        options = [a for a in command.loaded() if a.option_strings]
        own = [a for a in options if not SHARED & set(a.option_strings)]
        by_command[name] = sum(a.help != argparse.SUPPRESS for a in own)
        hidden += sum(a.help == argparse.SUPPRESS for a in own)
    return {"flags": by_command, "shared": len(SHARED), "hidden": hidden, "fields": fields()}


def commands() -> dict[str, Any]:
    """The parsers of the product's commands."""
    [choices] = [
        action.choices
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    return dict(choices)


def fields() -> dict[str, int]:
    found: dict[str, int] = {}
    for module in pkgutil.walk_packages(offramp.__path__, "offramp."):
        if ".integrations" in module.name or module.name.endswith(("__main__", "ray_deployment")):
            continue  # which import what may not be there
        for name, thing in vars(importlib.import_module(module.name)).items():
            if not (isinstance(thing, type) and dataclasses.is_dataclass(thing)):
                continue
            if thing.__module__ == module.name and name.endswith(SETTINGS):
                found[name] = found.get(name, 0) + len(dataclasses.fields(thing))
    return found


if __name__ == "__main__":
    main()
