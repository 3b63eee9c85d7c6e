"""Exporters: the formats that `offramp export --to NAME` writes, each brought by a package."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from offramp.cli.parser import Parser
from offramp.core.errors import InputError


def _none(parser: Parser) -> None:
    """Add no options."""


@dataclass(frozen=True)
class Exporter:
    """A format for `offramp export`, of an entry point of "offramp.exporters".

    said: description for the help of --to. write: writes it, by the command's options. options:
    adds the options of this format alone. takes: names of options that only some formats use, this
    one included.
    """

    said: str
    write: Callable[[argparse.Namespace], None]
    options: Callable[[Parser], None] = _none
    takes: tuple[str, ...] = ()


def check_adapter_alone(arguments: argparse.Namespace) -> None:
    """Raise `InputError` where no adapter is named, or --out cannot be written."""
    from offramp.common.folders import check_writable

    if arguments.adapter is None:
        raise InputError(f"--to {arguments.to} writes an adapter's exits.", "Name it first.")
    check_writable(arguments.out, folder=True)


def refuse_others(arguments: argparse.Namespace, exporters: dict[str, Any]) -> None:
    """Raise `InputError` for an option of another format than --to names."""
    own = exporters[arguments.to].takes
    for name in dict.fromkeys(taken for one in exporters.values() for taken in one.takes):
        if name not in own and getattr(arguments, name, None):
            shown = name.removesuffix("_format").replace("_", "-")
            raise InputError(f"--{shown} does not go with --to {arguments.to}.", "Leave it out.")
