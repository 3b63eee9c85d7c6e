"""Captions, and questions with answers, about a drawn scene; all exactly right."""

import re
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from offramp.data.scenes.world import (
    BACKGROUNDS,
    COLORS,
    COLUMNS,
    COUNTS,
    GRID,
    ROWS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    generator_of,
    looks_of,
    pick,
    place_name,
)

QA = tuple[str, str]  # question, answer
Fact = tuple[str, str]  # place (or "count", "background"), attribute
Maker = Callable[[np.random.Generator, "Scene"], QA | None]

# ---------------------------------------------------------------- captions


def caption(scene: Scene) -> str:
    """Return one sentence with every object of a scene, in reading order, with all its
    attributes."""
    parts = [f"a {looks_of(t)} at {place_name(t.place)}" for t in scene.objects]
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    noun = "object" if len(parts) == 1 else "objects"
    return f"{COUNTS[len(parts)]} {noun} on {scene.background}: {listed}."


def _any(words: Sequence[str]) -> str:
    return f"({'|'.join(words)})"


_OBJECT = re.compile(
    rf"\ba {_any(SIZES)} {_any(COLORS)} {_any(SHAPES)} at "
    rf"{_any([f'{row} {column}' for row in ROWS for column in COLUMNS])}"
)
_OPENING = re.compile(rf"^{_any(COUNTS)} objects? on {_any(BACKGROUNDS)}:")


def scene_facts(scene: Scene) -> set[Fact]:
    """Return all facts that a caption should state, as (place, attribute) pairs."""
    facts = {("count", COUNTS[len(scene.objects)]), ("background", scene.background)}
    for thing in scene.objects:
        facts |= {(place_name(thing.place), a) for a in (thing.size, thing.color, thing.shape)}
    return facts


def caption_attributes(text: str) -> set[Fact]:
    """Return the facts that a caption states, true or not, as (place, attribute) pairs; none for
    noise."""
    text = _normal(text)
    facts: set[Fact] = set()
    opening = _OPENING.match(text)
    if opening:
        facts |= {("count", opening[1]), ("background", opening[2])}
    for size, color, shape, place in _OBJECT.findall(text):
        facts |= {(place, size), (place, color), (place, shape)}
    return facts


def caption_correct(text: str, scene: Scene) -> bool:
    """Return True if a caption states exactly this scene: nothing wrong, missing or unreadable."""
    leftover, objects = _OBJECT.subn("", _OPENING.sub("", _normal(text)))
    readable = re.fullmatch(r"(?:\s|,|\band\b|\.)*", leftover) is not None
    return (
        readable
        and objects == len(scene.objects)
        and caption_attributes(text) == scene_facts(scene)
    )


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


# ---------------------------------------------------------------- questions

RELATIONS: dict[str, Callable[[Thing, Thing], bool]] = {
    "left of": lambda a, b: a.column < b.column,
    "right of": lambda a, b: a.column > b.column,
    "above": lambda a, b: a.row < b.row,
    "below": lambda a, b: a.row > b.row,
}


def question_prompt(question: str) -> str:
    """Return the prompt for one question."""
    return f"Question: {question} Answer:"


def answer_correct(text: str, answer: str) -> bool:
    """Return True if a generated answer equals the reference, up to case, spaces and a final full
    stop."""
    return _normal(text).rstrip(" .") == _normal(answer)


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _a(noun: str) -> str:
    return f"an {noun}" if noun.startswith("o") else f"a {noun}"


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _names(scene: Scene, thing: Thing, hide: str = "") -> list[str]:
    """Noun phrases that fit only this object and do not give away the attribute `hide`."""
    phrases = {
        "{shape}": hide != "shape",
        "{color} object": hide != "color",
        "{color} {shape}": hide not in ("color", "shape"),
        "{size} {color} {shape}": hide not in ("size", "color", "shape"),
    }
    unique = []
    for phrase in (p for p, allowed in phrases.items() if allowed):
        said = [phrase.format(**vars(t)) for t in scene.objects]
        if said.count(phrase.format(**vars(thing))) == 1:
            unique.append(phrase.format(**vars(thing)))
    return unique


def _name(rng: np.random.Generator, scene: Scene, thing: Thing, hide: str = "") -> str | None:
    names = _names(scene, thing, hide)
    return f"the {pick(rng, names)}" if names else None


def _ask_attribute(rng: np.random.Generator, scene: Scene, attribute: str) -> QA | None:
    thing = pick(rng, scene.objects)
    name = _name(rng, scene, thing, hide=attribute)
    if name is None or rng.random() < 0.4:
        name = f"the object at the {place_name(thing.place)}"
    return f"what {attribute} is {name}?", str(getattr(thing, attribute))


def _ask_background(rng: np.random.Generator, scene: Scene) -> QA | None:
    return "what color is the background?", scene.background


def _ask_where(rng: np.random.Generator, scene: Scene) -> QA | None:
    thing = pick(rng, scene.objects)
    name = _name(rng, scene, thing)
    return (f"where is {name}?", place_name(thing.place)) if name else None


