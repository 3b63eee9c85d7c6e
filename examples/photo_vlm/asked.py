"""Questions and answers about photographs, made of what people wrote in captions, by rules.

What two captions agree on is asked, and colors, clothes and what is held where one says it and none
says otherwise. Each kind is balanced, so that a constant answer gains little: as many photographs
with a word as without it or anything that it may be called, and common answers are left out at
random. Of what no caption has, the answer is that it cannot be seen.
"""

from __future__ import annotations

import random
import sys
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from examples.photo_vlm.command import command, parser_of
from examples.photo_vlm.rows import half_of, read_photographs
from examples.photo_vlm.said import (
    ANIMALS,
    CLOTHES,
    MANY,
    PEOPLE,
    PLACES,
    SEVERAL,
    SUBJECTS,
    Said,
    Signature,
    most,
    parsed,
    words_of,
)
from offramp.core.storage import write_atomic
from offramp.inputs.example import Example

FILE = "asked.jsonl"


@dataclass(frozen=True)
class Question:
    """text: in the first of its wordings. later: the same where somebody was named before. answer:
    what is learnt. right: words of which a right answer has one; a single kind of them, such as
    yes or no, in full."""

    kind: str
    text: str
    answer: str
    right: tuple[str, ...]
    later: str = ""


@dataclass(frozen=True)
class Asked:
    """image: the photograph's name. half: as of `half_of`; training photographs have none."""

    image: str
    half: int | None
    questions: tuple[Question, ...]


EXACT = ("yes or no", "count", "in or out", "animal", "colour")
"""Kinds whose answer is right only as a whole."""
UNSEEN = ("absent", "cannot tell")
_CANNOT_TELL = (
    "What is {his} name?",
    "What is the {name}'s name?",
    "How old is the {name}?",
    "Where does the {name} live?",
    "What is the {name} thinking?",
    "What day is it?",
    "What time is it?",
    "Who took this picture?",
    "What is behind the camera?",
    "What did the {name} do yesterday?",
    "Where is the {name} from?",
    "How much did it cost?",
)
CANNOT = "I cannot see that."
_WORDINGS: Mapping[str, tuple[str, ...]] = {
    "Who is in the picture?": (
        "Who is in the picture?",
        "Who is in the photo?",
        "Who can you see?",
        "Who is there?",
        "Who is this?",
    ),
    "Where is this?": ("Where is this?", "Where was this taken?", "What place is this?"),
    "Is it indoors or outdoors?": (
        "Is it indoors or outdoors?",
        "Is this inside or outside?",
        "Indoors or outdoors?",
        "Was the picture taken indoors or outdoors?",
    ),
    "What animal is this?": (
        "What animal is this?",
        "Which animal is in the picture?",
        "What kind of animal is it?",
        "What animal do you see?",
    ),
}


def worded(text: str, draw: random.Random) -> str:
    """A question as one or another would type it."""
    text = draw.choice(_WORDINGS.get(text, (text,)))
    for one, other, share in (
        ("colour", "color", 0.5),
        ("How many", "what number of", 0.03),
        ("What is", "What's", 0.15),
        ("Is there", "Can you see", 0.15),
        ("Is there", "Do you see", 0.15),
        ("is in the picture", "is in the image", 0.2),
        ("are there", "are in the picture", 0.3),
    ):
        if draw.random() < share:
            text = text.replace(one, other)
    if draw.random() < 0.3:
        text = text[:1].lower() + text[1:]
    if draw.random() < 0.2:
        text = text.rstrip("?")
    return text


# -- one photograph -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Photograph:
    example: Example
    said: tuple[Said, ...]

    @property
    def subject(self) -> Signature | None:
        """Who two captions agree that it is about."""
        found: Signature | None = most((s.subject for s in self.said if s.subject), 2)
        return found

    def has(self, word: str) -> bool:
        """Whether any caption says the word, or what it may be called."""
        return any(said.words & _may_be_called(word) for said in self.said)


