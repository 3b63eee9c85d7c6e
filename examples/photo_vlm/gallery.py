"""A page of photographs with their captions, each token in the colour of the depth it ran to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from examples.photo_vlm.caption import ADAPTER, load
from examples.photo_vlm.command import WORK, command, parser_of
from examples.photo_vlm.evaluate import LONGEST, caption_figures
from examples.photo_vlm.rows import read_photographs
from offramp.adapter import Adapter
from offramp.answers import Model, generate_answers
from offramp.data.example import Example
from offramp.evaluation.run_log import Done, Row
from offramp.report.gallery import gallery
from offramp.report.html import Section, document
from offramp.storage import write_atomic


def rows_of(model: Model, encoder: Any, examples: Sequence[Example]) -> list[Row]:
    """A row for the gallery of each caption."""
    answers = generate_answers(model, encoder, examples, max_new_tokens=LONGEST["captions"])
    return [
        {"key": e.key, "answer": a.text, "ids": list(a.ids), "depths": list(a.depths)}
        for e, a in zip(examples, answers, strict=True)
    ]


def page(model: Path, adapter: Path, examples: list[Example], shown: int) -> str:
    """HTML of `shown` of the photographs: half that early exit changed, half that it did not."""
    backbone, encoder = load(model)
    ours = Adapter.load(adapter, backbone)
    done: Done = {}
    scores = {}
    models: dict[str, Model] = {"full": backbone, "early_exit": ours}
    for mode, answering in models.items():
        rows = rows_of(answering, encoder, examples)
        texts = [row["answer"] for row in rows]
        scores[mode] = caption_figures(texts, examples, ("CIDEr",))["CIDEr"]
        done |= {(mode, row["key"]): row for row in rows}
    pictures = {e.key: e for e in examples}
    body = gallery(done, backbone.depth, pictures, encoder.tokenizer, per_group=shown // 2)
    summary = (
        f"{len(examples)} photographs, exits at {', '.join(map(str, ours.policy.thresholds))} of "
        f"{backbone.depth} layers: CIDEr {scores['full']:.3f} at full depth, "
        f"{scores['early_exit']:.3f} with early exits. Research-only photographs: not for "
        "publication."
    )
    whole = Markup("<p>{}</p>\n{}").format(summary, body)
    return document("Photographs", [Section("answers", "Captions", whole)])


@command
def main() -> None:
    parser = parser_of(
        "gallery", "--out runs/photo_vlm/gallery.html", str(__doc__), "data", "model"
    )
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help="folder of trained exits")
    parser.add_argument("--photos", type=int, default=200, help="looked at (default: %(default)s)")
    parser.add_argument("--shown", type=int, default=30, help="on the page (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=WORK / "gallery.html")
    arguments = parser.parse_args()
    examples = read_photographs(arguments.data)["captions_val"][: arguments.photos]
    write_atomic(arguments.out, page(arguments.model, arguments.adapter, examples, arguments.shown))
    print(arguments.out)


if __name__ == "__main__":
    main()
