"""Stored files as types: numbers with their ranges, lists with their longest lengths.

The one place where adapter.json, vllm.json and attempts.json are described. It imports nothing of
offramp, so that the plug-in of vLLM, whose wheel has a copy, reads by the same types.
"""

from __future__ import annotations

import json
import math
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

Number = Annotated[float, Meta(ge=-1e308, le=1e308)]
"""A finite number."""
Share = Annotated[float, Meta(ge=0, le=1)]
Target = Annotated[float, Meta(gt=0, le=1)]
"""What a risk is held to, as a share of the risk's scale."""
Amount = Annotated[float, Meta(ge=0, le=1e308)]
"""A finite number from 0, such as seconds."""
Count = Annotated[int, Meta(ge=0, le=2**53)]
Ordinal = Annotated[int, Meta(ge=1, le=2**53)]
Depth = Annotated[str, Meta(pattern=r"^(0|[1-9][0-9]{0,8})\Z")]
"""A depth as text, in its one spelling: of "2" and "02" only one would count."""
Drafter = Annotated[str, Meta(pattern=r"^(0|[1-9][0-9]{0,8}|[^\W\d]\w{0,99})\Z")]
"""A depth, or the name of a registered drafter."""
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Bits = Annotated[int, Meta(ge=-(2**15), lt=2**15)]
"""A bfloat16 value's bits."""
Token = Annotated[int, Meta(ge=0, lt=2**31)]
Layer = Annotated[int, Meta(ge=0, lt=2**16)]
Sample = Annotated[list[Bits], Meta(max_length=2**16)]
Tokens = Annotated[list[Token], Meta(min_length=1, max_length=2**16)]
Thresholds = dict[Depth, Share]
Numbers = dict[Depth, Number]

FEATURES = 20
"""Numbers of a look (`offramp.promises.likeness.look_of`)."""
LARGEST = 2**22
"""Bytes of the largest adapter.json or vllm.json that is read."""


# -- adapter.json ----------------------------------------------------------------------------------


class Policy(Struct, forbid_unknown_fields=True, frozen=True):
    """An `ExitPolicy`. Earlier versions also write guesses, weights and gates."""

    thresholds: Thresholds
    score: str = ""
    kv: str = ""
    exit_in_prefill: bool = False
    lossless: bool = False
    max_draft: Ordinal = 1
    drafts: dict[Drafter, Share] = {}
    shortlist: bool = False
    first: Thresholds = {}
    trust: Amount | None = None
    visual_keep: Share = 1.0
    visual_ranking: str = ""
    guesses: Numbers = {}
    weights: Numbers = {}
    gates: Numbers = {}


class Fingerprint(Struct, forbid_unknown_fields=True, frozen=True):
    """A backbone's sizes, and samples of its weights (`offramp.core.models.fingerprint`)."""

    model_type: str
    layers: Count
    width: Count
    vocabulary: Count
    tensors: Count
    weights: Sample
    parts: (
        Annotated[dict[str, Annotated[list[Sample], Meta(max_length=2**12)]], Meta(max_length=64)]
        | None
    ) = None
    quantized: str = ""


class Backbone(Struct, frozen=True):
    """The model that exits were trained for."""

    name: str
    revision: str | None
    fingerprint: Fingerprint


class Kept(Struct, frozen=True):
    """The smallest of some numbers, ascending, and the count of all."""

    n: Ordinal
    low: Annotated[list[Number], Meta(min_length=1, max_length=2**14)]


