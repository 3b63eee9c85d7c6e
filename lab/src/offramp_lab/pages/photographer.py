"""The README's photograph: the caption of the photo model, each word by the layers it took.

`python -m offramp_lab.pages.photographer --measure` captions the photograph that ships at full
depth and with exits, and keeps words and depths in lab/records/photographer.json; without the flag
the record is drawn, as docs/plots/photographer.svg.
"""

import base64
import io
from collections.abc import Mapping
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from offramp.common.depth_color import depth_color, ink_on
from offramp.core.storage import write_atomic
from offramp.report.gallery import words
from offramp_lab.places import DOCS
from offramp_lab.records.record import Record, asked
from offramp_lab.tables.markdown import record

NAME = "photographer"
MODES = {"full": "Full depth", "early_exit": "With exits"}
WIDTH, PHOTO, MARGIN, LETTER, LINE = 720, 200, 16, 8.4, 30


def photograph() -> Path:
    """The file of the photo package."""
    found = find_spec("offramp_photo")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent / "photographer.jpg"


def measure() -> dict[str, Any]:
    """The caption by mode: its words, and after how many layers each was written."""
    from offramp.engines.loading import load, usual_prompt
    from offramp.inputs.example import Example

    loaded = load("photo", engine="torch", vision="torch")
    example = Example(photograph(), usual_prompt(loaded.adapter), (), NAME)
    inputs = loaded.encoder.prompts([example])
    made = {
        mode: loaded.model.generate(
            inputs,
            policy=loaded.adapter.policy.in_mode(mode),
            max_new_tokens=loaded.longest,
            do_sample=False,
        )
        for mode in MODES
    }
    return {
        "layers": loaded.adapter.backbone.depth,
        "modes": {
            mode: {
                "text": loaded.encoder.texts(output.new_tokens)[0],
                "words": words(output.new_tokens[0].tolist(), loaded.encoder.tokenizer),
                "depths": output.depths[0].tolist(),
            }
            for mode, output in made.items()
        },
    }


def draw(measured: Mapping[str, Any]) -> str:
    """The photograph, and beside it the captions with each word on the colour of its depth."""
    layers, left = measured["layers"], PHOTO + 2 * MARGIN
    picture = Image.open(photograph()).convert("RGB")
    height = round(PHOTO * picture.height / picture.width)
    encoded = io.BytesIO()
    picture.resize((2 * PHOTO, 2 * height)).save(encoded, "JPEG", quality=80)
    data = base64.b64encode(encoded.getvalue()).decode()
    parts, top, said = [], MARGIN + 14, []
    for mode, title in MODES.items():
        found = measured["modes"][mode]
        mean = sum(found["depths"]) / len(found["depths"])
        heading = f"{title}: {mean:.1f} of {layers} layers for a token"
        parts.append(f'<text x="{left}" y="{top}" font-weight="600">{escape(heading)}</text>')
        said.append(f"{heading}: {found['text']}")
        x, top = float(left), top + 12
        for word, depth in zip(found["words"], found["depths"], strict=True):
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
        top += LINE + 30
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
