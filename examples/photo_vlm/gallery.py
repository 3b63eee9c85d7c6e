"""A page of photographs with their captions, each token in the colour of the depth it ran to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from examples.photo_vlm.caption import ADAPTER, load
from examples.photo_vlm.command import WORK, command, parser_of
from examples.photo_vlm.evaluate import LONGEST, caption_figures
from examples.photo_vlm.rows import read_photographs

from offramp.adapter import Adapter
from offramp.data.example import Example
from offramp.engine.policy import FULL, ExitPolicy
from offramp.evaluation.run_log import Done, Row
from offramp.models.exits import Exits
from offramp.research.report.gallery import gallery
from offramp.research.report.html import Section, document, paragraph
from offramp.storage import write_atomic


def answers(
    adapter: Adapter, encoder: Any, examples: Sequence[Example], policy: ExitPolicy
) -> Iterator[Row]:
    """A row for the gallery of each caption of a batch."""
    prompts, longest = encoder.prompts(examples), LONGEST["captions"]
    made = adapter.generate(prompts, policy=policy, max_new_tokens=longest, do_sample=False)
    for example, tokens, ran in zip(examples, made.new_tokens, made.depths, strict=True):
        ids = tokens[ran > 0]
        (text,) = encoder.texts(ids[None])
        yield {
            "key": example.key, "answer": text, "ids": ids.tolist(), "depths": ran[ran > 0].tolist()
        }  # fmt: skip


def page(model: Path, adapter: Path, examples: list[Example], shown: int) -> str:
    """HTML of `shown` of the photographs: half that early exit changed, half that it did not."""
    backbone, encoder = load(model)
    ours = Adapter.load(adapter, backbone)
    full = Adapter(backbone, Exits(backbone, ours.exits.depths[:1], kind="lens"))
    done: Done = {}
    scores = {}
    for mode, some, policy in (("full", full, FULL), ("early_exit", ours, ours.policy)):
        rows = [
            row
            for start in range(0, len(examples), 32)
            for row in answers(some, encoder, examples[start : start + 32], policy)
        ]
        texts = [row["answer"] for row in rows]
        scores[mode] = caption_figures(texts, examples, ("CIDEr",))["CIDEr"]
        done |= {(mode, row["key"]): row for row in rows}
    pictures = {e.key: e for e in examples}
    body = gallery(done, backbone.depth, pictures, encoder.tokenizer, each=shown // 2)
    intro = (
        f"{len(examples)} photographs, exits at {', '.join(map(str, ours.policy.thresholds))} of "
        f"{backbone.depth} layers: CIDEr {scores['full']:.3f} at full depth, "
        f"{scores['early_exit']:.3f} with early exits."
    )
    ending = paragraph("Research-only photographs: not for publication.")
    return document("Photographs", intro, [Section("answers", "Captions", body)], ending)


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
