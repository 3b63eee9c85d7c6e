"""The command line: data on stdout, everything else on stderr, two lines for a user's mistake."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence

from offramp import __version__
from offramp.cli.commands import calibrate, draft, eval, export, generate, inspect, train
from offramp.cli.research import analyse, bench, compare, demo, report
from offramp.errors import OfframpError

EXAMPLES = """\
examples:
  offramp demo                                   train, calibrate and race exits on a tiny model
  offramp inspect Salesforce/blip2-opt-2.7b      what exits could be attached to a model
  offramp train --backbone Salesforce/blip2-opt-2.7b --data photos.jsonl --out exits
  offramp calibrate --adapter exits --data held_out.jsonl --target 0.01
  offramp draft --adapter exits --data held_out.jsonl
  offramp generate --adapter exits --image dog.jpg --prompt "Question: what is it? Answer:"
  offramp eval --adapter exits --task captions --data captions_val2014.json --images val2014
  offramp export --adapter exits --gguf q8_0 --out exits-q8_0   for generate --runtime llama.cpp
  offramp compare --backbone tiny-opt --data photos.jsonl --out runs/compare
  offramp analyse --adapter exits --data held_out.jsonl --out runs/analysis
  offramp bench --shape opt-2.7b --depths 8      what skipping is worth on this machine
  offramp report --run exits runs/captions runs/analysis --out report.html
"""

COMMANDS = (
    demo, train, calibrate, draft, generate, eval, export, compare, analyse, bench, report, inspect
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if it did what was asked, 1 on a user's mistake."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "huggingface_hub", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    run: Callable[[argparse.Namespace], None] = arguments.run
    try:
        run(arguments)
    except OfframpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="offramp",
        description="Early exits for frozen Hugging Face vision-language models that really skip "
        "layers.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"offramp {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in COMMANDS:
        command.add(commands)
    return parser
