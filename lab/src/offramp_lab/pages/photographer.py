"""The README's photograph: a dialogue about it, each word by the layers it took.

`python -m offramp_lab.pages.photographer --measure` asks photo-chat about the photograph that
ships, and has the photo model caption it at full depth and with exits. It keeps words, depths and
seconds in lab/records/photographer.json; without the flag the record is drawn, as
docs/plots/photographer.svg.
"""

import base64
import io
import time
from collections.abc import Mapping
from html import escape
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from offramp.common.depth_color import depth_color, ink_on
from offramp.core.storage import write_atomic
from offramp.features.input_processor import turn_of
from offramp.features.prefix_cache import PrefixCache
from offramp.features.vision_cache import VisionCache
from offramp.report.gallery import words
from offramp_lab.places import DOCS
from offramp_lab.records.record import Record, asked
from offramp_lab.tables.markdown import record

NAME = "photographer"
MODES = {"full": "Full depth", "early_exit": "With exits"}
ASKED = ("What do you see?", "What is he wearing?", "Where is he?", "Is there a dog?")
ROUNDS = 5
WIDTH, PHOTO, MARGIN, LETTER, LINE = 720, 200, 16, 8.4, 30


def photograph() -> Path:
    """The file of the photo package."""
    found = find_spec("offramp_photo")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent / "photographer.jpg"


def measure() -> dict[str, Any]:
    """The caption by mode, and the turns of the dialogue."""
    from offramp.engines.loading import load, usual_prompt
    from offramp.inputs.example import Example

    loaded = load("photo", engine="torch", vision="torch")
    example = Example(photograph(), usual_prompt(loaded.adapter), (), NAME)
    inputs = loaded.encoder.prompts([example])
    modes = {mode: _said(loaded, _answer(loaded, inputs, mode)) for mode in MODES}
    layers = loaded.adapter.backbone.depth
    return {
        "layers": layers,
        "modes": modes,
        "turns": _dialogue(load("photo-chat", engine="torch")),
    }


def _answer(loaded: Any, inputs: Any, mode: str, **kept: Any) -> Any:
    return loaded.model.generate(
        inputs,
        **kept,
        policy=loaded.adapter.policy.in_mode(mode),
        max_new_tokens=loaded.longest,
        do_sample=False,
    )


def _said(loaded: Any, output: Any) -> dict[str, Any]:
    """An answer, its words, and after how many layers each was written."""
    return {
        "text": loaded.encoder.texts(output.new_tokens)[0],
        "words": words(output.new_tokens[0].tolist(), loaded.encoder.tokenizer),
        "depths": output.depths[0].tolist(),
    }


def _dialogue(loaded: Any) -> list[dict[str, Any]]:
    """What is asked, the lossless answer, and the CPU seconds of both modes: medians."""
    held = [(mode, _held(loaded, mode)) for _ in range(ROUNDS) for mode in ("full", "lossless")]
    turns = held[-1][1]
    for n, turn in enumerate(turns):
        taken = {mode: [t[n]["seconds"] for m, t in held if m == mode] for mode, _ in held}
        turn["seconds"] = {mode: median(seconds) for mode, seconds in taken.items()}
    return turns


def _held(loaded: Any, mode: str) -> list[dict[str, Any]]:
    """One dialogue, as `offramp chat` holds it."""
    image = Image.open(photograph()).convert("RGB")
    kept = {"vision_cache": VisionCache(), "prefix_cache": PrefixCache(1)}
    turns: list[dict[str, Any]] = []
    found = []
    for asked_ in ASKED:
        start = time.process_time()
        turns.append(turn_of("user", asked_, sees=not turns))
        inputs = loaded.encoder.of_text(loaded.encoder.conversation_text(turns), [image])
        said = _said(loaded, _answer(loaded, inputs, mode, **kept))
        seconds = time.process_time() - start
        found.append({"asked": asked_, **said, "seconds": seconds})
        turns.append(turn_of("assistant", said["text"]))
    return found


def draw(measured: Mapping[str, Any]) -> str:
    """The photograph, and beside it the dialogue with each word on the colour of its depth."""
    layers, left = measured["layers"], PHOTO + 2 * MARGIN
    picture = Image.open(photograph()).convert("RGB")
    height = round(PHOTO * picture.height / picture.width)
    encoded = io.BytesIO()
    picture.resize((2 * PHOTO, 2 * height)).save(encoded, "JPEG", quality=80)
    data = base64.b64encode(encoded.getvalue()).decode()
    parts, top, said = [], MARGIN + 14, []
    for turn in measured["turns"]:
        full, exits = (turn["seconds"][mode] for mode in ("full", "lossless"))
        took = f"{exits:.2f} s with exits, {full:.2f} s without"
        parts.append(f'<text x="{left}" y="{top}">{escape(turn["asked"])}</text>')
        parts.append(
            f'<text x="{WIDTH - MARGIN}" y="{top}" text-anchor="end" font-size="12" '
            f'fill="#595959">{took}</text>'
        )
        said.append(f"{turn['asked']} {turn['text']} ({took})")
        x, top = float(left), top + 10
        for word, depth in zip(turn["words"], turn["depths"], strict=True):
            if word == "end":
                continue
            wide = len(word) * LETTER + 10
            if x + wide > WIDTH - MARGIN:
                x, top = float(left), top + LINE
            color = depth_color(depth, layers)
            parts.append(
                f'<rect x="{x:.1f}" y="{top}" width="{wide:.1f}" height="24" rx="4" '
                f'fill="{color}"/><text x="{x + 5:.1f}" y="{top + 17}" font-family="monospace" '
                f'font-size="14" fill="{ink_on(color)}">{escape(word)}'
                f"<title>{depth} of {layers} layers</title></text>"
            )
            x += wide + 5
        top += LINE + 22
    total = max(top - 20, height + 2 * MARGIN)
    label = escape("; ".join(said), quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}" width="{WIDTH}" '
        f'role="img" aria-label="{label}" font-family="system-ui, sans-serif" font-size="14" '
        f'fill="#1b1b1b"><rect width="{WIDTH}" height="{total}" rx="8" fill="#ffffff"/>'
        f'<image x="{MARGIN}" y="{MARGIN}" width="{PHOTO}" height="{height}" '
        f'href="data:image/jpeg;base64,{data}"/>{"".join(parts)}</svg>\n'
    )


def main() -> None:
    if asked(__doc__, measure=False).measure:
        Record(NAME, "offramp_lab.pages.photographer").write(measure())
    write_atomic(DOCS / "plots" / f"{NAME}.svg", draw(record(NAME)))


if __name__ == "__main__":
    main()
