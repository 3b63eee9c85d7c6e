"""The README's image: one caption written with early exits and by the full model, word by word.

`python -m offramp_lab.pages.picture --measure` generates the caption on the tiny OPT model, times
every token in interleaved runs, and keeps both in lab/records/picture.json; without the flag the
record is drawn, as docs/early-exit.svg.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from html import escape
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from offramp.common.depth_color import depth_color, ink_on
from offramp.common.provenance import provenance
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.storage import write_atomic, write_json
from offramp.data.scenes import world
from offramp.inputs.example import Example
from offramp.report.gallery import picture as embedded
from offramp.report.gallery import words
from offramp_lab.experiments.experiment import Experiment, Ticks
from offramp_lab.places import DOCS, RECORDS
from offramp_lab.records.subjects import tiny_with
from offramp_lab.tables.markdown import record

SCENE, REPEATS, SLOWER, HOLD = 17, 25, 60, 2.5  # HOLD: seconds at the end of a loop
WIDTH, MARGIN, LETTER, LINE = 560, 16, 7.9, 27
TITLES = {"early_exit": "Early exit", "full": "Full model"}


def measure() -> dict[str, Any]:
    """The caption by both, and for each token the median of the CPU seconds it took."""
    torch.set_num_threads(1)
    adapter, encoder = tiny_with("opt")
    inputs = encoder.prompts([_example()])
    policies = {"early_exit": adapter.policy, "full": ExitPolicy()}

    def captioned(_: None, policy: ExitPolicy) -> tuple[Any, list[float]]:
        clock = Ticks()
        made = adapter.generate(
            inputs, policy=policy, streamer=clock, max_new_tokens=48, do_sample=False
        )
        gaps = [after - before for before, after in pairwise(clock.cpu)]
        return made, gaps[1 - made.depths.shape[1] :]

    methods = {name: partial(captioned, policy=policy) for name, policy in policies.items()}
    runs = Experiment(methods, rounds=REPEATS).run()
    return {
        "layers": adapter.backbone.depth,
        "slower": SLOWER,
        "modes": {
            name: {
                "words": words(first.new_tokens[0].tolist(), encoder.tokenizer),
                "depths": first.depths[0].tolist(),
                "seconds": [0.0, *map(median, zip(*(gaps for [(_, gaps)] in rounds), strict=True))],
            }
            for name, rounds in runs.items()
            for [(first, _)] in rounds[:1]
        },
        "provenance": provenance(None, sys.argv, None),
    }


def _example() -> Example:
    return Example(world.render(world.scene("test", SCENE)), world.CAPTION_PROMPT, (), "picture")


def draw(measured: Mapping[str, Any]) -> str:
    """The record as an animated SVG on a ground of its own; at rest, all words are there."""
    modes, layers = measured["modes"], measured["layers"]
    totals = {name: sum(mode["seconds"]) for name, mode in modes.items()}
    loop = measured["slower"] * max(totals.values()) + HOLD
    parts, styles, top = [], [], 140.0
    for name, title in TITLES.items():
        mode = modes[name]
        depth = sum(mode["depths"]) / len(mode["depths"])
        speed = f", {totals['full'] / totals[name]:.1f}x as fast" if name != "full" else ""
        head = f"{title}: {round(depth, 1):g} of {layers} layers a word{speed}"
        parts.append(f'<text x="{MARGIN}" y="{top:g}" class="head">{escape(head)}</text>')
        top += 12
        reached = 0.0
        chips = list(_placed(mode["words"], top))
        rows = zip(chips, mode["depths"], mode["seconds"], strict=True)
        for n, ((x, y, width, word), at, seconds) in enumerate(rows):
            reached += seconds * measured["slower"]
            color = depth_color(at, layers)
            styles.append(_appears(f"{name[0]}{n}", reached, loop))
            parts.append(
                f'<g class="{name[0]}{n}"><title>{at} of {layers} layers</title>'
                f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="22" rx="5" fill="{color}"/>'
                f'<text x="{x + width / 2:g}" y="{y + 15.5:g}" class="word" fill="{ink_on(color)}">'
                f"{escape(word)}</text></g>"
            )
        top = chips[-1][1] + 22 + 34
    height = top - 12
    depths = sorted({d for mode in modes.values() for d in mode["depths"]})
    image = embedded(_example())["source"]
    same = modes["early_exit"]["words"] == modes["full"]["words"]
    lines = [
        f"A tiny VLM captions this image{', the same words twice' if same else ''}.",
        f"Shown {measured['slower']} times slower than it ran.",
    ]
    intro = "".join(
        f'<text x="126" y="{34 + 20 * n}" class="intro">{escape(line)}</text>'
        for n, line in enumerate(lines)
    )
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" \
width="{WIDTH}" height="{height:g}" role="img">
<title>A caption written with early exits and by the full model</title>
<style>
text{{font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}}
.head,.intro{{fill:#1b2027}}
.head{{font-size:15px;font-weight:650}}.intro{{font-size:15px}}.soft{{font-size:12.5px;fill:#5b6572}}
.word{{font:13px ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;text-anchor:middle}}
{"".join(styles)}
@media (prefers-reduced-motion:reduce){{g{{animation:none!important}}}}
</style>
<rect width="{WIDTH}" height="{height:g}" rx="10" fill="#fff"/>
<image x="{MARGIN}" y="16" width="96" height="96" href="{image}" style="image-rendering:pixelated"/>
{intro}{_legend(depths, layers)}
{"".join(parts)}
</svg>
"""


def _placed(texts: Sequence[str], top: float) -> Iterator[tuple[float, float, float, str]]:
    """x, y and width of each word's chip, in lines."""
    x, y = float(MARGIN), top
    for text in texts:
        width = LETTER * len(text) + 12
        if x + width > WIDTH - MARGIN:
            x, y = float(MARGIN), y + LINE
        yield x, y, width, text
        x += width + 4


def _appears(name: str, at: float, loop: float) -> str:
    share = 100 * at / loop
    return (
        f"@keyframes {name}{{0%,{share:.2f}%{{opacity:0}}{share + 0.01:.2f}%,100%{{opacity:1}}}}"
        f".{name}{{animation:{name} {loop:.2f}s linear infinite}}"
    )


def _legend(depths: Sequence[int], layers: int) -> str:
    parts = ['<text x="126" y="82" class="soft">A word\'s colour: layers run for it</text>']
    x = 126.0
    for depth in depths:
        color = depth_color(depth, layers)
        parts.append(
            f'<rect x="{x:g}" y="90" width="30" height="18" rx="4" fill="{color}"/>'
            f'<text x="{x + 15:g}" y="103.5" class="word" fill="{ink_on(color)}">{depth}</text>'
        )
        x += 35
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="make the record again")
    if parser.parse_args().measure:
        write_json(RECORDS / "picture.json", measure())
    write_atomic(DOCS / "early-exit.svg", draw(record("picture")))


if __name__ == "__main__":
    main()