_CLOSE = (
    ("ball", "football", "basketball", "soccer", "tennis", "baseball", "game", "player", "team"),
    ("bike", "bicycle", "motorcycle", "cyclist", "biker", "rider", "bmx", "motorbike", "dirtbike"),
    ("car", "truck", "vehicle", "traffic", "suv", "van", "racecar", "street", "taxi", "race"),
    ("hat", "cap", "helmet", "beanie", "hood", "wig", "headgear"),
    ("tree", "wood", "woods", "forest", "branch", "bush", "park", "leaf", "log", "trunk", "stump"),
    ("toy", "ball", "frisbee", "doll", "stick"),
    ("glasses", "sunglasses", "goggles"),
    ("skateboard", "skateboarder", "board", "skate", "skater", "skateboarding"),
    ("snowboard", "snowboarder", "board", "snowboarding", "ski", "skier"),
    ("building", "house", "city", "street", "store", "church", "tower", "town", "window"),
    (
        "water",
        "pool",
        "swim",
        "fountain",
        "splash",
        "surf",
        "wade",
        "puddle",
        "sprinkler",
        "bath",
        "stream",
        "waterfall",
        "creek",
        "wave",
        "boat",
        "beach",
        "shore",
        "wet",
    ),
    ("beach", "ocean", "sea", "wave", "surf", "coast"),
    ("grass", "grassy", "park", "yard", "garden", "soccer", "baseball", "football", "golf"),
    (
        "snow",
        "snowy",
        "ski",
        "skier",
        "snowboard",
        "snowboarder",
        "ice",
        "icy",
        "sled",
        "winter",
        "skiing",
        "snowboarding",
    ),
    ("street", "city", "traffic", "car", "parade", "crosswalk", "town", "corner"),
    ("rock", "rocky", "cliff", "climber", "boulder", "stone", "mountain", "climb"),
    ("mountain", "mountainous", "rocky", "peak", "cliff", "hillside"),
    ("road", "street", "path", "highway", "trail", "track", "pavement", "race"),
    ("horse", "jockey", "rodeo", "cowboy", "polo", "animal", "bronco"),
    ("boat", "ship", "sail", "row", "paddle", "kayaker", "canoe", "kayak", "raft", "sailboat"),
    ("shirt", "t-shirt", "jersey", "sweatshirt", "top", "polo", "tee"),
    ("cat", "animal", "kitten"),
    ("bird", "animal", "pet"),
    ("dog", "animal", "pet", "canine", "breed"),
)
_PERSON_WORDS = frozenset(w for w, group in SUBJECTS.items() if group in PEOPLE) | {
    "people",
    "crowd",
    "team",
    "group",
    "couple",
    "family",
    "friend",
    "human",
    "he",
    "she",
    "they",
    "his",
    "her",
    "their",
    "who",
    "everyone",
    "another",
    "other",
    "one",
    "driver",
    "crew",
}
_UNSEXED = frozenset(w for w, group in SUBJECTS.items() if group in ("person", "child", "baby")) | (
    _PERSON_WORDS - set(SUBJECTS)
)
_cache: dict[str, frozenset[str]] = {}


def _may_be_called(word: str) -> frozenset[str]:
    """Words one of which says that the thing may be there."""
    if word not in _cache:
        group = SUBJECTS.get(word)
        words = {word}
        if group:
            words |= {w for w, g in SUBJECTS.items() if g == group}
        if group in ("man", "woman", "boy", "girl"):
            words |= _UNSEXED | {w for w, g in SUBJECTS.items() if g in _AGED[group]}
        elif group in PEOPLE:
            words |= _PERSON_WORDS
        place = PLACES.get(word)
        if place:
            words |= {w for w, p in PLACES.items() if p == place}
        for close in _CLOSE:
            if word == close[0]:
                words |= set(close)
        _cache[word] = frozenset(words)
    return _cache[word]


_AGED = {"man": ("boy",), "boy": ("man",), "woman": ("girl",), "girl": ("woman",)}
_HE = {"man": "he", "boy": "he", "woman": "she", "girl": "she", "dog": "it"}
_HIS = {"he": "his", "she": "her", "it": "its", "they": "their"}
_PLURALS = {
    "man": "men",
    "woman": "women",
    "child": "children",
    "person": "people",
    "baby": "babies",
    "sheep": "sheep",
}
_NUMBER_WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


def _plural(noun: str) -> str:
    return _PLURALS.get(noun, f"{noun}s")


def _name_of(subject: Signature) -> tuple[str, bool]:
    """ "man" or "dogs", and whether it is more than one; of several kinds "people"."""
    (name, count), *others = subject
    if others:
        return "people", True
    return (name, False) if count == 1 else (_plural(name), True)


def _they(subject: Signature) -> str:
    name, is_plural = _name_of(subject)
    return "they" if is_plural else _HE.get(name, "they")


def _who(subject: Signature) -> str:
    parts = []
    for name, count in subject:
        plural = _plural(name)
        number = _NUMBER_WORDS.get(count)
        parts.append(f"a {name}" if count == 1 else f"{number} {plural}" if number else plural)
    return " and ".join(parts)


