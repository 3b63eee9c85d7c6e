"""Answers in JSON: what a schema lets come next, at any place of an answer.

A constraint goes among Hugging Face's logits processors, so whoever says a token obeys it: an exit,
a draft, the full model. Scores are confidence in what is allowed.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Mapping, Set
from decimal import Decimal
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from offramp.core.engine.sampler import NothingAllowed
from offramp.core.errors import InputError
from offramp.core.missing import install_command
from offramp.core.models.change import tokens_of

_LARGEST_MULTIPLE = 10_000
"""Of all divisors of a schema (`multipleOf`) in steps of their last decimal, the least common
multiple: llguidance builds that many states before the first token. 10,000 of them take up to half
a second of one core, a million five seconds, and nothing stops it once begun."""
_NO_DIVISOR = 1e15
"""llguidance refuses divisors of so many digits."""
_SPACES = {"whitespace_pattern": r" |\n {0,20}"}
"""Between two marks of JSON: enough to indent, and no more, so that no answer is made of spaces."""


class JsonConstraint:
    """A constraint to answers that a JSON schema allows, for `generate(logits_processor=[...])` and
    engines.

        constraint = JsonConstraint({"type": "object", ...}, processor)
        adapter.generate(**inputs, logits_processor=[constraint])

    An answer that ends by itself parses and is valid; an answer that `max_new_tokens` cuts off is
    the beginning of one. A constraint may serve any number of calls.
    """

    def __init__(self, schema: Mapping[str, Any], tokenizer: Any) -> None:
        """schema: JSON Schema, as far as llguidance knows it. tokenizer: the model's, a fast one,
        or the processor that has it.

        Raises:
            InputError: llguidance is not installed; a schema that it does not know, whose divisors
                have a common multiple beyond 10,000 steps, or that nothing satisfies; a tokenizer
                that is not a fast one.
        """
        guidance = _llguidance()
        self._tokenizer = _spelling(getattr(tokenizer, "tokenizer", tokenizer))
        if not isinstance(schema, Mapping):
            raise _no_schema("it is no JSON object")
        try:
            grammar = guidance.LLMatcher.grammar_from_json_schema(
                json.dumps(dict(schema)), overrides=_SPACES
            )
        except (TypeError, ValueError, RecursionError) as error:
            raise _no_schema(_one_line(str(error))) from error
        _check_divisors(schema)
        self._fresh = guidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if not self._fresh.is_error():
            self._fresh.compute_bitmask()  # tells whether there is a first token
        if self._fresh.is_error():
            raise _no_schema(_said(self._fresh) or "nothing that the model can write satisfies it")

    def of_row(self, prompt: int, ends: Set[int]) -> _Answer:
        """Return the constraint of one row; see `Constraint`. ends: end tokens; empty: the
        tokenizer's own."""
        own = frozenset(self._tokenizer.eos_tokens)
        return _Answer(self._fresh, prompt, frozenset(ends) or own, own)


