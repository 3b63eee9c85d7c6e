"""`offramp caption`: what images show, a line each."""

from __future__ import annotations

from typing import Any

from offramp.cli.commands.generate import answer_options, generate
from offramp.cli.options import NAMED_EXITS, adapter_options, add_command
from offramp.cli.parser import Parser
from offramp.cli.pictures import picture


def add(commands: Any) -> None:
    add_command(
        commands,
        "caption",
        "Describe images, a line each; the short form of generate.",
        "offramp caption dog.jpg\n  offramp caption photos --model exits",
        generate,
        _options,
        usual="model max-new-tokens mode depths engine gguf json",
    )


def _options(parser: Parser) -> None:
    parser.add_argument(
        "image",
        type=picture,
        nargs="+",
        metavar="FILE",
        help="images to describe: files, folders or addresses, - for stdin",
    )
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        dest="adapter",
        default="photo",
        metavar="NAME",
        help=f"{NAMED_EXITS} (default: photo)",
    )
    adapter_options(parser, group, "all", auto=True)
    answer_options(parser)
    parser.set_defaults(prompt=None, interactive=False, stream=False)
