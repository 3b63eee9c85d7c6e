"""Laws of the procedural world, and of the two models that ship with the package."""

import re
from itertools import islice

import numpy as np
import pytest
import torch
import transformers

from offramp.adapter.shipped import tiny_folder
from offramp.data.scenes import language, world

SCENES = list(world.scenes("train", 150))
KINDS = {
    "background": r"background",
    "color": r"^what color",
    "shape": r"^what shape",
    "size": r"^what size",
    "where": r"^where",
    "what": r"^what is at",
    "count": r"^how many",
    "exists": r"^is there",
    "relation": r"^is the",
    "larger": r"^which is",
    "same": r"^are the ",
    "more": r"^are there more",
}


def question_kind(question: str) -> str:
    """The kind of a question: a key of `QUESTIONS`."""
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, question))


def colour_at(scene: world.Scene, place: int) -> np.ndarray:
    """Mean colour of the middle 3x3 pixels of a cell."""
    x, y = (world.CELL * i + world.CELL // 2 for i in (place % world.GRID, place // world.GRID))
    return np.asarray(world.render(scene), dtype=float)[y - 1 : y + 2, x - 1 : x + 2].mean((0, 1))


def nearest(colour: np.ndarray, anchors: dict[str, tuple[int, int, int]]) -> str:
    return min(anchors, key=lambda name: float(np.abs(colour - np.array(anchors[name])).sum()))


def test_a_scene_depends_on_split_and_index_only() -> None:
    again = world.scene("test", 7)
    assert again == world.scene("test", 7) != world.scene("test", 8)
    assert world.render(again).tobytes() == world.render(world.scene("test", 7)).tobytes()
    assert language.questions(again, 6) == language.questions(again, 6)


def test_splits_never_share_a_seed() -> None:
    ends = [
        (world.scene(s, 0).seed, world.scene(s, world.SPLIT_SPAN - 1).seed) for s in world.SPLITS
    ]
    assert all(
        last < first for (_, last), (first, _) in zip(sorted(ends), sorted(ends)[1:], strict=False)
    )
    with pytest.raises(ValueError, match="outside"):
        world.scene("train", world.SPLIT_SPAN)
    with pytest.raises(ValueError, match="validation"):
        world.scene("dev", 0)


def test_objects_come_in_reading_order_in_cells_of_their_own() -> None:
    for scene in SCENES:
        places = [t.place for t in scene.objects]
        assert places == sorted(set(places)) and 1 <= len(places) <= 4


def test_pixels_show_the_colours_that_the_scene_states() -> None:
    for scene in SCENES[:60]:
        for thing in scene.objects:
            assert nearest(colour_at(scene, thing.place), world.PALETTE) == thing.color
        empty = next(p for p in range(9) if p not in {t.place for t in scene.objects})
        assert nearest(colour_at(scene, empty), world.BACKDROPS) == scene.background


def test_large_objects_cover_more_pixels_than_small_ones() -> None:
    areas: dict[tuple[str, str], list[float]] = {}
    for shape in world.SHAPES:
        for size in world.SIZES:
            for seed in range(5):
                scene = world.Scene((world.Thing(shape, "red", size, 4),), "black", seed)
                covered = (np.asarray(world.render(scene))[..., 0] > 120).sum()
                areas.setdefault((shape, size), []).append(float(covered))
    for shape in world.SHAPES:
        assert min(areas[shape, "large"]) > 1.8 * max(areas[shape, "small"])


def test_captions_parse_back_to_the_scene() -> None:
    for scene in SCENES:
        text = language.caption(scene)
        assert language.caption_attributes(text) == language.scene_facts(scene)
        assert language.caption_correct(text, scene)
        assert language.caption_correct(f"  {text.upper()} ", scene)


def test_a_caption_with_one_wrong_word_is_wrong() -> None:
    for scene in SCENES[:60]:
        words = language.caption(scene).split()
        for i, word in enumerate(words):
            bare = word.strip(",.:")
            for family in (
                world.COLORS,
                world.SHAPES,
                world.SIZES,
                world.BACKGROUNDS,
                world.COUNTS,
            ):
                if bare in family:
                    other = word.replace(bare, next(w for w in family if w != bare))
                    assert not language.caption_correct(
                        " ".join([*words[:i], other, *words[i + 1 :]]), scene
                    )


def test_missing_invented_repeated_and_unreadable_captions_are_wrong() -> None:
    scene = next(s for s in SCENES if len(s.objects) == 2)
    text = language.caption(scene)
    first, second = text.split(": ")[1].rstrip(".").split(" and ")
    assert not language.caption_correct(text.replace(f" and {second}", ""), scene)
    assert not language.caption_correct(text.replace(".", f" and {first}."), scene)
    assert not language.caption_correct(text.replace(" and ", " banana "), scene)
    assert not language.caption_correct("", scene)


def count_of(question: str, scene: world.Scene) -> int:
    """Answers "how many" by reading the question, independently of how it was made."""
    asked = question.split()[2]
    singular = {f"{s}{'es' if s.endswith('s') else 's'}": s for s in world.SHAPES}.get(asked, asked)
    return sum(asked == "objects" or singular in (t.shape, t.color, t.size) for t in scene.objects)


def named(phrase: str, scene: world.Scene) -> world.Thing:
    """The one object that a noun phrase fits."""
    words = set(phrase.split()) - {"the", "object"}
    (thing,) = [t for t in scene.objects if words <= {t.shape, t.color, t.size}]
    return thing


def test_counts_relations_and_comparisons_follow_from_the_scene() -> None:
    checked = dict.fromkeys(("count", "relation", "larger", "exists"), 0)
    for scene in SCENES:
        for question, answer in language.questions(scene, 12):
            kind = question_kind(question)
            if kind == "count":
                assert world.COUNTS.index(answer) == count_of(question, scene)
            elif kind == "exists":
                _, color, shape = question.removeprefix("is there ").rstrip("?").split()
                shown = any((t.color, t.shape) == (color, shape) for t in scene.objects)
                assert answer == ("yes" if shown else "no")
            elif kind == "relation":
                match = re.fullmatch(
                    r"is (the .+) (left of|right of|above|below) (the .+)\?", question
                )
                assert match
                a, b = named(match[1], scene), named(match[3], scene)
                dx, dy = b.column - a.column, b.row - a.row
                truth = {"left of": dx > 0, "right of": dx < 0, "above": dy > 0, "below": dy < 0}[
                    match[2]
                ]
                assert answer == ("yes" if truth else "no")
            elif kind == "larger":
                assert named(answer, scene).size == ("large" if "larger" in question else "small")
            else:
                continue
            checked[kind] += 1
    assert min(checked.values()) > 15


def test_every_kind_is_asked_and_yes_is_no_safe_guess() -> None:
    asked = [qa for scene in SCENES for qa in language.questions(scene, 12)]
    assert {question_kind(q) for q, _ in asked} == set(language.QUESTIONS)
    for kind in ("exists", "relation", "same", "more"):
        answers = [a for q, a in asked if question_kind(q) == kind]
        assert 0.35 < answers.count("yes") / len(answers) < 0.65


def test_answers_are_judged_up_to_case_and_spaces() -> None:
    assert language.answer_correct(" Top  left. ", "top left")
    assert not language.answer_correct("top", "top left")


@pytest.mark.parametrize("backbone", ["opt", "t5"])
def test_shipped_models_load_plainly_caption_and_answer(backbone: str) -> None:
    folder = tiny_folder(backbone)
    model = transformers.Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    text = model.config.text_config
    assert (text.num_decoder_layers if backbone == "t5" else text.num_hidden_layers) == 12

    def say(pictures: list[world.Scene], prompts: list[str]) -> list[str]:
        images = [world.render(s) for s in pictures]
        inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=48)
        new = out if backbone == "t5" else out[:, inputs["input_ids"].shape[1] :]
        return list(processor.batch_decode(new, skip_special_tokens=True))

    scenes = list(world.scenes("validation", 20))
    captions = say(scenes, [world.CAPTION_PROMPT] * len(scenes))
    assert sum(language.caption_correct(c, s) for c, s in zip(captions, scenes, strict=True)) >= 12
    asked = [(s, *qa) for s in scenes for qa in islice(language.questions(s, 2), 2)]
    answers = say([s for s, _, _ in asked], [language.question_prompt(q) for _, q, _ in asked])
    assert (
        sum(language.answer_correct(t, a) for t, (_, _, a) in zip(answers, asked, strict=True))
        >= 32
    )


@pytest.mark.parametrize("backbone", ["opt", "t5"])
def test_shipped_tokenizers_are_lossless(backbone: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder(backbone))
    texts = [language.caption(s) for s in SCENES[:20]]
    texts += [language.question_prompt("where is the circle?"), "Zebras? Déjà vu: 12 of them!"]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
