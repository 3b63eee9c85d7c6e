"""What a model of photographs answers when it is talked to, by task, and what its exits do there.

`python -m examples.photo_vlm.talked` answers questions made of captions, dialogues, captions and
questions as people type them about photographs of the measuring half of Flickr8k's validation
split, of which nothing chose anything; `examples.photo_vlm.asked` makes the questions. Right
answers are held against the constant answer that would be right most often. Of exits it replays
each over the full model's own answers, which shows which would stay the same under any thresholds.
A reader's judgement of the plain questions, by their places, is kept under "judged".
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from examples.photo_vlm.asked import FILE, Asked, Question, dialogue, is_right, read_asked, worded
from examples.photo_vlm.evaluate import LONGEST, caption_measures, load
from examples.photo_vlm.rows import half_of, read_photographs
from examples.photo_vlm.talk import turns_of
from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import Answer, KeptAnswers, answers_to, prompted
from offramp.adapter.shipped import shipped_exits
from offramp.calibration.replay import Replay, replay
from offramp.core.decoding.policy import FULL
from offramp.core.models.fingerprint import dump_fingerprint, fingerprint
from offramp.core.storage import digest_rows, read_json
from offramp.data.item import Item
from offramp.evaluation.evaluate import evaluate
from offramp.evaluation.statistics import interval, mean_of
from offramp.evaluation.timing import beside_full, generate_fn, in_turn, timed
from offramp.features.input_processor import InputProcessor
from offramp.features.teacher_forcing import Answered
from offramp.inputs.example import Example
from offramp_lab.experiments.experiment import bar, times
from offramp_lab.places import RUNS
from offramp_lab.records.record import Record, Some, asked

RECORD = Record("talk", "examples.photo_vlm.talked")
LONGEST_ANSWER = 12
AT_ONCE = 16
CANDIDATES = 100
PARTS = ("plain", "questions", "dialogues", "captions", "ranked")
THRESHOLDS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.01)
PLAIN = {
    "What colour is the dog?": r"\bdog\b",
    "what is the man doing": r"\bman\b",
    "How many people are there?": r"\b(people|men|man|women|woman|boys?|girls?|child(ren)?)\b",
    "Where is this?": "",
    "Is there a dog?": "",
    "what is she wearing?": r"\b(woman|girl|lady)\b",
    "Is it outside?": "",
    "who is in the picture": r"\b(people|men|man|women|woman|boys?|girls?|child(ren)?)\b",
    "What is he holding?": r"\b(man|boy)\b.*\bhold",
    "Is it snowing?": "",
}
"""Asked of five photographs each, as people type; of such as it can be asked of, by what two
captions say."""


@dataclass(frozen=True)
class Put:
    """One question about a photograph, as it was put."""

    example: Example
    question: Question


def put_to(rows: Sequence[Asked], images: Mapping[str, Example], each: int) -> dict[str, list[Put]]:
    """At most `each` questions of a kind, of as many photographs as can be."""
    draw = random.Random(71)
    found: dict[str, list[Put]] = {}
    for row in draw.sample(list(rows), len(rows)):
        for kind in sorted({question.kind for question in row.questions}):
            of_kind = [question for question in row.questions if question.kind == kind]
            if len(found.setdefault(kind, [])) < each:
                question = draw.choice(of_kind)
                example = images[row.image]
                key = f"{row.image}:{kind}"
                prompt = worded(question.text, draw)
                put = Example(example.image, prompt, (question.answer,), key, row.image)
                found[kind].append(Put(put, question))
    return dict(sorted(found.items()))


def best_constant(questions: Sequence[Question]) -> tuple[str, list[bool]]:
    """The answer that is right most often, and where it is."""
    answers = sorted({question.answer for question in questions})
    right = {answer: [is_right(q, answer) for q in questions] for answer in answers}
    best = max(answers, key=lambda answer: sum(right[answer]))
    return best, right[best]


Write = Callable[[Sequence[Example], int], list[Answer]]


def questions_by_kind(puts: Mapping[str, list[Put]], write: Write) -> dict[str, Any]:
    """Right answers of each kind, and over the best constant answer, with 95% intervals."""
    record: dict[str, Any] = {}
    for kind, some in puts.items():
        answers = write([put.example for put in some], LONGEST_ANSWER)
        questions = [put.question for put in some]
        groups = [put.example.group for put in some]
        right = [is_right(q, a.text) for q, a in zip(questions, answers, strict=True)]
        constant, would = best_constant(questions)
        gain = [float(r) - float(w) for r, w in zip(right, would, strict=True)]
        record[kind] = {
            "count": len(some),
            "right": sum(right) / len(right),
            "constant": constant,
            "constant_right": sum(would) / len(would),
            "above": mean_of(gain).value,
            "above_interval": interval(mean_of(gain), groups),
            "empty": sum(not a.text.strip() for a in answers),
            "refused": sum(a.text.startswith("I cannot see") for a in answers),
            "said": [
                {
                    "image": p.example.group,
                    "asked": p.example.prompt,
                    "people": p.question.answer,
                    "answer": a.text,
                    "right": r,
                }
                for p, a, r in zip(some, answers, right, strict=True)
            ][:30],
        }
        print(kind, {n: v for n, v in record[kind].items() if n != "said"}, flush=True)
    return record


def dialogues(
    rows: Sequence[Asked], images: Mapping[str, Example], count: int, write: Write
) -> Any:
    """Right answers by turn, behind the model's own answers before; every turn's text is kept."""
    talks: list[tuple[Example, list[tuple[str, Question]]]] = []
    for row in rows:
        turns = dialogue(row.questions, (), random.Random(f"talk:{row.image}"))
        if turns and len(talks) < count:
            talks.append((images[row.image], turns))
    written = ["" for _ in talks]
    right: dict[int, list[bool]] = {}
    said: list[list[str]] = [[] for _ in talks]
    for turn in range(max(len(turns) for _, turns in talks)):
        live = [n for n, (_, turns) in enumerate(talks) if turn < len(turns)]
        prompts = []
        for n in live:
            example, turns = talks[n]
            written[n] += ("\n" if turn else "") + f"<|im_start|>user\n{turns[turn][0]}<|im_end|>\n"
            written[n] += "<|im_start|>assistant\n"
            key = f"{example.key}:{turn}"
            prompts.append(Example(example.image, written[n], ("-",), key, example.group))
        for n, answer in zip(live, write(prompts, LONGEST_ANSWER), strict=True):
            written[n] += f"{answer.text}<|im_end|>"
            text, question = talks[n][1][turn]
            right.setdefault(turn + 1, []).append(is_right(question, answer.text))
            said[n] += [f"{text} {answer.text} ({question.answer})"]
    return {
        "count": len(talks),
        "right_by_turn": {str(turn): sum(r) / len(r) for turn, r in right.items()},
        "answers_by_turn": {str(turn): len(r) for turn, r in right.items()},
        "said": [
            {"image": example.group, "turns": turns}
            for (example, _), turns in zip(talks, said, strict=True)
        ][:30],
    }


def rounds_to_rank(rows: Sequence[Asked], images: Mapping[str, Example]) -> Iterator[Item]:
    """The turns of a dialogue about each photograph, with people's answers, each with a hundred
    candidates."""
    answers: dict[str, set[str]] = {}
    for row in rows:
        for question in row.questions:
            answers.setdefault(question.kind, set()).add(question.answer)
    for row in rows:
        draw, picture = random.Random(f"ranked:{row.image}"), images[row.image].image
        for turn, (prompt, question) in enumerate(turns_of(dialogue(row.questions, (), draw))):
            candidates, gold = among_others(question, answers, draw)
            key = f"{row.image}:{turn}"
            example = Example(picture, prompt, (question.answer,), key, row.image)
            yield Item(example, candidates=candidates, gold=gold)


def ranked(
    rows: Sequence[Asked], images: Mapping[str, Example], count: int, encoder: InputProcessor
) -> dict[str, Any]:
    """VisDial's protocol (Das et al. 2017): the place of people's answer by its likelihood."""
    model = digest_rows([dump_fingerprint(fingerprint(encoder.backbone))])[:12]
    found = evaluate(
        encoder.backbone,
        encoder,
        [*islice(rounds_to_rank(rows, images), count)],
        "dialogue",
        mode="full",
        out=RUNS / "talk" / f"ranked-{model}",
        resume=True,
        progress=bar("ranked"),
    )
    return {"rounds": found["n"], "candidates": CANDIDATES, **found["modes"]["full"]["metrics"]}


def among_others(
    question: Question, answers: Mapping[str, set[str]], draw: random.Random
) -> tuple[tuple[str, ...], int]:
    """The answer among wrong ones, and its place. Half of these, as in VisDial, answer questions of
    its kind; answers: by kind."""
    every = sorted(set().union(*answers.values()))
    both = sorted(answers[question.kind]), every
    alike, others = ([a for a in some if not is_right(question, a)] for some in both)
    chosen = draw.sample(alike, min(len(alike), CANDIDATES // 2))
    others = [a for a in others if a not in chosen]
    chosen += draw.sample(others, CANDIDATES - 1 - len(chosen))
    gold = draw.randrange(CANDIDATES)
    chosen.insert(gold, question.answer)
    return tuple(chosen), gold


def captions(examples: Sequence[Example], write: Write, before: Path | None) -> dict[str, Any]:
    """CIDEr, and against another model's captions of the same photographs.

    before: file of these captions, by photograph.
    """
    answers = write(examples, LONGEST["captions"])
    groups = [example.group for example in examples]
    texts = [answer.text for answer in answers]
    ours = caption_measures(texts, examples, ("CIDEr",))["CIDEr"]
    record: dict[str, Any] = {
        "count": len(examples),
        "CIDEr": ours.value,
        "interval": interval(ours, groups),
        "said": [{"image": e.group, "answer": t} for e, t in zip(examples, texts, strict=True)],
    }
    if before is not None:
        said = read_json(before)
        theirs = caption_measures([said[g] for g in groups], examples, ("CIDEr",))["CIDEr"]
        record["before"] = {
            "CIDEr": theirs.value,
            "difference": ours.value - theirs.value,
            "interval": interval(ours, groups, minus=theirs),
        }
    return record


def plain(images: Sequence[Example], write: Write) -> dict[str, Any]:
    """Every plain question about five photographs of its own; how many answers are empty."""
    asked_: list[Example] = []
    free = [*images]
    for text, said in PLAIN.items():
        fit = [i for i in free if sum(bool(re.search(said, a)) for a in i.answers) > 1][:5]
        free = [image for image in free if image not in fit]
        asked_ += [
            Example(i.image, text, ("-",), f"plain:{len(asked_)}:{i.group}", i.group) for i in fit
        ]
    answers = write(asked_, LONGEST["captions"])
    return {
        "count": len(answers),
        "empty": sum(not answer.text.strip() for answer in answers),
        "said": [
            {"image": e.group, "asked": e.prompt, "answer": a.text}
            for e, a in zip(asked_, answers, strict=True)
        ],
    }


# -- exits ----------------------------------------------------------------------------------------


def sped(
    adapter: Adapter, encoder: InputProcessor, tasks: Mapping[str, Sequence[Example]]
) -> dict[str, Any]:
    """By task and mode: how many times as fast as full depth it answers one example at a time, and
    how many answers are full depth's. CPU time, from pixels to text and of decoding."""
    policy = adapter.policy
    modes = {"full": FULL, "lossless": policy.in_mode("lossless")}
    if policy.thresholds or policy.trust is not None:
        modes["early exit"] = policy.in_mode("early_exit")
    record: dict[str, Any] = {}
    for task, examples in tasks.items():
        longest = LONGEST["captions"] if task == "captions" else LONGEST_ANSWER
        options: dict[str, Any] = {"max_new_tokens": longest, "do_sample": False}
        writes = {n: generate_fn(adapter.generate, policy=p, **options) for n, p in modes.items()}
        runs = in_turn(
            {n: partial(timed, write, clock=time.process_time) for n, write in writes.items()},
            [encoder.prompts([example]) for example in examples],
            rounds=1,
            warm=1,
            progress=bar(task),
        )
        [full], *others = beside_full(runs, {"lossless": "full"}).values()
        record[task] = {"answers": len(full), "full": {"seconds": _whole(full)[1].mean()}}
        for mode, [own] in zip([*modes][1:], others, strict=True):
            record[task][mode] = {
                "whole": times(_whole(own), _whole(full)),
                "decoding": times(_decoded(own), _decoded(full)),
                "same": sum(a[2] == b[2] for a, b in zip(own, full, strict=True)),
            }
        print(task, record[task], flush=True)
    return record


