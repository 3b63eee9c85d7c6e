"""`offramp completion`: a script with which a shell completes commands, options and names."""

from __future__ import annotations

import argparse
from typing import Any

from offramp.cli.options import add_command
from offramp.cli.output import print_text
from offramp.cli.parser import Parser

SHELLS = ("bash", "zsh")


def add(commands: Any) -> None:
    add_command(
        commands,
        "completion",
        "Print a script that completes commands, options and names in a shell.",
        "offramp completion bash > ~/.local/share/bash-completion/completions/offramp",
        _completion,
        _options,
        result=False,
    )


def _options(parser: Parser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="bash or zsh")


def _completion(arguments: argparse.Namespace) -> None:
    import shtab

    from offramp.cli.command_line import build_parser

    parser = build_parser()
    for action in parser.loaded():
        if action.metavar in ("FILE", "FOLDER"):
            action.complete = shtab.FILE if action.metavar == "FILE" else shtab.DIRECTORY  # type: ignore[attr-defined]
    print_text(shtab.complete(parser, shell=arguments.shell))
