"""Whether a model's decoding stays its own with exits: part 3 of the self-check.

About ten tokens are written as they will be, through the executor that will be used: two sequences
of different lengths, the second joining late, tokens exiting by a plan, catching up together,
drafts taken back. The model reads each answer again (`offramp.core.engine.read_again`), and every
logit of a token that went to full depth must be its own: a key, a value, a position, a mask or a
state in the wrong place shows there. Slots are tried first, then the model's own stack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from offramp.core.decoding.policy import ExitPolicy, GenerationOutput
from offramp.core.decoding.reader import Query
from offramp.core.decoding.rule import ExitVerdict
from offramp.core.decoding.scheduler import Schedule
from offramp.core.engine.heads import ExitHeads
from offramp.core.engine.plan import plan_of
from offramp.core.engine.read_again import (
    Case,
    Kept,
    Outcome,
    off_by,
    own_model,
    read,
    rounding,
    untouched,
)
from offramp.core.engine.sampler import Sampler
from offramp.core.errors import OfframpError, UnsupportedBackboneError
from offramp.core.executors.choice import EXECUTORS
from offramp.core.executors.prefill import prepare, room_of, within
from offramp.core.executors.segments import ExitOutput
from offramp.core.models.backbone import Backbone
from offramp.core.models.discovery.comparison import relative_difference
from offramp.core.models.discovery.probe import prompt_ids, special_ids
from offramp.core.models.exits import Exits, propose_depths
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
REPEAT, MOST = 20, 2e-4
"""How much nearer than rounding two readings by the model must be: one that computes at random is
not known to be right. In float32 more counts as rounding where they are not, up to `MOST`."""


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
    """Exits that take tokens by a script, whatever the score says, and say the answer's; lossless,
    every second draft is another token than the model's."""

    def __init__(
        self, *made: Any, script: tuple[int, ...], answers: Sequence[Sequence[int]], lossless: bool
    ) -> None:
        super().__init__(*made)
        self._script, self._answers, self._lossless = script, answers, lossless

    def verdicts(
        self, depth: int, output: ExitOutput, queries: Sequence[Query | None]
    ) -> list[ExitVerdict | Exception | None]:
        return [None if query is None else self._verdict(depth, query) for query in queries]

    def _verdict(self, depth: int, query: Query) -> ExitVerdict:
        assert isinstance(query.sampler, Sampler)
        place, answer = len(query.before), self._answers[query.sampler.row]
        token = answer[min(place, len(answer) - 1)]
        if self._lossless and place % 2:
            token = next((other for other in answer if other != token), token)
        number = self._depths.index(depth) + 1
        takes = self._lossless or self._script[place % len(self._script)] == number
        return ExitVerdict(token, float(takes))


class _Tests:
    """A model, its prompts, and what the decoder makes of them without exits."""

    def __init__(
        self, backbone: Backbone, inputs: Mapping[str, Any], depths: Sequence[int]
    ) -> None:
        self.backbone, self.depths = backbone, tuple(depths)
        self.script = _SCRIPT if len(self.depths) < 3 else (*range(len(self.depths) + 1), 0)
        self.inputs, new = _fitting(backbone, inputs, max(TOKENS, len(self.script)))
        self.options: dict[str, Any] = {
            "do_sample": False,
            "num_beams": 1,
            "use_cache": True,
            "max_new_tokens": new,
            "min_new_tokens": new,
            # To read an id that marks an image wants an image.
            "suppress_tokens": special_ids(backbone.model),
            "forced_eos_token_id": None,
        }
        self.exits = Exits(backbone, depths).requires_grad_(False)
        self.allowed, self.answers = rounding(backbone), list[list[int]]()

    def worst(
        self,
        engine: str,
        script: tuple[int, ...] | None,
        *,
        first: bool = False,
        lossless: bool = False,
        part: int | None = None,
    ) -> Outcome:
        """The largest difference of logits at full depth.

        script: which exit tokens take; None: the full model. first: whether the first token may
        exit out of the prompt. lossless: everything is drafted, every second draft wrongly. part:
        tokens of the first prompt that are run at once; None: all of all prompts.
        """
        backbone, inputs, kept = self.backbone, self.inputs, Kept()
        if part is not None:  # only single prompts are read in parts
            backbone, rows = backbone.with_decoding(), len(self.answers)
            backbone.learn(causal_prompt=True, lossless=backbone.lossless)
            inputs = {
                name: value[:1] if isinstance(value, Tensor) and len(value) == rows else value
                for name, value in inputs.items()
            }
        depths = () if script is None else self.depths[:1] if lossless else self.depths
        at = dict.fromkeys(depths, 0.5)
        said: dict[str, Any] = {"answers": self.answers, "lossless": lossless}
        heads = partial(_Scripted, script=script or (), **said)
        policy = ExitPolicy(at, lossless=lossless, max_draft=3)
        plan = plan_of(backbone, self.exits, policy, heads=heads)
        rule = replace(plan.rule(), first=at if first or backbone.is_encoder_decoder else {})
        prompts = plan.reader(chunk=part)
        prepared = prepare(prompts.intercepted.model, inputs, **self.options)
        samplers = [Sampler(prepared, row) for row in range(len(prepared.ids))]
        for sampler in samplers:
            kept.of(sampler)
        executor = plan.executor(engine=engine, slots=len(samplers))
        decoder = plan.decoder(executor, Schedule(2, len(samplers)))
        try:
            prompt, firsts = decoder.read(prompts, prepared, [*samplers], rule)
            made = {0: decoder.join(prompt, 0, samplers[0], rule, firsts[0])}
            while decoder.goes_on():
                decoder.make(decoder.next_call())
                while len(made) < len(samplers) and len(made[0].tokens) > LATE:
                    row = len(samplers) - len(made)
                    made[row] = decoder.join(prompt, row, samplers[row], rule, firsts[row])
            assert len(made) == len(samplers)
        finally:
            executor.close()
        written = [made[row].tokens for row in range(len(samplers))]
        output = GenerationOutput.of_rows(prepared.ids, written, backbone.depth, pad=prepared.pad)
        own = partial(within, own_model(backbone), inputs, **self.options)
        case = Case(backbone, inputs, lambda: prepared, own)
        if script is None and part is None:
            self.answers = output.new_tokens.tolist()
            self.allowed = _allowed(case, output.new_tokens)
        return off_by(case, output, kept, exact=lossless)