def _whole(taken: Sequence[Any]) -> Any:
    """Answers, and the seconds of each [2, N]."""
    return np.array([[1.0, whole] for whole, _, _ in taken]).T


def _decoded(taken: Sequence[Any]) -> Any:
    """Tokens behind each answer's first, and the seconds of these [2, N]."""
    return np.array([[len(ids) - 1.0, decode] for _, decode, ids in taken]).T


def replayed(
    adapter: Adapter, encoder: InputProcessor, tasks: Mapping[str, Sequence[tuple[Example, Answer]]]
) -> dict[str, Any]:
    """By task: the share of tokens that each exit says as full depth does, its confidence, and what
    ways of leaving would change and save."""
    record: dict[str, Any] = {}
    for task, pairs in tasks.items():
        rows = [Answered(example, answer.ids, False) for example, answer in pairs]
        seen = replay(encoder, adapter.exits, rows, shortlist=adapter.policy.shortlist)
        record[task] = {
            "answers": len(rows),
            "tokens": int(seen.mask.sum()),
            "exits": {str(depth): _exit_of(seen, depth) for depth in adapter.exits.depths},
            "ways": _ways(seen, adapter.exits.depths),
        }
        print(task, record[task]["exits"], flush=True)
    return record


def _exit_of(seen: Replay, depth: int) -> dict[str, float | None]:
    mask = seen.mask
    same = (seen.said[depth] == seen.targets)[mask]
    scores = seen.scores[depth][mask]
    return {
        "same": float(same.mean()),
        "confidence": float(scores.mean()),
        "auc": _auc(scores, same),
    }


