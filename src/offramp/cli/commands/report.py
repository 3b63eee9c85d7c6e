"""`offramp report`: one HTML page of what the other commands wrote."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from offramp.cli.options import add_command
from offramp.cli.output import say_next, show_result
from offramp.cli.outputs import check_out_file, is_page, overwrite_option
from offramp.cli.parser import Parser
from offramp.core.errors import InputError


def add(commands: Any) -> None:
    add_command(
        commands,
        "report",
        "Write one self-contained HTML page of what the other commands measured.",
        "offramp report exits runs/captions --data photos.jsonl --out report.html",
        _report,
        _options,
        usual="data out overwrite json",
    )


def _options(parser: Parser) -> None:
    parser.add_argument(
        "sources",
        nargs="*",
        default=[],
        action="extend",
        metavar="PATH",
        help="folders (of an adapter, or what eval or demo wrote), or JSON files",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="FILE",
        help="the data of the runs, to show their images (default: none)",
    )
    parser.add_argument(
        "--images", metavar="FOLDER", help="folder of the images of --data (default: its own)"
    )
    parser.add_argument("--split", help="only this split of --data (default: all)")
    parser.add_argument("--prompt", help="the --prompt that the runs were given (default: none)")
    parser.add_argument("--out", type=Path, required=True, help="the HTML file")
    overwrite_option(parser)


def _report(arguments: argparse.Namespace) -> None:
    from offramp.core.storage import write_atomic
    from offramp.data.formats import read_items
    from offramp.report.report import read_sources, report

    if not arguments.sources:
        raise InputError("Nothing to report was named.", "Name a folder of exits, or of results.")
    check_out_file(arguments.out, arguments, is_page, "page of this command")
    sources = read_sources(arguments.sources)
    items = (
        read_items(
            arguments.data,
            arguments.images,
            split=arguments.split,
            prompt=arguments.prompt,
            require_answers=False,
        )
        if arguments.data
        else []
    )
    # Names of files may hold what is no letter.
    page = report(sources, items).encode(errors="backslashreplace")
    write_atomic(arguments.out, page)
    result = {"report": str(arguments.out), "bytes": len(page)}
    show_result(result, as_json=arguments.json)
    say_next(f"open {arguments.out}")
