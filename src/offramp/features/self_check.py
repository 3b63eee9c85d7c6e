"""Whether a model's decoding stays its own with exits: part 3 of the self-check.

About ten tokens that the model's own `generate` chose are forced on the decoder, through the
executor that will be used: two sequences of different lengths, the second joining late, tokens
exiting by a plan, catching up together, drafts taken back. Every logit of a token that went to full
depth must be the model's own: a key, a value, a position, a mask or a state in the wrong place
shows there. Slots are tried first, then the model's own stack.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from offramp.core.decoding.executor import too_long
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.decoding.reader import Query
from offramp.core.decoding.rule import ExitVerdict
from offramp.core.decoding.scheduler import Schedule
from offramp.core.engine.heads import ExitHeads
from offramp.core.engine.plan import plan_of
from offramp.core.engine.sampler import Sampler
from offramp.core.errors import OfframpError, UnsupportedBackboneError
from offramp.core.executors.choice import EXECUTORS
from offramp.core.executors.prefill import Prepared, prepare, room_of
from offramp.core.executors.segments import ExitOutput
from offramp.core.models.backbone import Backbone
from offramp.core.models.discovery.comparison import relative_difference
from offramp.core.models.discovery.probe import prompt_ids, special_ids
from offramp.core.models.discovery.twin import twin
from offramp.core.models.exits import Exits, propose_depths
from offramp.core.models.rope import LengthDependentRope, with_own_frequencies
from offramp.core.models.weights import scheme
from offramp.features.input_processor import InputProcessor
from offramp.inputs.example import Example

TOKENS = 10
LONG = 320
"""Tokens of the long text: beyond windows, and beyond lengths at which positions are scaled."""
PART = 3
"""Tokens of a prompt that are run at once, where prompts are read in parts."""
_SCRIPT = (0, 1, 2, 0, 1, 0, 1, 1, 2, 0)
"""Which of one or two exits each token takes, from 1; 0: none. Later tokens catch up."""
LATE = 2
"""Tokens that the first sequence has when the second joins."""
_LEAST, _MOST = 2e-5, 2e-4
"""Bounds of the difference of logits that is rounding, relative to the largest, in float32:
`REPEAT` times what the model's own repeat, beside itself in a batch, differs by. Exact models are
off by 3e-7 to 2e-5; one that differs by more from run to run is not known to be right. `_HALF` in
half precision, in which kernels over quantised weights and TF32 may compute as well; there a
router's noise that moves a token to another expert can differ by less, so a repeat must be nearer
by `REPEAT`."""
REPEAT = 20
_HALF = 8e-2

Outcome = float | str
"""The largest difference of logits, relative to the largest; or why there is none, in words."""


@dataclass(frozen=True)
class DecodeCheck:
    """The findings of part 3 of the self-check: the largest difference of logits in each test, or
    the reason of a failure.

    engine: the tested one of `EXECUTORS`. depths: of its exits. plain: without exits. exits: with
    tokens that exit and are filled in later. first_token: also with a first token that exits out of
    the prompt. lossless: with drafts that are verified and taken back. parts: with prompts run a
    few tokens at a time. allowed: the largest difference that counts as rounding.
    """

    engine: str
    depths: tuple[int, ...]
    plain: Outcome
    exits: Outcome
    first_token: Outcome
    lossless: Outcome
    parts: Outcome
    allowed: float

    def holds(self, outcome: Outcome) -> bool:
        """Return True if the logits of a test were the model's own, up to rounding."""
        return isinstance(outcome, float) and outcome <= self.allowed

    @property
    def exact(self) -> bool:
        """Return True if decoding is the model's own, without exits and with them."""
        return self.holds(self.plain) and self.holds(self.exits)


class _Scripted(ExitHeads):
    """Exits that take tokens by a script, whatever the score says; lossless, every second draft is
    another token than the model's."""

    def __init__(self, *made: Any, script: tuple[int, ...], lossless: bool) -> None:
        super().__init__(*made)
        self._script, self._lossless = script, lossless

    def verdicts(
        self, depth: int, output: ExitOutput, queries: Sequence[Query | None]
    ) -> list[ExitVerdict | Exception | None]:
        number = self._depths.index(depth) + 1
        made: list[ExitVerdict | Exception | None] = []
        for query in queries:
            if query is None:
                made.append(None)
                continue
            assert isinstance(query.sampler, _Forced)
            place = len(query.before)
            takes = self._lossless or self._script[place % len(self._script)] == number
            wrong = self._lossless and place % 2 == 1
            made.append(ExitVerdict(query.sampler.given(place, wrong), float(takes)))
        return made