def _allowed(case: Case, answers: Tensor) -> float:
    """The largest difference that counts as rounding: up to `MOST` where the model's own readings
    of an answer, in one call and one by one, are apart; 0 where two alike are not equal enough."""
    usual = rounding(case.backbone)
    with untouched(case.backbone):
        once, *others = (
            case.own(partial(read, answers=answers, step=step))[0]
            for step in ((1, TOKENS) if usual < MOST else (1, 1))
        )
    apart = REPEAT * relative_difference(once, others[0])
    return min(MOST, max(usual, apart)) if usual < MOST else usual * (apart <= usual)


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
    case = _Tests(backbone, inputs, depths)
    for engine in EXECUTORS:
        found = _found(case, engine)
        if found.exact:
            break
    return found


def _found(case: _Tests, engine: str) -> DecodeCheck:
    def tried(run: Callable[[], Outcome]) -> Outcome:
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
    return replace(found, parts=tried(lambda: case.worst(engine, None, part=PART)))


def _fitting(
    backbone: Backbone, inputs: Mapping[str, Any], tokens: int
) -> tuple[Mapping[str, Any], int]:
    """Several prompts made of the inputs, and at most so many tokens of an answer, as there are
    positions, and on one side of where rotary frequencies change; see `Backbone.room`."""
    if not isinstance(inputs.get("input_ids"), Tensor) or backbone.is_encoder_decoder:
        return inputs, tokens
    room = room_of(backbone, _lengths(inputs))
    several = _several(backbone, inputs)
    if room is None:
        return several, tokens
    if max(_lengths(several)) > room:
        several = inputs
    return several, min(tokens, room - max(_lengths(several)) + 1)


def _lengths(inputs: Mapping[str, Any]) -> list[int]:
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    found: list[int] = (torch.ones_like(ids) if mask is None else mask).sum(1).tolist()
    return found


def _several(backbone: Backbone, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The inputs; a single prompt twice, once padded in front and once with two words more: a row
    is to end, and padding is to hurt where it can. As they came where the model does not take that.
    """
    ids = inputs["input_ids"]
    if len(ids) != 1:
        return inputs
    length = ids.shape[1]

    def twice(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.dim() < 2 or value.shape[:2] != (1, length) or value.is_floating_point():
            return torch.cat([value, value])
        longer = torch.cat([value, value[:, -1:], value[:, -1:]], 1)
        padded = torch.cat([torch.zeros_like(value[:, :1])] * 2 + [value], 1)
        return torch.cat([padded, longer])

    made = {name: twice(value) for name, value in inputs.items()}
    made.setdefault("attention_mask", twice(torch.ones_like(ids)))
    return made if _takes(backbone, made) else inputs


def _takes(backbone: Backbone, inputs: Mapping[str, Any]) -> bool:
    """Whether the model answers a prompt: one that does not end as its template, or images that are
    laid out otherwise, it may refuse in words of its own."""
    try:
        with untouched(backbone):
            backbone.model.generate(**inputs, max_new_tokens=1, do_sample=False, num_beams=1)
    except Exception:
        return False
    return True


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
    return made if _takes(backbone, made) else None
