"""`offramp report`: one HTML page of what the other commands wrote."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from offramp.cli.options import add_command


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "report",
        "Write one self-contained HTML page of what the other commands measured.",
        "offramp report --run exits runs/captions runs/analysis --data photos.jsonl "
        "--out report.html",
        _report,
    )
    parser.add_argument(
        "--run",
        dest="sources",
        required=True,
        nargs="+",
        metavar="PATH",
        help="folders (of an adapter, or what eval, analyse, compare or demo wrote), or JSON files",
    )
    parser.add_argument(
        "--data", nargs="+", metavar="FILE", help="the data of the runs, to show their pictures"
    )
    parser.add_argument(
        "--format", default="auto", metavar="FORMAT", help="of --data; see offramp eval"
    )
    parser.add_argument("--images", metavar="FOLDER", help="folder of the pictures of --data")
    parser.add_argument("--split", help="only this split of --data")
    parser.add_argument("--title", default="", help="default: made of the backbones' names")
    parser.add_argument("--out", type=Path, required=True, help="the HTML file")


def _report(arguments: argparse.Namespace) -> None:
    from offramp.data.formats import read_items
    from offramp.research.report.report import read_sources, report
    from offramp.storage import write_atomic

    sources = read_sources(arguments.sources)
    items = (
        read_items(arguments.data, arguments.images, arguments.format, split=arguments.split)
        if arguments.data
        else []
    )
    page = report(sources, [item.example for item in items], title=arguments.title)
    write_atomic(arguments.out, page)
    print(json.dumps({"report": str(arguments.out), "bytes": len(page.encode())}))