class _Forced(Sampler):
    """A sampler that is given every token, and keeps the logits of each place."""

    def __init__(self, prepared: Prepared, row: int, answer: Sequence[int]) -> None:
        super().__init__(prepared, row)
        self.answer, self.plain, self.most = answer, False, len(answer)
        self.seen: dict[int, Tensor] = {}

    def given(self, place: int, wrong: bool = False) -> int:
        """The answer's token at a place, or where it is to be wrong another of its tokens."""
        if place >= len(self.answer):
            return self.answer[-1]
        token = self.answer[place]
        return next((t for t in self.answer if t != token), token) if wrong else token

    def choose(self, logits: Tensor, before: Sequence[int]) -> int:
        self.seen[len(before)] = logits[0].clone()
        return self.given(len(before))

    def would_end(self, tokens: int, last: int) -> bool:
        return tokens >= len(self.answer)

    def emit(self, ids: Sequence[int], place: int, depth: int, score: float) -> bool:
        return place + 1 >= len(self.answer)


class _Case:
    """A model, its prompts, and what the model's own `generate` makes of them."""

    def __init__(
        self, backbone: Backbone, inputs: Mapping[str, Any], depths: Sequence[int]
    ) -> None:
        self.backbone, self.depths = backbone, tuple(depths)
        self.model = backbone.model
        if backbone.rope != LengthDependentRope():  # it would write its frequencies
            self.model = twin(backbone.model)
            with_own_frequencies(self.model, backbone.family.stack)
        limit = None if backbone.is_encoder_decoder else backbone.positions
        if limit is not None and "input_ids" in inputs and max(_lengths(inputs)) > limit:
            raise too_long(limit)
        self.script = _SCRIPT if len(self.depths) < 3 else (*range(len(self.depths) + 1), 0)
        self.inputs, new = _fitting(backbone, self.model, inputs, max(TOKENS, len(self.script)))
        self.options: dict[str, Any] = {
            "do_sample": False,
            "num_beams": 1,
            "use_cache": True,
            "max_new_tokens": new,
            # To read an id that marks an image wants an image.
            "suppress_tokens": special_ids(backbone.model),
            "forced_eos_token_id": None,
        }
        self.tokens, self.logits = self._own(self.inputs)
        self.exits = Exits(backbone, depths).requires_grad_(False)
        self.allowed = self._allowed(inputs)

    def _own(self, inputs: Mapping[str, Any]) -> tuple[Tensor, list[Tensor]]:
        """The model's own tokens [B, N], and the logits [B, V] that each step chose from."""
        made = self.model.generate(
            **inputs,
            **self.options,
            min_new_tokens=self.options["max_new_tokens"],
            output_logits=True,
            return_dict_in_generate=True,
        )
        return made.sequences[:, -len(made.logits) :], list(made.logits)

    def _allowed(self, inputs: Mapping[str, Any]) -> float:
        """The largest difference that counts as rounding: the model's own, alone and in a batch."""
        exact = self.backbone.dtype in (torch.float32, torch.float64)
        exact = exact and torch.get_float32_matmul_precision() == "highest"
        if scheme(self.backbone.layers) or not exact:
            apart = _apart(self.logits, self._own(self.inputs)[1])
            return _HALF if REPEAT * apart <= _HALF else 0.0
        alone = self.logits if self.inputs is inputs else self._own(inputs)[1]
        try:
            _, beside = self._own(
                {n: torch.cat([v, v]) if isinstance(v, Tensor) else v for n, v in inputs.items()}
            )
        except Exception:  # whatever the model raises on images laid out otherwise
            return _LEAST
        return min(_MOST, max(_LEAST, REPEAT * _apart(alone, beside)))

    def alone(self) -> _Case:
        """The case of the first prompt alone: only single prompts are read in parts."""
        made, rows = copy.copy(self), len(self.tokens)
        made.inputs = {
            name: value[:1] if isinstance(value, Tensor) and len(value) == rows else value
            for name, value in self.inputs.items()
        }
        made.tokens, made.logits = made._own(made.inputs)
        return made

    def worst(
        self,
        engine: str,
        script: tuple[int, ...] | None,
        *,
        first: bool = False,
        lossless: bool = False,
        part: int | None = None,
    ) -> float:
        """The largest difference of logits at full depth.

        script: which exit tokens take; None: the full model. first: whether the first token may
        exit out of the prompt. lossless: everything is drafted, every second draft wrongly. part:
        tokens of the prompt that are run at once; None: all.
        """
        backbone, rows = self.backbone, len(self.tokens)
        if part is not None:
            backbone = copy.copy(backbone)
            backbone.learn(causal_prompt=True, lossless=backbone.lossless)
        depths = () if script is None else self.depths[:1] if lossless else self.depths
        at = dict.fromkeys(depths, 0.5)
        heads = partial(_Scripted, script=script or (), lossless=lossless)
        policy = ExitPolicy(at, lossless=lossless, max_draft=3)
        plan = plan_of(backbone, self.exits, policy, heads=heads)
        opening = at if first or backbone.is_encoder_decoder else {}
        rule = replace(plan.rule(), first=opening)
        executor = plan.executor(engine=engine, slots=rows)
        decoder = plan.decoder(executor, Schedule(2, rows))
        prompts = plan.reader(chunk=part)
        prepared = prepare(prompts.intercepted.model, self.inputs, **self.options)
        samplers = [_Forced(prepared, row, self.tokens[row].tolist()) for row in range(rows)]
        try:
            prompt, firsts = decoder.read(prompts, prepared, list(samplers), rule)
            waiting = list(range(1, rows))
            sequences = [decoder.join(prompt, 0, samplers[0], rule, firsts[0])]
            while decoder.goes_on():
                decoder.make(decoder.next_call())
                while waiting and len(sequences[0].tokens) > LATE:
                    row = waiting.pop()
                    sequences.append(decoder.join(prompt, row, samplers[row], rule, firsts[row]))
            assert not waiting
        finally:
            executor.close()
        worst = 0.0
        for sequence in sequences:
            sampler = sequence.sampler
            assert isinstance(sampler, _Forced)
            row = next(i for i, one in enumerate(samplers) if one is sampler)
            for place, token in enumerate(sequence.tokens):
                if lossless or token.depth == backbone.depth:
                    theirs = self.logits[place][row]
                    worst = max(worst, relative_difference(sampler.seen[place], theirs))
        return worst


