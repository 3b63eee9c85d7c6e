"""Learn to be talked to: questions and dialogues about photographs, and captions kept as they were.

Starts from what ships, or from another folder that `export` wrote. The questions are those that
`asked` made of captions, in the base's chat form; captions are the starting model's own, so that
what reinforcement brought is not lost, and a prompt that ends in a colon is completed as before.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from examples.photo_vlm.asked import (
    DESCRIBE,
    FILE,
    Asked,
    Question,
    dialogue,
    is_right,
    read_asked,
    worded,
)
from examples.photo_vlm.command import command
from examples.photo_vlm.evaluate import LONGEST
from examples.photo_vlm.export import PACKAGE
from examples.photo_vlm.rows import Ids, Row, Text, turn_of
from examples.photo_vlm.train import (
    Settings,
    Trainer,
    Validation,
    go,
    keep_words,
    learnt_before,
    options_of,
    prepared,
)
from examples.photo_vlm.words import Detectors
from offramp.core.storage import write_atomic
from offramp.inputs.example import Example
from offramp_photo.tower import Bridge, WordDetector

OWN = "own.jsonl"


@dataclass(frozen=True)
class TalkSettings(Settings):
    """captioned: photographs with the model's own captions a step; own: how many have one. asked:
    photographs a step with `questions` questions each; talked: with a dialogue; rooms: with
    DAQUAR's questions, every `ask_every` steps. raw: share of questions in "Question: ... Answer:".
    """

    rate: float = 6e-4
    bridge_rate: float = 3e-4
    captioned: int = 3
    captions: int = 1
    own: int = 1600
    asked: int = 4
    questions: int = 6
    talked: int = 1
    rooms: int = 1
    ask_every: int = 3
    raw: float = 0.15
    length: int = 112
    asked_length: int = 192
    question_weight: float = 1.0
    talk_weight: float = 0.5


RARE = {
    "count": 4.0,
    "held": 4.0,
    "animal": 4.0,
    "in or out": 3.0,
    "worn": 4.0,
    "doing": 2.5,
    "where": 2.0,
    "colour": 1.5,
    "cannot tell": 0.7,
    "absent": 0.7,
    "yes or no": 0.35,
}
"""How many times as often as others a kind is drawn; others have 1."""


def drawn(questions: Sequence[Question], count: int, draw: random.Random) -> list[Question]:
    """Some questions without repetition, rare kinds more often (Efraimidis and Spirakis 2006)."""
    keys = [(draw.random() ** (1 / RARE.get(q.kind, 1.0)), n) for n, q in enumerate(questions)]
    return [questions[n] for _, n in sorted(keys, reverse=True)[:count]]


def completed(question: str) -> str:
    """A question as DAQUAR's are asked, to be completed behind its colon."""
    text = question.rstrip("?")
    return f"Question: {text[:1].lower()}{text[1:]} ? Answer:"


def asked_as_typed(prompt: str) -> str:
    """DAQUAR's "Question: what is there ? Answer:" as people type it."""
    text = prompt.removeprefix("Question: ").removesuffix(" Answer:").replace(" ?", "?")
    return text[:1].upper() + text[1:]


class Talks:
    """Rows of captions, questions and dialogues: a pure function of the step."""

    def __init__(
        self,
        asked: Sequence[Asked],
        rooms: Mapping[str, Sequence[Example]],
        own: Mapping[str, str],
        images: Mapping[str, int],
        ids: Ids,
        end: int,
    ) -> None:
        """rooms: DAQUAR's questions by photograph. own: the starting model's captions."""
        self.asked = [a for a in asked if a.half is None and a.questions]
        self.rooms, self.own = list(rooms.values()), list(own.items())
        self.captions = dict(own)
        self.images, self.ids, self.end = images, ids, end

    def of_captions(self, step: int, settings: TalkSettings) -> list[Row]:
        draw = random.Random(f"{settings.seed}:{step}:own")
        rows = []
        for passed, (image, caption) in turn_of(self.own, step, settings.captioned, settings.seed):
            texts = (
                Text.of([("Caption:", caption)], self.ids, self.end),
                Text.chat([(draw.choice(DESCRIBE), caption)], self.ids, self.end),
            )
            rows.append(Row(self.images[image], texts, pass_=passed, sided=True))
        return rows

    def of_questions(self, step: int, settings: TalkSettings) -> list[Row]:
        draw = random.Random(f"{settings.seed}:{step}:asked")
        rows = []
        for passed, asked in turn_of(self.asked, step, settings.asked, settings.seed):
            texts = [
                self._question(question, settings.raw, draw)
                for question in drawn(asked.questions, settings.questions, draw)
            ]
            rows.append(Row(self.images[asked.image], tuple(texts), pass_=passed))
        return rows

    def of_dialogues(self, step: int, settings: TalkSettings) -> list[Row]:
        draw = random.Random(f"{settings.seed}:{step}:talked")
        rows = []
        for passed, asked in turn_of(self.asked, step, settings.talked, settings.seed + 1):
            own = [self.captions[asked.image]] if asked.image in self.captions else []
            rounds = dialogue(asked.questions, own, draw)
            if rounds:
                said = [(text, question.answer) for text, question in rounds]
                text = Text.chat(said, self.ids, self.end)
                rows.append(Row(self.images[asked.image], (text,), pass_=passed))
        return rows

    def of_rooms(self, step: int, settings: TalkSettings) -> list[Row]:
        draw = random.Random(f"{settings.seed}:{step}:rooms")
        rows = []
        for passed, examples in turn_of(self.rooms, step, settings.rooms, settings.seed):
            chosen = draw.sample(examples, min(len(examples), settings.questions))
            texts = []
            for example in chosen:
                answer = draw.choice(example.answers)
                if draw.random() < 0.5:
                    texts.append(Text.of([(example.prompt, answer)], self.ids, self.end))
                else:
                    typed = asked_as_typed(example.prompt)
                    texts.append(Text.chat([(typed, answer)], self.ids, self.end))
            row = Row(self.images[examples[0].group], tuple(texts), pass_=passed, sided=True)
            rows.append(row)
        return rows

    def _question(self, question: Question, raw: float, draw: random.Random) -> Text:
        typed = worded(question.text, draw)
        if draw.random() < raw:
            return Text.of([(completed(typed), question.answer)], self.ids, self.end)
        return Text.chat([(typed, question.answer)], self.ids, self.end)


