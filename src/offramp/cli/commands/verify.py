"""`offramp verify`: whether every way to decode an adapter is exact on this machine."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offramp.cli.loading import check_engine, loaded, read_data
from offramp.cli.options import (
    LOADED,
    add_command,
    asked_again,
    data_options,
    length_option,
    model_options,
    runtime_options,
    vision_options,
)
from offramp.cli.output import say_next, show_result
from offramp.cli.outputs import check_out_file, overwrite_option
from offramp.cli.parser import Parser, whole
from offramp.core.errors import InexactError

log = logging.getLogger(__name__)


QUICK: dict[str, tuple[Any, str]] = {
    "limit": (4, "4"),
    "slots": (2, "2"),
    "max_new_tokens": (16, "16"),
}
"""The value of each option under --quick, and the words that a user would type for it."""


def add(commands: Any) -> None:
    add_command(
        commands,
        "verify",
        "Check that every decoding mode of an adapter, alone, in batches and in the batch engine, "
        "gives the model's own answers, and store the result in the adapter. Exit status 1: "
        "something that must be exact is not.",
        "offramp verify exits --quick\n"
        "  offramp verify exits --data held_out.jsonl --limit 64 --engine packed\n"
        "  offramp verify exits --engine llama.cpp --gguf exits-q8_0",
        _verify,
        _options,
        usual="quick data limit engine gguf slots max-new-tokens out json",
    )


def _options(parser: Parser) -> None:
    from offramp.adapter.certificate import SLOTS

    model_options(parser, adapter=True, engines="all")
    vision_options(parser.add_argument_group("images"))
    data_options(
        parser,
        "prompts to answer (default: the adapter's, of drawn pictures)",
        limit=32,
        required=False,
    )
    group = parser.add_argument_group("size and output")
    few = " ".join(f"--{name.replace('_', '-')} {shown}" for name, (_, shown) in QUICK.items())
    group.add_argument("--quick", action="store_true", help=f"a small test: {few}, if not given")
    group.add_argument(
        "--slots",
        type=whole(1),
        default=SLOTS,
        metavar="N",
        help="requests in company, in the batch engine; in llama.cpp sequences, and rows of its "
        f"largest batch (default: {SLOTS})",
    )
    length_option(group)
    group.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the certificate to this file as well (default: to the adapter alone)",
    )
    overwrite_option(group)
    runtime_options(parser)


def _verify(arguments: argparse.Namespace) -> None:
    from offramp.adapter.certificate import ROWS, VerificationSettings
    from offramp.calibration.verification import Verification, own_examples, with_thresholds
    from offramp.common.folders import check_writable
    from offramp.common.progress import progress_bar

    if arguments.quick:
        for name, (value, _) in QUICK.items():
            if name not in getattr(arguments, "given", {}):
                setattr(arguments, name, value)
    rows = (2,) if arguments.quick else ROWS
    settings = VerificationSettings(rows, arguments.slots, arguments.max_new_tokens)
    check_engine(arguments)
    kept = _folder(arguments)
    if kept is not None:
        check_writable(kept, folder=True)
    if arguments.out is not None:
        check_out_file(arguments.out, arguments, _is_certificate, "certificate")
    digest = _digest(arguments)
    items = None if arguments.data is None else read_data(arguments, require_answers=False)
    opened = loaded(arguments, sequences=arguments.slots, keep_decoder=True)
    adapter, encoder = opened.adapter, opened.encoder
    if items is None:
        examples = own_examples(adapter, arguments.limit)
    else:
        examples = [item.example for item in items]
    policy = with_thresholds(adapter.policy, adapter, encoder, examples)
    one = Verification(
        adapter, encoder, examples, policy=policy, runtime=opened.runtime, settings=settings
    )
    _say_how_long(one, policy, settings, "" if arguments.quick else "; --quick writes few")
    with progress_bar("verify", total=one.answers) as bar:
        paths = one.run(told=bar.update)
    run = one.certified(paths, arguments.engine, digest, sys.argv)
    show_result(run.to_json(), _text(paths), as_json=arguments.json)
    _keep(run, kept, arguments)
    log.info("%s", run.words)
    log.info("%s", adapter.backbone.readings.words)
    broken = [path for path in paths if path.broken]
    if broken:
        names = ", ".join(path.path for path in broken)
        raise InexactError(
            f"Not exact, though promised: {names}.",
            "Do not decode so on this machine; please report it with --json's output.",
        )
    say_next(f"offramp serve {arguments.adapter}{asked_again(arguments, *LOADED)}")


def _say_how_long(one: Any, policy: Any, settings: Any, advice: str) -> None:
    """Say how long it takes, estimated from one answer alone; batches are faster."""
    import time

    from offramp.adapter.answers import GREEDY
    from offramp.common.progress import duration

    inputs = one.encoder.prompts(one.examples[:1])
    for longest in (1, settings.longest):  # the first call is slower
        begin = time.perf_counter()
        one.adapter.generate(inputs, policy=policy, max_new_tokens=longest, **GREEDY)
    took = (time.perf_counter() - begin) * one.answers
    log.info("Writing %d answers takes up to %s%s.", one.answers, duration(took), advice)


def _folder(arguments: argparse.Namespace) -> Path | None:
    """The adapter's own folder, if it is on this machine and none that ships."""
    from offramp.core.save_and_load import CONFIG

    folder = Path(arguments.adapter)
    return folder if (folder / CONFIG).is_file() else None


def _is_certificate(begin: bytes) -> bool:
    return begin.lstrip().startswith(b"{") and b'"runs"' in begin[:64]


def _digest(arguments: argparse.Namespace) -> str:
    """SHA-256 of the exits' file; "" of a model that ships without."""
    from offramp.adapter.shipped import exits_folder
    from offramp.core.errors import InputError
    from offramp.core.save_and_load import exits_digest, read_config

    try:
        folder = exits_folder(arguments.adapter)
    except InputError:
        return ""
    return exits_digest(read_config(folder))


def _keep(run: Any, folder: Path | None, arguments: argparse.Namespace) -> None:
    """Write the certificate into the adapter's folder and its card, and where --out says."""
    from offramp.adapter.certificate import Certificate
    from offramp.adapter.model_card import with_verified
    from offramp.adapter.records import CARD, CERTIFICATE, load_certificate
    from offramp.core.save_and_load import read_config
    from offramp.core.storage import write_atomic

    if arguments.out is not None:
        Certificate([run]).write(arguments.out)
        log.info("Written to %s.", arguments.out)
    if folder is None:
        if arguments.out is None:
            log.info("%s is no folder of yours: nothing is kept; give --out.", arguments.adapter)
        return
    before = load_certificate(read_config(folder)) or Certificate()
    certificate = before.with_run(run)
    certificate.write(folder / CERTIFICATE)
    card = folder / CARD
    if card.is_file():
        kept = "surrogateescape"  # bytes that are not UTF-8 stay as they are
        text = card.read_text(encoding="utf-8", errors=kept)
        write_atomic(card, with_verified(text, certificate).encode("utf-8", kept))
    log.info("Kept in %s.", folder / CERTIFICATE)


def _text(paths: Sequence[Any]) -> str:
    from offramp.adapter.certificate import COLUMNS, rows
    from offramp.report.table import Table

    return Table(COLUMNS, rows(paths)).plain()