def _apart(alone: Sequence[Tensor], again: Sequence[Tensor]) -> float:
    """The largest difference of logits by step, as long as the tokens are the same."""
    apart = 0.0
    for one, other in zip(alone, again, strict=False):
        apart = max(apart, relative_difference(one, other[: len(one)]))
        if not torch.equal(one.argmax(-1), other[: len(one)].argmax(-1)):
            break
    return apart


@torch.inference_mode()
def check_decoding(
    backbone: Backbone, inputs: Mapping[str, Any], *, depths: Sequence[int] | None = None
) -> DecodeCheck:
    """Compare decoding with the model's own `generate` on `inputs`, one prompt or several, in the
    first of `EXECUTORS` that is exact, else in the last.

    depths: of exits, copies of the next layers; None: at a quarter and three quarters of the
    decoder.
    """
    if not depths:
        depths = propose_depths(backbone.depth, min(2, backbone.depth - 1))
    case = _Case(backbone, inputs, depths)
    for engine in EXECUTORS:
        found = _found(case, engine)
        if found.exact:
            break
    return found


def _found(case: _Case, engine: str) -> DecodeCheck:
    def tried(run: Callable[[], float]) -> Outcome:
        try:
            return run()
        except OfframpError as error:
            return f"refused: {error.problem}"
        except Exception as error:  # a model's own, from a state that it was not made for
            return f"{type(error).__name__}: {str(error)[:160]}"

    first = (1, *case.script[1:])
    plain = tried(lambda: case.worst(engine, None))
    exits = tried(lambda: case.worst(engine, case.script))
    not_asked = ("not asked: decoding is not exact",) * 3
    found = DecodeCheck(engine, case.depths, plain, exits, *not_asked, case.allowed)
    if not found.exact:
        return found
    found = replace(
        found,
        first_token=tried(lambda: case.worst(engine, first, first=True)),
        lossless=tried(lambda: case.worst(engine, (1,), lossless=True)),
    )
    if not found.holds(found.first_token):
        return replace(found, parts="not asked: the prompt is not causal")
    return replace(found, parts=tried(lambda: case.alone().worst(engine, None, part=PART)))


