"""Write docs/report-opt.html and docs/report-t5.html, and two screenshots where Chromium is there.

Each is of one run: the figures of the committed record, and answers of the adapter that the demo
left in runs/demo, which must be that run's or one that decides alike.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from offramp.adapter.adapter import Adapter
from offramp.adapter.shipped import TINY, load_tiny
from offramp.cli.demo import SHOWN, answers, demo_page, shown_rows
from offramp.core.decoding.policy import FULL
from offramp.core.errors import DataError
from offramp.core.storage import read_json, write_atomic
from offramp.data.scenes.tasks import captions, questions
from offramp.evaluation.run_log import Done
from offramp.features.input_processor import InputProcessor
from offramp_lab.places import DOCS, RECORDS, RUNS

DEMO = RUNS / "demo"
SHOTS = {"phone": (390, 2600), "desktop": (1440, 2000)}  # width and height in pixels
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
)


def page(kind: str) -> str:
    """The report of one tiny model's demo.

    Raises:
        DataError: the adapter in runs/demo is of another run than the record.
    """
    record = read_json(RECORDS / "demo.json")[kind]
    backbone, processor = load_tiny(kind)
    adapter = Adapter.load(DEMO / kind, backbone)
    if decided(dict(adapter.calibration or {})) != decided(record["calibration"]):
        raise DataError(
            f"{DEMO / kind} and lab/records/demo.json are of two runs.", "Run make records."
        )
    encoder = InputProcessor(backbone, processor)
    tasks = [captions("test", SHOWN), questions("test", SHOWN)]
    shown: Done = {}
    for mode, policy in (("full", FULL), ("early_exit", adapter.policy)):
        shown |= shown_rows(mode, tasks, answers(adapter, encoder, tasks, policy))
    return demo_page(record, shown)


def decided(calibration: Mapping[str, Any]) -> list[Any]:
    """What a calibration measured and chose; seconds differ from run to run."""
    path = [(step["thresholds"], step["risk"]) for step in calibration["path"]]
    return [calibration["policy"]["thresholds"], calibration["measured"], path]


def screenshot(browser: str, html: Path, out: Path, size: tuple[int, int]) -> None:
    """The top of a page at a width; in a frame, for a window cannot be as narrow as a phone."""
    width, height = size
    with tempfile.TemporaryDirectory() as folder:
        frame, raw = Path(folder) / "frame.html", Path(folder) / "raw.png"
        frame.write_text(
            f'<body style="margin:0"><iframe src="{html.resolve().as_uri()}" '
            f'style="border:0;width:{width}px;height:{height}px"></iframe>'
        )
        window = f"--window-size={max(width, 500)},{height}"
        place = [f"--user-data-dir={folder}/profile", f"--screenshot={raw}", frame.as_uri()]
        subprocess.run(
            [browser, *QUIET, window, *place], check=True, timeout=120, stderr=subprocess.DEVNULL
        )
        picture = Image.open(raw).convert("RGB").crop((0, 0, width, height))
    picture.quantize(96, dither=Image.Dither.NONE).save(out, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", choices=TINY, nargs="+", default=TINY)
    parser.add_argument("--out", type=Path, default=DOCS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for kind in arguments.backbone:
        write_atomic(arguments.out / f"report-{kind}.html", page(kind))
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        print("No Chromium is installed, so no screenshots were made.", file=sys.stderr)
        return
    html = arguments.out / f"report-{arguments.backbone[0]}.html"
    for name, size in SHOTS.items():
        screenshot(browser, html, arguments.out / f"report-{name}.png", size)


if __name__ == "__main__":
    main()