class _Answer:
    """A logits processor of one answer [1, T]. Asked about another answer than before it goes back
    to where they part: drafts fall."""

    def __init__(
        self, fresh: Any, prompt: int, ends: frozenset[int], marks: frozenset[int]
    ) -> None:
        """fresh: a matcher at its beginning. marks: what it takes for end tokens itself."""
        self._fresh, self._matcher = fresh, fresh.deep_copy()
        self._prompt, self._ends, self._marks = prompt, ends, marks
        self._written: list[int] = []
        self._allowed: Tensor | None = None  # [V of the tokenizer], after what is written

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [1, V] in which -inf is what may not come.

        Raises:
            NothingAllowed: all that may come is -inf already.
            InputError: no token of the vocabulary may come; the schema is too complex.
        """
        answer = ids[0, self._prompt :].tolist()
        if self._ends.intersection(answer):  # it is over, and something writes on
            found = self._only_ends()
        else:
            if self._allowed is None or answer != self._written:
                self._allowed = self._behind(answer)
            found = self._allowed
        size = min(len(found), scores.shape[-1])
        made = torch.full_like(scores, float("-inf"))
        allowed = found[:size].to(scores.device)
        made[0, :size] = torch.where(allowed, scores[0, :size], float("-inf"))
        if not bool((made > float("-inf")).any()):
            raise NothingAllowed(
                "No token that the JSON schema allows can come next.",
                "Leave other rules out (min_new_tokens, suppress_tokens, a processor of your own).",
            )
        return made

    def _behind(self, answer: list[int]) -> Tensor:
        """Which tokens may come after an answer [V] that has not ended."""
        same = 0
        for one, other in zip(self._written, answer, strict=False):
            if one != other:
                break
            same += 1
        back = len(self._written) - same
        right = not back or self._matcher.rollback(back)
        right = right and (len(answer) == same or self._matcher.consume_tokens(answer[same:]))
        self._written = answer
        if not right:
            raise self._failed()
        if self._matcher.is_stopped():
            return self._only_ends()
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little").astype(bool))
        allowed[list(self._marks)] = False
        allowed[[end for end in self._ends if end < len(allowed)]] = self._matcher.is_accepting()
        if self._matcher.is_error() or not bool(allowed.any()):
            raise self._failed()
        return allowed

    def _only_ends(self) -> Tensor:
        allowed = torch.zeros(max(self._ends) + 1, dtype=torch.bool)
        allowed[list(self._ends)] = True
        return allowed

    def _failed(self) -> InputError:
        """Of a matcher that cannot go on; begin anew."""
        said = _said(self._matcher)
        self._matcher, self._written, self._allowed = self._fresh.deep_copy(), [], None
        return InputError(
            f"The JSON schema cannot be followed: {said}."
            if said
            else "The model's vocabulary cannot write what the JSON schema asks for.",
            "Use a simpler schema, or a model whose tokens write JSON.",
        )


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise InputError(
            "Answers in JSON need llguidance, which is not installed.",
            f"Install it: {install_command('json')}",
        ) from error
    return llguidance


def _check_divisors(schema: Mapping[str, Any]) -> None:
    """Raise `InputError` where the `multipleOf` of a schema, taken together, cost too much."""
    divisors = [
        Decimal(repr(abs(value))).normalize()
        for value in _values_of("multipleOf", schema)
        if isinstance(value, int | float) and 0 < abs(value) < _NO_DIVISOR
    ]
    decimals = -min((int(divisor.as_tuple().exponent) for divisor in divisors), default=0)
    scaled = [int(divisor.scaleb(max(0, decimals))) for divisor in divisors]
    if math.lcm(*scaled) > _LARGEST_MULTIPLE:
        raise _no_schema(
            f"the least common multiple of its multipleOf is beyond {_LARGEST_MULTIPLE:,} steps of "
            "their last decimal"
        )


def _values_of(name: str, schema: Any) -> Iterator[Any]:
    """Return every value of a keyword anywhere in a JSON schema."""
    left = [schema]
    while left:
        part = left.pop()
        if isinstance(part, Mapping):
            if name in part:
                yield part[name]
            left += part.values()
        elif isinstance(part, list | tuple):
            left += part


def _no_schema(said: str) -> InputError:
    return InputError(
        f"The JSON schema cannot be used: {said}.",
        "Leave out what is not supported; the page on serving says what is.",
    )


def _said(matcher: Any) -> str:
    """Why a matcher cannot go on; nothing where no token can come next."""
    said = _one_line(matcher.get_error().partition("<state>")[0])  # after it: for its developers
    return "" if said == "NoExtensionBias" else said


def _one_line(text: str) -> str:
    """A message without the lines that point at a place of the one above."""
    lines = [line.strip()[:150] for line in text.splitlines() if line.strip(" ^")]
    return " ".join(lines).rstrip(".")[:300]


_SPELLINGS: WeakKeyDictionary[Any, tuple[Any, Any]] = WeakKeyDictionary()
_LOCK = threading.Lock()


def _spelling(tokenizer: Any) -> Any:
    """How tokens are spelt, as llguidance has it; made once, as that takes long, for a tokenizer
    and the tokens that were added to it."""
    with _LOCK:
        known, spelling = _SPELLINGS.get(tokenizer, (None, None))
        if known != (now := tokens_of(tokenizer)):
            _SPELLINGS[tokenizer] = now, (spelling := _spelt(tokenizer))
        return spelling


def _spelt(tokenizer: Any) -> Any:
    backend, end = (getattr(tokenizer, n, None) for n in ("backend_tokenizer", "eos_token_id"))
    if backend is None or end is None:
        raise InputError(
            f"Answers in JSON need a fast tokenizer with an end token, not a "
            f"{type(tokenizer).__name__}.",
            "Pass the model's own tokenizer, or its processor.",
        )
    spelt = json.loads(backend.to_str())
    spelt["truncation"] = spelt["padding"] = None
    # A space before a text is no part of an answer's first token.
    for part in ("normalizer", "pre_tokenizer"):
        spelt[part] = _without_prefix(spelt.get(part))
    decoder = spelt.get("decoder") or {}
    if decoder.get("type") == "Metaspace":  # as T5's: the same in steps that llguidance knows
        mark = {"String": decoder["replacement"]}
        steps = [{"type": "Replace", "pattern": mark, "content": " "}, {"type": "ByteFallback"}]
        spelt["decoder"] = {"type": "Sequence", "decoders": [*steps, {"type": "Fuse"}]}
    try:
        return _llguidance().LLTokenizer(json.dumps(spelt), eos_token=end)
    except ValueError as error:
        raise InputError(
            f"llguidance does not know how this tokenizer spells: {_one_line(str(error))}.",
            "Leave the JSON schema out, or use a model with another tokenizer.",
        ) from error


def _without_prefix(part: Any) -> Any:
    """A step of a tokenizer that puts no space before a text."""
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    made = dict(part)
    if "add_prefix_space" in made:
        made["add_prefix_space"] = False
    if "prepend_scheme" in made:
        made["prepend_scheme"] = "never"
    for name in ("normalizers", "pretokenizers"):
        if name in made:
            made[name] = [step for old in made[name] if (step := _without_prefix(old)) is not None]
    return made
