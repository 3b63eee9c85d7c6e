"""`offramp sweep`: what thresholds would do, as a table, a CSV file and a plot."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, astuple, fields
from pathlib import Path
from typing import Any

from offramp.cli.loading import loaded, read_data
from offramp.cli.options import (
    LOADED,
    add_command,
    asked_again,
    batch_option,
    data_options,
    length_option,
    model_options,
    name_option,
)
from offramp.cli.output import say_next, show_result
from offramp.cli.outputs import check_out_file, overwrite_option
from offramp.cli.parser import Parser


def add(commands: Any) -> None:
    add_command(
        commands,
        "sweep",
        "Tell what thresholds would do, without a guarantee: changed answers, depth, seconds, and "
        "CIDEr where the data has answers.",
        "offramp sweep exits --data held_out --score max_probability margin --out sweep.csv",
        _sweep,
        _options,
        usual="data limit score max-new-tokens out json",
    )


def _options(parser: Parser) -> None:
    from offramp.core.decoding.scores import SCORES

    model_options(parser, adapter=True, engines="none")
    data_options(parser, "images that training has not seen, like those to come")
    group = parser.add_argument_group("sweep and output")
    name_option(
        group,
        "--score",
        SCORES,
        "confidence scores of thresholds",
        shown="the adapter's",
        nargs="+",
    )
    length_option(group)
    batch_option(group, 32)
    group.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="CSV file, beside which its plot is written as .svg (default: none)",
    )
    overwrite_option(group)


def _sweep(arguments: argparse.Namespace) -> None:
    from offramp.calibration.risk_functions import Judged
    from offramp.calibration.sweep import Swept, sweep
    from offramp.common.progress import progress
    from offramp.core.storage import write_atomic
    from offramp.report.plots import sweep_curves

    names = [field.name for field in fields(Swept)]
    heading = ",".join(names).encode()
    if arguments.out is not None:
        check_out_file(arguments.out, arguments, lambda b: b.startswith(heading), "sweep")
        plot = arguments.out.with_suffix(".svg")
        check_out_file(plot, arguments, lambda b: b.startswith(b"<svg"), "plot")
    examples = [Judged.of(item) for item in read_data(arguments, require_answers=False)]
    opened = loaded(arguments)
    found = sweep(
        opened.adapter,
        opened.encoder,
        examples,
        arguments.score or (),
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        progress=lambda batches: progress(batches, "sweep"),
    )
    if arguments.out is not None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([names, *map(astuple, found)])
        write_atomic(arguments.out, text.getvalue())
        write_atomic(plot, sweep_curves(found))
    show_result([asdict(row) for row in found], _table(found), as_json=arguments.json)
    how = asked_again(arguments, "data", *LOADED)
    say_next(f"offramp calibrate {arguments.adapter}{how} --target 0.01")


def _table(found: Sequence[Any]) -> str:
    """By score, thresholds from the safest on, as a person reads them on a terminal."""
    judged = bool(found) and found[0].cider is not None
    cider = f"{'CIDEr':>8}" if judged else ""
    lines = [f"{'score':<18}{'threshold':>10}{'changed':>9}{'depth':>7}{'speed':>8}{cider}"]
    for score in dict.fromkeys(row.score for row in found):
        rows = [row for row in found if row.score == score]
        lines += [
            f"{row.score:<18}{row.threshold:>10g}{row.changed:>9.1%}{row.depth:>7.1f}"
            f"{row.speed:>7.2f}x{f'{row.cider:>8.3f}' if judged else ''}"
            for row in rows[:: max(1, len(rows) // 10)]
        ]
    return "\n".join(lines)