def _auc(scores: Any, same: Any) -> float | None:
    """The probability that a token which stays is surer than one which changes; None: all are of
    one sort."""
    good, bad = scores[same], scores[~same]
    if not len(good) or not len(bad):
        return None
    order = np.concatenate((good, bad)).argsort().argsort() + 1
    ranks = float(order[: len(good)].sum()) - len(good) * (len(good) + 1) / 2
    return ranks / (len(good) * len(bad))


def _ways(seen: Replay, depths: Sequence[int]) -> list[dict[str, Any]]:
    """Static exits and thresholds: the share of changed answers, and the mean depth of tokens."""
    rows = []
    each = {f"static {d}": {d: 0.0} for d in depths}
    each |= {f"exit {d} at {t}": {d: t} for d in depths for t in THRESHOLDS if t}
    each |= {f"all at {t}": dict.fromkeys(depths, t) for t in THRESHOLDS if t}
    for name, thresholds in each.items():
        reached = seen.depths(thresholds)
        rows.append(
            {
                "way": name,
                "changed": float(seen.differs(reached).mean()),
                "mean_depth": float(reached[seen.mask].mean()),
            }
        )
    return rows


def main() -> None:
    arguments = asked(
        __doc__,
        photo=True,
        name="photo-chat",
        asked=RUNS / "photo_vlm" / FILE,
        each=100,
        photographs=300,
        talks=50,
        rounds=200,
        timed=60,
        parts=Some(PARTS),
        before=None,
    )
    splits = read_photographs(arguments.data)
    held = [example for example in splits["captions_val"] if half_of(example) == 1]
    images = {example.group: example for example in held}
    rows = [row for row in read_asked(arguments.asked) if row.half == 1 and row.questions]
    backbone, encoder = load("float32", name=arguments.name)
    kept: dict[str, list[tuple[Example, Answer]]] = {}

    file = KeptAnswers(RUNS / "talk" / "answers.jsonl", dump_fingerprint(fingerprint(backbone)))

    def writer(task: str) -> Write:
        def write(examples: Sequence[Example], longest: int) -> list[Answer]:
            options: dict[str, Any] = {"max_new_tokens": longest}
            batches = prompted(encoder, examples, AT_ONCE, longest, bar(task))
            answers = [
                answer
                for inputs in batches
                for answer in file.of(
                    inputs,
                    options,
                    partial(answers_to, backbone, encoder, [inputs], FULL, **options),
                )
            ]
            kept.setdefault(task, []).extend(zip(examples, answers, strict=True))
            return answers

        return write

    def of_kinds(examples: Sequence[Example], longest: int) -> list[Answer]:
        return writer(examples[0].key.rpartition(":")[2])(examples, longest)

    puts = put_to(rows, images, arguments.each)
    made: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain(held[::-1], writer("plain")),
        "questions": lambda: questions_by_kind(puts, of_kinds),
        "dialogues": lambda: dialogues(rows, images, arguments.talks, writer("dialogues")),
        "captions": lambda: captions(
            held[: arguments.photographs], writer("captions"), arguments.before
        ),
        "ranked": lambda: ranked(rows, images, arguments.rounds, encoder),
    }
    for name in arguments.parts:
        RECORD.add({name: made[name]()})
    exits = arguments.adapter or shipped_exits(arguments.name)
    assert exits is not None, "a model that ships with exits"
    adapter = Adapter.load(exits, backbone)
    RECORD.add({"exits": replayed(adapter, encoder, kept)})
    asked_ = {"questions": [put.example for some in puts.values() for put in some]}
    asked_ |= {
        task: [e for e, _ in kept[task]] for task in ("dialogues", "captions") if task in kept
    }
    draw = random.Random(72)
    tasks = {t: draw.sample(some, min(len(some), arguments.timed)) for t, some in asked_.items()}
    RECORD.add({"speeds": sped(adapter, encoder, tasks)})


if __name__ == "__main__":
    main()