class Looks(Kept, frozen=True):
    """Looks of images; see `offramp.promises.likeness.Looks`."""

    center: Annotated[list[Number], Meta(min_length=FEATURES, max_length=FEATURES)]
    whitened: Annotated[
        list[Number],
        Meta(min_length=FEATURES * (FEATURES + 1) // 2, max_length=FEATURES * (FEATURES + 1) // 2),
    ]


class KindLikeness(Kept, frozen=True):
    """Calibrated answers to one kind of prompt, with looks of their images."""

    looks: Looks | None = None


class Likeness(Struct, forbid_unknown_fields=True, frozen=True):
    """Calibrated answers by kind of prompt, and looks of all their images."""

    kinds: Annotated[dict[str, Kept], Meta(max_length=2**10)]
    looks: Looks | None = None


KindsLikeness = Annotated[dict[str, KindLikeness], Meta(max_length=2**10)]
"""The same as earlier versions write it: each kind has looks of its own."""


def likeness_of(value: Any) -> Any:
    """Return a `Likeness`, or a `KindsLikeness` of earlier versions. Raise `ValueError` for other
    values."""
    kinds = value.get("kinds") if isinstance(value, dict) else None
    now = isinstance(kinds, dict) and "n" not in kinds
    return shaped(value, Likeness if now else KindsLikeness)


class Conditions(Struct, frozen=True):
    """Circumstances that a guarantee holds under. Other entries are compared as written."""

    dtype: str | None = None
    quantized: str | None = None
    engine: str | None = None
    kernels: str | None = None
    vision: str | None = None
    device: str | None = None
    sampling: str | None = None
    template: str | None = None
    score: str | None = None
    kv: str | None = None
    tokens: str | None = None
    exits: str | None = None
    parameters: str | None = None
    autocast: str | None = None
    matmul: str | None = None
    visual_ranking: str | None = None
    pixels: dict[str, Any] | None = None
    any_prompt: bool | None = None
    exit_in_prefill: bool | None = None
    shortlist: bool | None = None
    thresholds: Thresholds | None = None
    first: Thresholds | None = None
    gates: Numbers | None = None
    weights: Numbers | None = None
    visual_keep: Share | None = None
    longest: Count | None = None
    prompts: list[Annotated[list[str], Meta(min_length=1)]] | None = None


class Watched(Struct, frozen=True):
    """A watched risk, in place of a risk that needs right answers."""

    risk: str
    targets: dict[str, Target]


class Kind(Struct, frozen=True):
    """Results for one kind of prompt, and the point of the path that its answers use."""

    kind: str | None = None
    target: Target | None = None
    point: Thresholds | None = None


class Way(Struct, frozen=True):
    """One of the compared ways to answer (`offramp.calibration.trial.Way`)."""

    name: str
    setting: str
    times: Amount
    risk: Number | None = None
    answers: Count = 0
    promised: bool = False


class Calibration(Struct, frozen=True):
    """A guarantee. Entries of other names are only shown."""

    risk: str | None = None
    method: str | None = None
    unit: str | None = None
    data_digest: str | None = None
    reason: str | None = None
    runtime: str | None = None
    policy: dict[str, Any] | None = None
    target: Target | None = None
    confidence: Share | None = None
    level: Share | None = None
    measured: Number | None = None
    bound: Number | None = None
    n: Count | None = None
    answers: Count | None = None
    attempt: Count | None = None
    largest: Count | None = None
    conditions: Conditions | None = None
    likeness: dict[str, Any] | None = None
    watched: Watched | None = None
    kinds: list[Kind] | None = None
    qualities: dict[str, Number] | None = None
    ways: Annotated[list[Way], Meta(max_length=64)] | None = None

    def __post_init__(self) -> None:
        """Refuse a damaged likeness, and a guarantee whose risk or bound is above its target."""
        likeness_of(self.likeness or {})
        if self.reason or self.target is None:
            return
        for name in ("measured", "bound"):
            value = getattr(self, name)
            if value is not None and value > self.target:
                raise ValueError(f"{name!r} is {value}, above the target {self.target}")


class Drafting(Struct, frozen=True):
    """Shares of drafts that were right: the first of a round, and each after right ones."""

    first_draft: Share
    acceptance: list[Share]


class Metrics(Struct, frozen=True):
    """Measurements of training, by depth."""

    agreement: dict[str, Share] | None = None
    drafting: dict[str, Drafting] | None = None


class Decoding(Struct, forbid_unknown_fields=True, frozen=True):
    """Findings of decoding on a backbone without tests of its own (`Backbone.learn`)."""

    causal_prompt: bool = False
    in_parts: bool = False
    lossless: bool = True
    engine: str = ""
    transformers: str = ""
    prompts: list[list[str]] = []


class Adapter(Struct, forbid_unknown_fields=True, frozen=True):
    """adapter.json. files: SHA-256 of the others by name. digest: of all other entries."""

    format: Literal[1]
    backbone: Backbone
    depths: Annotated[list[Annotated[int, Meta(ge=1, lt=2**16)]], Meta(min_length=1)]
    policy: Policy
    metrics: Metrics
    provenance: dict[str, Any]
    exit_kind: str = "layer"
    checks: dict[str, Any] | None = None
    calibration: Calibration | None = None
    elsewhere: dict[str, Calibration | None] | None = None
    decoding: Decoding | None = None
    files: dict[str, Digest] | None = None
    digest: Any = None
    discriminators: Any = None
    conditional_discriminators: Any = None

    def __post_init__(self) -> None:
        """Refuse depths that do not rise, and digests that leave out what is read."""
        if self.depths != sorted(set(self.depths)):
            raise ValueError("'depths' do not rise")
        needed = ["exits.safetensors", *([] if self.checks is None else ["checks.safetensors"])]
        for name in needed if self.files is not None else ():
            if name not in typing.cast(dict[str, str], self.files):
                raise ValueError(f"'files' has no SHA-256 of {name}")


# -- vllm.json -------------------------------------------------------------------------------------


class Checked(Struct, frozen=True):
    """A prompt, and the answers that it must get from vLLM."""

    prompt: Tokens
    tokens: Tokens
    depths: Annotated[list[Layer], Meta(min_length=1, max_length=2**16)]
    full: Tokens
    image: str | None = None

    def __post_init__(self) -> None:
        """Refuse an answer whose tokens have no depth."""
        if len(self.tokens) != len(self.depths):
            raise ValueError("an answer to check has other numbers of tokens and depths")


class Vllm(Struct, frozen=True):
    """vllm.json: see `offramp_vllm.adapter`."""

    format: Literal[2]
    exits: Digest
    layers: Layer
    copied: dict[Depth, Layer]
    first_may_exit: bool
    dtype: str
    sampled: Annotated[dict[str, Annotated[int, Meta(ge=0, le=2**10)]], Meta(max_length=2**12)]
    checked: Annotated[list[Checked], Meta(max_length=2**10)]


# -- attempts.json, seen.json ----------------------------------------------------------------------


class Attempt(Struct, forbid_unknown_fields=True, frozen=True):
    """An attempt at a guarantee (`offramp.calibration.attempts`); members and looked are left out
    by earlier versions."""

    asked: str
    settings: dict[str, Any]
    number: Ordinal
    images: list[str]
    path: list[Thresholds]
    outcome: dict[str, Any]
    members: list[str] = []
    looked: Count = 0


Attempts = list[Attempt]
Seen = dict[str, list[str]]
"""Digests of images by step."""


# -- reading ---------------------------------------------------------------------------------------


def parse(content: bytes) -> Any:
    """Return a JSON value. Raise `ValueError` of one line for text that is not JSON, an object with
    a name twice, or a number that is not finite."""
    try:
        return json.loads(
            content.decode("utf-8-sig"),
            object_pairs_hook=_unique,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def shaped(value: Any, kind: Any) -> Any:
    """Return a JSON value as one of the types here. Raise `ValueError` of one line where the shape
    differs."""
    try:
        return msgspec.convert(value, kind)
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(_told(error)) from None


def decoded(content: bytes, kind: Any) -> Any:
    """Return JSON text as one of the types here, as `shaped` does; wrong text is refused before it
    takes memory."""
    try:
        return msgspec.json.decode(content.removeprefix(b"\xef\xbb\xbf"), type=kind)
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(_told(error)) from None


def _told(error: Exception) -> str:
    """A problem with its place: "'policy.thresholds': expected `float` <= 1.0"."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    problem, _, place = " ".join(str(error).split()).rpartition(" - at `")
    problem, place = (problem, place) if problem else (place, "")
    place = place.removeprefix("key` in `").rstrip("`").removeprefix("$").replace("[...]", "")
    problem = problem[:160].removeprefix("Object ")
    return f"{place.lstrip('.')[:60]!r} holds what does not fit: {problem}" if place else problem


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:60]} is no finite number")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name[:60]!r} stands there twice")
            seen.add(name)
    return names


def read(path: Path, kind: Any, largest: int = LARGEST) -> tuple[dict[str, Any], Any]:
    """Return a file's JSON object, plain and as one of the types here. Raise `OSError`, or
    `ValueError` of one line."""
    if path.stat().st_size > largest:
        raise ValueError(f"it has more than {largest} bytes")
    plain = parse(path.read_bytes())
    return plain, shaped(plain, kind)