def _fitting(
    backbone: Backbone, model: Any, inputs: Mapping[str, Any], tokens: int
) -> tuple[Mapping[str, Any], int]:
    """Several prompts made of the inputs, and at most so many tokens of an answer, that stay on one
    side of where rotary frequencies change; see `Backbone.room`."""
    several = _several(model, inputs)
    if backbone.rope == LengthDependentRope():
        return several, tokens
    lengths = _lengths(inputs)
    room = room_of(backbone, lengths)
    if room is None:
        return several, tokens
    longest = max(_lengths(several))
    if longest > room:
        several, longest = inputs, max(lengths)
    return several, min(tokens, room - longest + 1)


def _lengths(inputs: Mapping[str, Any]) -> list[int]:
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    found: list[int] = (torch.ones_like(ids) if mask is None else mask).sum(1).tolist()
    return found


def _several(model: Any, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The inputs; a single prompt twice, once padded in front and once with two words more: a row
    is to end, and padding is to hurt where it can. As they came where the model does not take that.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or len(ids) != 1 or model.config.is_encoder_decoder:
        return inputs
    length = ids.shape[1]

    def twice(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.dim() < 2 or value.shape[:2] != (1, length) or value.is_floating_point():
            return torch.cat([value, value])
        longer = torch.cat([value, value[:, -1:], value[:, -1:]], 1)
        padded = torch.cat(
            [torch.zeros_like(value[:, :1]), torch.zeros_like(value[:, :1]), value], 1
        )
        return torch.cat([padded, longer])

    made = {name: twice(value) for name, value in inputs.items()}
    made.setdefault("attention_mask", twice(torch.ones_like(ids)))
    try:
        model.generate(**made, max_new_tokens=1, do_sample=False, num_beams=1)
    except Exception:  # whatever the model raises on images laid out otherwise
        return inputs
    return made


def adopt_findings(backbone: Backbone, check: DecodeCheck) -> None:
    """Enable in the backbone what the check found exact, and refuse the rest.

    Raises:
        UnsupportedBackboneError: decoding without exits, or with them, is not the model's own.
    """
    at = " and ".join(map(str, check.depths))
    for name, outcome in (("without exits", check.plain), (f"with exits at {at}", check.exits)):
        if not check.holds(outcome):
            how = f"off by {outcome:.1e}" if isinstance(outcome, float) else outcome
            raise UnsupportedBackboneError(
                f"Self-check, part 3: decoding {name} is not {type(backbone.model).__name__}'s "
                f"own ({how}).",
                "This model cannot be decoded with exits; please report its model_type.",
            )
    backbone.learn(
        causal_prompt=check.holds(check.first_token),
        in_parts=check.holds(check.parts),
        lossless=check.holds(check.lossless),
        engine=check.engine,
    )


def check_untested(
    encoder: InputProcessor, examples: Sequence[Example], depths: Sequence[int] = ()
) -> None:
    """Check a backbone without tests of its own on `examples` and on a long text, and take over the
    findings; see `adopt_findings`.

    Raises:
        UnsupportedBackboneError: decoding is not the model's own, in short answers or after a text
            of `LONG` tokens, where sliding windows and scaled positions matter.
    """
    backbone = encoder.backbone
    if not backbone.tested and examples:
        prompts = encoder.prompts(examples)
        for each in (prompts, lengthened(backbone, prompts)):
            if each is not None:
                adopt_findings(backbone, check_decoding(backbone, each, depths=depths))


def lengthened(
    backbone: Backbone,
    inputs: Mapping[str, Any],
    answer: int = 2 * TOKENS,
    context: int | None = None,
) -> Mapping[str, Any] | None:
    """Return a prompt with ordinary words added up to `LONG` tokens, or to as many as leave room
    for an answer in the context; None where the model does not take them."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or backbone.is_encoder_decoder:
        return None
    rows, length = ids.shape
    rooms = [room for room in (backbone.room(LONG), context) if room is not None]
    more = min([LONG, *(room - answer for room in rooms)]) - length
    if rows > 1 or more <= 0:
        return None
    words = prompt_ids(backbone.model)
    order = torch.arange(more, device=words.device)
    words = words[:, (order * order + order // 3) % words.shape[1]]  # no period

    def longer(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.is_floating_point() or value.shape != ids.shape:
            return value
        added = words if name == "input_ids" else value[:, -1:].expand(-1, more)
        return torch.cat([value, added.to(value)], 1)

    made = {name: longer(name, value) for name, value in inputs.items()}
    try:
        backbone.model.generate(**made, max_new_tokens=1, do_sample=False, num_beams=1)
    except Exception:  # whatever the model raises on a prompt that does not end as its template
        return None
    return made