class Talker(Trainer):
    """Learns rows of `Talks`."""

    settings: TalkSettings
    talks: Talks

    def _learn_step(self) -> dict[str, float]:
        s, step = self.settings, self.step
        parts: list[tuple[str, list[Row], int, float]] = [
            ("loss", self.talks.of_captions(step, s), s.length, 1.0),
            ("question_loss", self.talks.of_questions(step, s), s.asked_length, s.question_weight),
            ("talk_loss", self.talks.of_dialogues(step, s), s.asked_length, s.talk_weight),
        ]
        if step % s.ask_every == 0:
            rows = self.talks.of_rooms(step, s)
            parts.append(("room_loss", rows, s.asked_length, 0.25 * s.question_weight))
        return {
            name: self._learn_named(name, rows, length, weight)
            for name, rows, length, weight in parts
            if rows
        }

    def _learn_named(self, name: str, rows: list[Row], most: int, weight: float) -> float:
        visual = self._seen(rows, name)
        longest = max(sum(len(text.ids) for text in row.texts) for row in rows)
        return self._learn_behind(visual, rows, min(most, visual.shape[1] + longest), weight)


class TalkValidation:
    """As `Validation`, with questions by kind."""

    def __init__(self, before: Validation, asked: Sequence[Asked], photographs: int) -> None:
        self.before = before
        chosen = [a for a in asked if a.half == 0 and a.questions][:photographs]
        self.asked = [
            (a.image, q, worded(q.text, random.Random(f"{a.image}:{n}")))
            for a in chosen
            for n, q in enumerate(a.questions)
        ]

    def __call__(self, bridge: Bridge, detector: WordDetector, lora: Any) -> dict[str, Any]:
        row = self.before(bridge, detector, lora)
        answers = self.before.answers(
            bridge,
            detector,
            lora,
            [(image, chat_prompt(text)) for image, _, text in self.asked],
            LONGEST["questions"],
        )
        right: dict[str, list[bool]] = {}
        for (_, question, _), answer in zip(self.asked, answers, strict=True):
            right.setdefault(question.kind, []).append(is_right(question, answer))
        row["right"] = {kind: sum(some) / len(some) for kind, some in sorted(right.items())}
        said = zip(self.asked, answers, strict=True)
        row["asked_said"] = [f"{text} {answer}" for (_, _, text), answer in said][:24]
        return row


def chat_prompt(text: str) -> str:
    """A message in the form of the base's chat template."""
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def turns_of(rounds: Sequence[tuple[str, Question]]) -> Iterator[tuple[str, Question]]:
    """The prompt of each turn, which has the turns before it with people's answers."""
    before = ""
    for text, question in rounds:
        prompt = before + chat_prompt(text)
        yield prompt, question
        before = f"{prompt}{question.answer}<|im_end|>\n"


def own_captions(
    validation: Validation,
    bridge: Bridge,
    detectors: Detectors,
    lora: Any,
    examples: Sequence[Example],
    work: Path,
) -> dict[str, str]:
    """Greedy captions of the model before it learns, kept in a file."""
    file = work / OWN
    if not file.is_file():
        answers = validation.answers(
            bridge,
            detectors.whole,
            lora,
            [(e.group, "Caption:") for e in examples],
            LONGEST["captions"],
        )
        said = dict(zip((e.group for e in examples), answers, strict=True))
        write_atomic(file, json.dumps(said).encode())
    found: dict[str, str] = json.loads(file.read_text())
    return found


@command
def main() -> None:
    parser = options_of("talk", str(__doc__), 1000)
    parser.add_argument(
        "--start", type=Path, metavar="DIR", default=PACKAGE, help="default: what ships"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    asked = read_asked(arguments.work / FILE)
    before = learnt_before(arguments.start)
    keep_words(arguments.start, arguments.work)
    settings = TalkSettings(arguments.steps)
    trainer, validation, splits = prepared(Talker, settings, before, arguments)
    chosen = splits["captions"][: settings.own]
    own = own_captions(
        validation, trainer.bridge, trainer.detectors, trainer.lora, chosen, arguments.work
    )
    rooms: dict[str, list[Example]] = {}
    for example in splits["questions"]:
        rooms.setdefault(example.group, []).append(example)
    rows = trainer.rows
    trainer.talks = Talks(asked, rooms, own, rows.images, rows.ids, rows.end)
    go(trainer, TalkValidation(validation, asked, arguments.photographs), "talk", arguments)


if __name__ == "__main__":
    main()
