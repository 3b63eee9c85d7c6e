"""Write what exits are trained or calibrated on: prompts of all tasks, as people put them.

Of training photographs, or with --half of the choosing or the measuring half of those held out. A
turn of a dialogue is a prompt that has the turns before it, with people's answers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from examples.photo_vlm.asked import DESCRIBE, FILE, Asked, dialogue, read_asked, worded
from examples.photo_vlm.command import command, parser_of
from examples.photo_vlm.rows import half_of, read_photographs
from examples.photo_vlm.talk import asked_as_typed, turns_of
from offramp.core.storage import write_atomic
from offramp.inputs.example import Example

Line = tuple[Example, str, Sequence[str]]
"""Whose photograph, the prompt, the right answers."""


def of_captions(examples: Sequence[Example], draw: random.Random) -> Iterator[Line]:
    for n, example in enumerate(examples):
        yield example, draw.choice(DESCRIBE) if n % 3 == 2 else "Caption:", example.answers


def of_questions(rows: Sequence[Asked], draw: random.Random) -> Iterator[tuple[str, str, str]]:
    """One of each photograph; of its kinds each as likely, however many questions it has."""
    for row in rows:
        kind = draw.choice(sorted({question.kind for question in row.questions}))
        question = draw.choice([q for q in row.questions if q.kind == kind])
        yield row.image, worded(question.text, draw), question.answer


def of_dialogues(rows: Sequence[Asked], draw: random.Random) -> Iterator[tuple[str, str, str]]:
    for row in rows:
        for prompt, question in [*turns_of(dialogue(row.questions, (), draw))][1:]:
            yield row.image, prompt, question.answer


@command
def main() -> None:
    parser = parser_of("prompts", "--out runs/talk.jsonl", str(__doc__), "data", "work")
    parser.add_argument("--half", type=int, choices=(0, 1), help="default: of training")
    for name, count in (("captions", 300), ("questions", 600), ("talks", 40), ("rooms", 60)):
        parser.add_argument(f"--{name}", type=int, default=count, help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    splits = read_photographs(arguments.data)
    half: int | None = arguments.half
    held = "" if half is None else "_val"
    captioned = [e for e in splits[f"captions{held}"] if half is None or half_of(e) == half]
    rooms = [e for e in splits[f"questions{held}"] if half is None or half_of(e) == half]
    asked = [a for a in read_asked(arguments.work / FILE) if a.half == half and a.questions]
    images: dict[str, Any] = {example.group: example for example in captioned}
    draw = random.Random(f"prompts:{half}")
    lines: list[Line] = []
    lines += of_captions(draw.sample(captioned, min(len(captioned), arguments.captions)), draw)
    for made, count in ((of_questions, arguments.questions), (of_dialogues, arguments.talks)):
        some = draw.sample(asked, min(len(asked), count))
        lines += [(images[image], text, [answer]) for image, text, answer in made(some, draw)]
    for example in draw.sample(rooms, min(len(rooms), arguments.rooms)):
        prompt = example.prompt if draw.random() < 0.5 else asked_as_typed(example.prompt)
        lines.append((example, prompt, example.answers))
    draw.shuffle(lines)
    text = "".join(
        json.dumps(
            {
                "image": str(Path(str(example.image)).resolve()),
                "prompt": prompt,
                "answers": list(answers),
            }
        )
        + "\n"
        for example, prompt, answers in lines
    )
    write_atomic(arguments.out, text.encode())
    print(f"{len(lines)} prompts in {arguments.out}")


if __name__ == "__main__":
    main()