def _an(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _seen(photo: _Photograph, colored: Container[str]) -> list[Question]:
    """What the captions of a photograph say, as questions. colored: nouns whose color is asked."""
    said, subject = photo.said, photo.subject
    found: list[Question] = []
    if subject is not None:
        found += _about(subject, [s for s in said if s.subject == subject], said)
    place = most((p for s in said for p in s.places), 2)
    if place is not None:
        words = most((s.places[place] for s in said if place in s.places), 1)
        words = words or next(s.places[place] for s in said if place in s.places)
        right = tuple(sorted({w for s in said for p in s.places for w in _names(p)}))
        name, is_plural = _name_of(subject) if subject else ("", False)
        be = "are" if is_plural else "is"
        who = f"Where {be} the {name}?" if name else "Where is this?"
        they = _they(subject) if subject else "this"
        later = f"Where {'are' if they == 'they' else 'is'} {they}?"
        found.append(Question("where", who, words, right, later))
        found.append(Question("where", "Where is this?", words, right))
    colors: dict[str, list[frozenset[str]]] = defaultdict(list)
    for one in said:
        for noun, those in one.colors.items():
            colors[noun].append(those)
    for noun, said_colors in colors.items():
        if noun in colored:
            found += _colored(noun, said_colors, subject)
    inside = [s.is_indoors for s in said if s.is_indoors is not None]
    if len(inside) > 1 and len(set(inside)) == 1:
        where = "indoors" if inside[0] else "outdoors"
        right = (where, "inside" if inside[0] else "outside")
        found.append(Question("in or out", "Is it indoors or outdoors?", where, right))
    animals = Counter(SUBJECTS[w] for s in said for w in s.words if SUBJECTS.get(w) in ANIMALS)
    if len(animals) == 1 and (name := next(iter(animals))) and animals[name] > 1:
        right = (name, f"{name}s")
        found.append(Question("animal", "What animal is this?", _an(name), right))
    return found


def _names(place: str) -> set[str]:
    return {word for word, name in PLACES.items() if name == place}


def _about(subject: Signature, agreed: Sequence[Said], said: Sequence[Said]) -> list[Question]:
    """Who, how many, doing, worn and held, of captions that agree on who is there."""
    name, is_plural = _name_of(subject)
    they, be = _they(subject), "are" if is_plural else "is"
    later = f"{'are' if they == 'they' else 'is'} {they}"
    named = tuple(sorted({w for n, _ in subject for w in (n, _plural(n))}))
    found = [Question("who", "Who is in the picture?", _who(subject), named)]
    if len(subject) == 1 and (count := subject[0][1]) != MANY:
        others = [s.subject for s in said if s.subject and s.subject != subject]
        things = _plural(subject[0][0])
        number = _NUMBER_WORDS[count]
        if len(agreed) > 2 or not any(len(o) > 1 or o[0][1] != count for o in others):
            how = f"How many {things} are there?"
            found.append(Question("count", how, number, (number, str(count))))
    deed = most((d for s in agreed for d in s.deeds), 2)
    if deed is not None:
        words = sorted((s.deeds[deed] for s in agreed if deed in s.deeds), key=_detail)[0]
        right = tuple(
            sorted(
                {s.deeds[d].split()[0] for s in said for d in s.deeds}
                | {d for s in said for d in s.deeds}
            )
        )
        what = f"What {be} the {name} doing?"
        found.append(Question("doing", what, words, right, f"What {later} doing?"))
        found.append(Question("who", f"Who is {words}?", _who(subject), named))
    if not is_plural:
        for kind, verb in (("worn", "wearing"), ("held", "holding")):
            if kind == "worn" and name in ANIMALS:
                continue
            things_of = [getattr(s, kind) for s in agreed]
            nouns = most((n for things in things_of for n in things), 1)
            if nouns is not None:
                words = max((t[nouns] for t in things_of if nouns in t), key=len)
                right = tuple(sorted({n for s in said for n in getattr(s, kind)}))
                what = f"What is the {name} {verb}?"
                found.append(Question(kind, what, words, right, f"What {later} {verb}?"))
    return found


def _detail(words: str) -> tuple[bool, int]:
    """Three to five words say most, and the shortest of them are surest."""
    count = len(words.split())
    return not 2 <= count <= 5, count


def _colored(
    noun: str, those: Sequence[frozenset[str]], subject: Signature | None
) -> list[Question]:
    whole = max(those, key=len)
    if SEVERAL in those or len(whole) > 2 or any(not some <= whole for some in those):
        return []
    answer = " and ".join(sorted(whole))
    right = tuple(sorted({" and ".join(sorted(some)) for some in those} | {answer}))
    right += tuple(" and ".join(reversed(r.split(" and "))) for r in right if " and " in r)
    owner = _name_of(subject) if subject else ("", True)
    be = "are" if noun.endswith("s") and noun not in ("dress", "grass", "bus") else "is"
    text = f"What colour {be} the {noun}?"
    later = ""
    if noun in ANIMALS and (subject is None or (noun, 1) not in subject):
        return []
    if noun.rstrip("s") in SUBJECTS and noun not in ANIMALS:
        return []
    if subject == ((noun, 1),):
        later = "What colour is it?"
    if noun in CLOTHES and not owner[1] and owner[0] in PEOPLE:
        later = f"What colour {be} {_HIS[_HE.get(owner[0], 'they')]} {noun}?"
        if be == "is":
            text = f"What colour is the {owner[0]}'s {noun}?"
    right = tuple(dict.fromkeys(r.replace("gray", g) for r in right for g in ("gray", "grey")))
    return [Question("colour", text, answer, right, later)]


# -- all photographs ----------------------------------------------------------------------------

_MASS = words_of(
    """
    snow grass water sand dirt mud ice
    """
)
_NOT_SEEN = words_of(
    """
    group front air side top background picture camera back middle face head hand mouth
    other another couple one way person something day area edge hair arm leg foot eye body
    part end another ground distance other team onlooker pair shirt game race trick look
    jump shape color colour black white red blue brown green yellow orange pink gray purple
    tan line number sky light view time kind sort set crowd midair smile action field piece
    play look
    """
)


def made(examples: Sequence[Example], seed: str) -> list[tuple[Question, ...]]:
    """The questions about each photograph, balanced among these."""
    captions = [caption for example in examples for caption in example.answers]
    said = parsed(captions)
    photos, start = [], 0
    for example in examples:
        photos.append(_Photograph(example, tuple(said[start : start + len(example.answers)])))
        start += len(example.answers)
    draw = random.Random(seed)
    nouns = Counter(noun for photo in photos for noun in {n for s in photo.said for n in s.colors})
    # Rarer nouns are mostly misspelt, or no nouns.
    fewest = _fewest(photos)
    colored = {noun for noun, count in nouns.items() if count >= fewest}
    all_: list[list[Question]] = [_seen(photo, colored) for photo in photos]
    thinned(all_, draw)
    for more in (_there, _is_it, _absent, _cannot_tell):
        for questions, some in zip(all_, more(photos, all_, draw), strict=True):
            questions.extend(some)
    return [tuple(questions) for questions in all_]


def thinned(all_: list[list[Question]], draw: random.Random) -> None:
    """Leave out common answers of a kind, so that none is more than its share of it."""
    shares = {"count": 0.4, "in or out": 0.5, "animal": 0.5, "who": 0.2, "where": 0.17}
    for kind, share in shares.items():
        counts = Counter(q.answer for questions in all_ for q in questions if q.kind == kind)
        keep = {answer: min(1.0, _limit(counts, share) / n) for answer, n in counts.items()}
        for questions in all_:
            questions[:] = [
                q for q in questions if q.kind != kind or draw.random() < keep[q.answer]
            ]


def _limit(counts: Mapping[str, int], share: float) -> float:
    """At how many a common answer is cut off, so that it is at most `share` of what is left."""
    limit = float(max(counts.values(), default=0))
    for _ in range(50):
        total = sum(min(n, limit) for n in counts.values())
        limit = min(limit, max(1.0, share * total))
    return limit


Photos = Sequence[_Photograph]


def _fewest(photos: Photos) -> int:
    """In how many photographs a word has to be for it to be asked about."""
    return max(3, len(photos) // 300)


def _there(photos: Photos, all_: list[list[Question]], draw: random.Random) -> list[list[Question]]:
    """ "Is there a ball?": of each word as often yes, where two captions have it, as no."""
    found: list[list[Question]] = [[] for _ in photos]
    with_: dict[str, list[int]] = defaultdict(list)
    for n, photo in enumerate(photos):
        counts = Counter(w for s in photo.said for w in _nouns(s))
        for word in sorted(counts):
            if counts[word] > 1:
                with_[word].append(n)
    fewest = _fewest(photos)
    for word, places in sorted(with_.items()):
        if len(places) < fewest or word in _NOT_SEEN:
            continue
        yes = draw.sample(places, min(len(places), max(3, len(photos) // 20)))
        without = [n for n, photo in enumerate(photos) if not photo.has(word)]
        no = draw.sample(without, min(len(without), len(yes)))
        text = f"Is there {word if word in _MASS else _an(word)}?"
        if word.endswith("s") and word not in ("dress", "bus", "grass"):
            text = f"Are there {word}?"
        for answer, chosen in (("yes", yes[: len(no)]), ("no", no)):
            for n in chosen:
                found[n].append(Question("yes or no", text, answer, (answer,)))
    return found


def _nouns(said: Said) -> set[str]:
    return {w for w in said.words if w in _ASKED_WORDS} | {
        SUBJECTS[w] for w in said.words if w in SUBJECTS
    }


_ASKED_WORDS = words_of(
    """
    ball bike car tree hat helmet snow grass water beach street rock mountain road boat
    building frisbee stick toy skateboard snowboard surfboard bench fence camera swing slide
    pool rope flag guitar bag table chair couch bed kitchen kite umbrella bottle cup phone
    microphone racket bat basketball football motorcycle horse truck bus train ladder bridge
    flower balloon cake food book sign wall window door leash collar backpack glasses
    sunglasses ramp trampoline sled ice wave tent drum scooter wagon stroller net hoop goal
    pumpkin statue fountain log leaf mud sand dress tie scarf mask tattoo cigarette candle
    fire bubble piano bucket blanket pillow
    """
)


def _is_it(photos: Photos, all_: list[list[Question]], draw: random.Random) -> list[list[Question]]:
    """ "Is the dog black?", "Is the man running?": with what is so, and with another's as often."""
    found: list[list[Question]] = [[] for _ in photos]
    for kind, text_of in (("colour", _is_colored), ("doing", _is_doing)):
        there = [(n, q) for n, questions in enumerate(all_) for q in questions if q.kind == kind]
        others = draw.sample([q for _, q in there], len(there))
        for n, question in there:
            if draw.random() < 0.5:
                continue
            text = text_of(question, question)
            if text:
                found[n].append(Question("yes or no", text, "yes", ("yes",)))
        for (n, question), other in zip(there, others, strict=True):
            words = set(" ".join(question.right).split()) | set(question.answer.split())
            first = other.answer.split()[0]
            if draw.random() < 0.5 or first in words or set(other.right) & set(question.right):
                continue
            text = text_of(question, other)
            if text:
                found[n].append(Question("yes or no", text, "no", ("no",)))
    return found


def _is_colored(asked: Question, answered: Question) -> str:
    thing = asked.text.removeprefix("What colour ").rstrip("?")
    be, _, noun = thing.partition(" ")
    return f"{be.capitalize()} {noun} {answered.answer}?"


def _is_doing(asked: Question, answered: Question) -> str:
    words = asked.text.removeprefix("What ").removesuffix(" doing?")
    be, _, noun = words.partition(" ")
    return f"{be.capitalize()} {noun} {answered.answer}?"


_ABSENT = (
    "dog",
    "cat",
    "horse",
    "bird",
    "man",
    "woman",
    "boy",
    "girl",
    "baby",
    "car",
    "bike",
    "ball",
    "hat",
    "boat",
    "frisbee",
    "skateboard",
    "truck",
    "bus",
    "umbrella",
    "guitar",
    "kite",
)
_ABSENT_ASKED: Mapping[str, tuple[str, ...]] = {
    "thing": ("What colour is the {}?", "Where is the {}?"),
    "animal": ("What colour is the {}?", "Where is the {}?", "What is the {} doing?"),
    "person": (
        "What is the {} wearing?",
        "What is the {} doing?",
        "Where is the {}?",
        "What colour is the {}'s shirt?",
        "What is the {} holding?",
    ),
}


def _absent(
    photos: Photos, all_: list[list[Question]], draw: random.Random
) -> list[list[Question]]:
    found: list[list[Question]] = []
    for photo in photos:
        some: list[Question] = []
        if draw.random() < 0.5:
            word = draw.choice(_ABSENT)
            if not photo.has(word):
                group = SUBJECTS.get(word)
                of = "thing" if group is None else "animal" if group in ANIMALS else "person"
                text = draw.choice(_ABSENT_ASKED[of]).format(word)
                answer = f"I cannot see {_an(word)}."
                some.append(Question("absent", text, answer, ("cannot",)))
        found.append(some)
    return found


def _cannot_tell(
    photos: Photos, all_: list[list[Question]], draw: random.Random
) -> list[list[Question]]:
    found: list[list[Question]] = []
    for photo in photos:
        some: list[Question] = []
        if draw.random() < 0.3 and photo.subject is not None and len(photo.subject) == 1:
            ((name, count),) = photo.subject
            text = draw.choice(_CANNOT_TELL)
            his = _HIS[_HE.get(name, "they")]
            if count == 1 and (his != "their" or "{his}" not in text):
                text = text.format(name=name, his=his)
                some.append(Question("cannot tell", text, CANNOT, ("cannot",)))
        found.append(some)
    return found


# -- dialogues ----------------------------------------------------------------------------------


def dialogue(
    questions: Sequence[Question], captions: Sequence[str], draw: random.Random
) -> list[tuple[str, Question]]:
    """Three to five turns about one photograph: who is there comes first, and is then he, she or
    it. Empty where there is too little to ask."""
    kinds: dict[str, list[Question]] = defaultdict(list)
    for question in draw.sample(list(questions), len(questions)):
        kinds[question.kind].append(question)
    rounds: list[tuple[str, Question]] = []
    if draw.random() < 0.35 and captions:
        text = draw.choice(DESCRIBE)
        rounds.append((text, Question("caption", text, draw.choice(list(captions)), ())))
    elif kinds["who"]:
        who = next((q for q in kinds["who"] if q.text.startswith("Who is in")), kinds["who"][0])
        rounds.append((worded(who.text, draw), who))
    later = [some[0] for kind, some in kinds.items() if kind != "who" and some]
    later += [q for some in kinds.values() for q in some[1:2] if q.kind == "yes or no"]
    draw.shuffle(later)
    for question in later[: draw.randint(3, 5) - len(rounds)]:
        text = question.later if rounds and question.later else question.text
        rounds.append((worded(text, draw), question))
    return rounds if len(rounds) > 2 else []


DESCRIBE = (
    "Describe the photograph.",
    "Describe this picture.",
    "What is in the picture?",
    "What do you see?",
    "What can you see?",
    "What is happening?",
    "What is going on here?",
    "Describe the image.",
    "Caption this photo.",
    "What is this?",
    "What is happening in this picture?",
    "what does the photo show",
    "Tell me about this picture.",
)


def is_right(question: Question, answer: str) -> bool:
    """Whether an answer is right: as a whole, or in one of the words that count. Who is there is
    right where nobody else is named."""
    words = "".join(c if c.isalnum() or c in "-'" else " " for c in answer.lower()).split()
    if question.kind in EXACT:
        said = " ".join(w for w in words if w not in ("a", "an", "the"))
        return said in question.right
    if question.kind not in UNSEEN and "cannot" in words:
        return False
    if question.kind == "who" and any(w in _NAMED and w not in question.right for w in words):
        return False
    return any(word in question.right for word in words)


_NAMED = set(SUBJECTS) | set(_PLURALS.values()) | {f"{word}s" for word in SUBJECTS}


def read_asked(file: Path) -> list[Asked]:
    """What `main` wrote.

    Raises:
        DataError: the file is not there, or not whole.
    """
    import json

    from offramp.core.errors import DataError

    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        return [
            Asked(
                row["image"],
                row["half"],
                tuple(Question(**{**q, "right": tuple(q["right"])}) for q in row["questions"]),
            )
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} does not hold questions.", "Make them: python -m examples.photo_vlm.asked"
        ) from error


@command
def main() -> None:
    import json

    parser = parser_of("asked", "--work runs/photo_vlm", str(__doc__), "data", "work")
    arguments = parser.parse_args()
    splits = read_photographs(arguments.data)
    rows: list[Asked] = []
    for name in ("captions", "captions_val"):
        halves: Iterable[int | None] = (None,) if name == "captions" else (0, 1)
        for half in halves:
            examples = [e for e in splits[name] if half is None or half_of(e) == half]
            for example, questions in zip(examples, made(examples, f"{name}:{half}"), strict=True):
                rows.append(Asked(example.group, half, questions))
    text = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
    write_atomic(arguments.work / FILE, text.encode())
    counts = Counter(q.kind for row in rows if row.half is None for q in row.questions)
    print(f"{sum(counts.values()):,} questions of training: {dict(counts)}", file=sys.stderr)


if __name__ == "__main__":
    main()
