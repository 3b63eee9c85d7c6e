"""Write docs/report-opt.html and docs/report-t5.html, and two screenshots where Chromium is there.

They show the committed records (demo, analysis, compare), the adapters that the demo
left in runs/demo, and answers of those to some test images, which are decoded here.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from offramp.adapter import Adapter
from offramp.data.example import Example
from offramp.data.scenes.tasks import captions, questions
from offramp.evaluation.evaluate import evaluate
from offramp.models.input_processor import InputProcessor
from offramp.models.shipped import TINY, load_tiny
from offramp.report.report import read_sources, report
from offramp.storage import write_atomic
from offramp_lab.places import DOCS, RECORDS, RUNS

DEMO = RUNS / "demo"
PICTURES = 40
SHOTS = {"phone": (390, 2600), "desktop": (1440, 2000)}  # width and height in pixels
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
    "--disable-sync", "--disable-background-networking", "--disable-component-update",
)  # fmt: skip


def page(kind: str, runs: Path) -> str:
    """The report of one tiny model."""
    files = [RECORDS / f"{name}.json" for name in (f"demo-{kind}", "analysis", "compare")]
    paths = [file for file in files if file.is_file()]
    shown: list[Example] = []
    if (DEMO / kind / "adapter.json").is_file():
        shown = answered(kind, runs)
        paths += [DEMO / kind, runs / "captions", runs / "questions"]
    else:
        print(f"No adapter in {DEMO / kind}: run make demo first for its answers.", file=sys.stderr)
    sources = [s for s in read_sources(paths) if s.name.split(", ")[0] == f"tiny-{kind}"]
    return report(sources, shown)


def answered(kind: str, runs: Path) -> list[Example]:
    """Evaluate the demo's adapter on some test images; returns the examples."""
    backbone, processor = load_tiny(kind)
    adapter = Adapter.load(DEMO / kind, backbone)
    tasks: dict[str, tuple[str, Any]] = {
        "captions": ("captions", captions("test", PICTURES)),
        "questions": ("gqa", questions("test", PICTURES)),
    }
    for name, (form, task) in tasks.items():
        metrics = ("ROUGE_L", "CIDEr") if form == "captions" else ("exact_match",)
        evaluate(
            adapter, InputProcessor(backbone, processor), task.examples, form,
            out=runs / name, metrics=metrics, tokenizer="simple",
        )  # fmt: skip
    return [example for _, task in tasks.values() for example in task.examples]


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
        subprocess.run([browser, *QUIET, window, *place], check=True, timeout=120,
                       stderr=subprocess.DEVNULL)  # fmt: skip
        picture = Image.open(raw).convert("RGB").crop((0, 0, width, height))
    picture.quantize(96, dither=Image.Dither.NONE).save(out, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", choices=TINY, nargs="+", default=TINY)
    parser.add_argument("--out", type=Path, default=DOCS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for kind in arguments.backbone:
        with tempfile.TemporaryDirectory() as folder:
            write_atomic(arguments.out / f"report-{kind}.html", page(kind, Path(folder)))
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