def _ask_what(rng: np.random.Generator, scene: Scene) -> QA | None:
    if rng.random() < 0.2:
        free = sorted(set(range(GRID * GRID)) - {t.place for t in scene.objects})
        return f"what is at the {place_name(pick(rng, free))}?", "nothing"
    thing = pick(rng, scene.objects)
    return f"what is at the {place_name(thing.place)}?", f"a {looks_of(thing)}"


def _ask_count(rng: np.random.Generator, scene: Scene) -> QA | None:
    attribute = pick(rng, ("any", "shape", "shape", "color", "color", "size"))
    if attribute == "any":
        return "how many objects are there?", COUNTS[len(scene.objects)]
    options = {"shape": SHAPES, "color": COLORS, "size": SIZES}[attribute]
    shown = [str(getattr(t, attribute)) for t in scene.objects]
    value = pick(rng, shown if rng.random() < 0.75 else options)
    noun = _plural(value) if attribute == "shape" else f"{value} objects"
    return f"how many {noun} are there?", COUNTS[shown.count(value)]


def _ask_exists(rng: np.random.Generator, scene: Scene) -> QA | None:
    pairs = {(t.color, t.shape) for t in scene.objects}
    if rng.random() < 0.5:
        color, shape = pick(rng, sorted(pairs))
    else:  # hard negatives: at least one of the two attributes is in the picture
        thing = pick(rng, scene.objects)
        color, shape = thing.color, thing.shape
        if rng.random() < 0.5:
            shape = pick(rng, SHAPES)
        else:
            color = pick(rng, COLORS)
    return f"is there {_a(f'{color} {shape}')}?", _yes((color, shape) in pairs)


def _two_names(
    rng: np.random.Generator, scene: Scene, hide: str = ""
) -> tuple[Thing, str, Thing, str] | None:
    if len(scene.objects) < 2:
        return None
    i, j = (int(k) for k in rng.choice(len(scene.objects), size=2, replace=False))
    a, b = scene.objects[i], scene.objects[j]
    name_a, name_b = _name(rng, scene, a, hide), _name(rng, scene, b, hide)
    return (a, name_a, b, name_b) if name_a and name_b else None


def _relation(rng: np.random.Generator, a: Thing, b: Thing) -> tuple[str, bool]:
    """A relation that holds half of the time."""
    truth = bool(rng.random() < 0.5)
    return pick(rng, [word for word, holds in RELATIONS.items() if holds(a, b) == truth]), truth


def _ask_relation(rng: np.random.Generator, scene: Scene) -> QA | None:
    pair = _two_names(rng, scene)
    if pair is None:
        return None
    a, name_a, b, name_b = pair
    word, truth = _relation(rng, a, b)
    return f"is {name_a} {word} {name_b}?", _yes(truth)


def _ask_larger(rng: np.random.Generator, scene: Scene) -> QA | None:
    pair = _two_names(rng, scene, hide="size")
    if pair is None or pair[0].size == pair[2].size:
        return None
    a, name_a, _, name_b = pair
    word = pick(rng, ("larger", "smaller"))
    first = (a.size == "large") == (word == "larger")
    return f"which is {word}, {name_a} or {name_b}?", name_a if first else name_b


def _ask_same(rng: np.random.Generator, scene: Scene) -> QA | None:
    pair = _two_names(rng, scene, hide="size")
    if pair is None:
        return None
    a, name_a, b, name_b = pair
    return f"are {name_a} and {name_b} the same size?", _yes(a.size == b.size)


def _ask_more(rng: np.random.Generator, scene: Scene) -> QA | None:
    shown = [t.shape for t in scene.objects]
    first, second = pick(rng, shown), pick(rng, SHAPES)
    if first == second:
        return None
    if rng.random() < 0.5:
        first, second = second, first
    truth = shown.count(first) > shown.count(second)
    return f"are there more {_plural(first)} than {_plural(second)}?", _yes(truth)


QUESTIONS: dict[str, Maker] = {
    "color": partial(_ask_attribute, attribute="color"),
    "shape": partial(_ask_attribute, attribute="shape"),
    "size": partial(_ask_attribute, attribute="size"),
    "background": _ask_background,
    "where": _ask_where,
    "what": _ask_what,
    "count": _ask_count,
    "exists": _ask_exists,
    "relation": _ask_relation,
    "larger": _ask_larger,
    "same": _ask_same,
    "more": _ask_more,
}

RARE = dict.fromkeys(("relation", "larger", "same", "more"), 0.25)  # against 1 for other kinds


def questions(scene: Scene, n: int) -> list[QA]:
    """Return up to `n` different (question, answer) pairs, of kinds as varied as the scene allows.

    Questions about two named things come late (`RARE`), because they are the hardest for a small
    model.
    """
    rng = generator_of(scene.seed, "questions")
    weights = np.array([RARE.get(kind, 1.0) for kind in QUESTIONS])
    pairs: dict[str, str] = {}
    for _ in range(4):  # rounds: a kind may fail on a scene that has nothing to compare
        order = rng.choice(len(QUESTIONS), len(QUESTIONS), replace=False, p=weights / weights.sum())
        for i in order:
            made = list(QUESTIONS.values())[i](rng, scene)
            if made and len(pairs) < n:
                pairs.setdefault(*made)
    return list(pairs.items())
