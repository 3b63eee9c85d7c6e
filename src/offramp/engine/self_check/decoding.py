"""Whether exits leave a model's decoding as it is: part 3 of the self-check.

About ten tokens that the model's own `generate` chose are forced on the loop here, with tokens
exiting by a plan, catching up, and a row that ends. Every logit of a token that went to full depth
must be the model's own: a key, a value, a position or a state in the wrong place shows there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offramp.data.example import Example
from offramp.engine.exit_check import ExitDecider
from offramp.engine.generate import decode_steps
from offramp.engine.model_runner import ModelRunner
from offramp.engine.policy import ExitPolicy
from offramp.engine.prefill import Prepared, prepare
from offramp.engine.sampling import SequenceState
from offramp.engine.speculative import speculate
from offramp.errors import OfframpError, UnsupportedBackboneError
from offramp.models.backbone import Backbone
from offramp.models.discovery.probe import special_ids
from offramp.models.exits import Exits, ExitSet, propose_depths
from offramp.models.input_processor import InputProcessor
from offramp.models.quantized.weights import scheme

TOKENS = 10
_PLAN = (0, 1, 2, 0, 1, 0, 1, 1, 2, 0)
"""Which exit each token takes, the first or the second; 0: none. Later tokens catch up."""
_WIDE = {torch.float32: 2e-3, torch.float64: 2e-3}
"""Largest difference of logits allowed, relative to the largest: kernels over one token and over
several round differently, and wild weights blow it up. `_HALF` in half precision, in which kernels
over quantised weights may compute as well."""
_HALF = 8e-2

Outcome = float | str
"""The largest difference of logits, relative to the largest; or why there is none, in words."""


@dataclass(frozen=True)
class DecodeCheck:
    """What part 3 found.

    plain: without exits. exits: tokens exit and catch up, a row ends. first_token: as well, and
    the first token exits out of the prompt. lossless: drafts are verified and taken back.
    allowed: the largest difference that is rounding.
    """

    plain: Outcome
    exits: Outcome
    first_token: Outcome
    lossless: Outcome
    allowed: float

    def holds(self, outcome: Outcome) -> bool:
        """Whether the model's own logits came out, up to rounding."""
        return isinstance(outcome, float) and outcome <= self.allowed


class _Planned(ExitDecider):
    """Lets tokens exit by a plan, whatever the score says.

    says: in a draft, what the exit is to say [B], by the drafts before it in the round.
    """

    plan: tuple[int, ...]
    says: Callable[[int], Tensor | None] | None = None
    token = -1
    drafted = 0

    def begin(self, unfinished: Tensor, constrain: Any, *, check: bool, **token: Tensor) -> None:
        self.token += 1
        super().begin(unfinished, constrain, check=check, **token)

    def decide(
        self, depth: int, state: Tensor, entry: Tensor, previous: Tensor | None, candidates: Tensor
    ) -> bool:
        exit_number = tuple(self.thresholds).index(depth) + 1
        if self.plan[self.token % len(self.plan)] != exit_number:
            return False
        check = self.scorer(depth, state, entry, previous, None, **self._token)
        said = None if self.says is None else self.says(self.drafted)
        self.drafted += 1
        if said is not None and len(said) == len(state):
            wanted = torch.nn.functional.one_hot(said, check.logits.shape[1])
            check.logits = check.logits + 1e4 * wanted.to(check.logits)
        self._exit(candidates, check)
        self._open = self._open & ~candidates
        return not bool(self._open.any())


class _Forced(SequenceState):
    """Tokens so far, each of them given; the logits that it was to choose from are kept."""

    def __init__(self, prepared: Prepared, answer: Tensor) -> None:
        super().__init__(prepared)
        self.answer = answer
        self.seen: list[Tensor] = []

    def choose(self, logits: Tensor) -> Tensor:
        self.seen.append(logits)
        return self.answer[:, len(self.seen) - 1]


class _Case:
    """A model, a prompt, and what the model's own `generate` makes of it."""

    def __init__(
        self, backbone: Backbone, inputs: Mapping[str, Any], depths: Sequence[int]
    ) -> None:
        self.backbone, self.depths = backbone, tuple(depths)
        self.inputs = _several(backbone.model, inputs)
        self.options: dict[str, Any] = {
            "do_sample": False,
            "num_beams": 1,
            "use_cache": True,
            "max_new_tokens": TOKENS,
            # To read an id that marks an image wants an image.
            "suppress_tokens": special_ids(backbone.model),
            "forced_eos_token_id": None,
        }
        made = backbone.model.generate(
            **self.inputs,
            **self.options,
            min_new_tokens=TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
        )
        self.tokens: Tensor = made.sequences[:, -len(made.logits) :]
        self.logits: list[Tensor] = list(made.logits)
        self.exits = Exits(backbone, depths).requires_grad_(False)

    def runner(self, plan: tuple[int, ...] | None) -> ModelRunner:
        """A runner whose tokens exit by `plan`; None: the full model."""
        if plan is None:
            return ModelRunner(self.backbone)
        exits = ExitSet.of(self.exits)
        decider = _Planned(self.backbone, exits, ExitPolicy(dict.fromkeys(self.depths, 0.5)))
        decider.plan = plan
        return ModelRunner(self.backbone, exits, decider)

    def forced(self, plan: tuple[int, ...] | None, *, first: bool = False) -> float:
        """The largest difference of logits at full depth, tokens exiting by `plan`.

        first: whether the first token may exit out of the prompt.
        """
        end = _end_of_a_row(self.tokens) if _takes_end(self.backbone.model) else None
        ends: dict[str, Any] = {"min_new_tokens": TOKENS}
        if end is not None:
            ends = {"eos_token_id": end, "pad_token_id": 0}
        run = self.runner(plan)
        prepared = prepare(run.intercepted.model, self.inputs, **self.options, **ends)
        state = _Forced(prepared, self.tokens)
        run.adopt(prepared.cache)
        try:
            decode_steps(run, state, prepared, first_exits=first or self._encoded)
        finally:
            run.release()
        worst = 0.0
        for ours, theirs, (live, depth, _) in zip(
            state.seen, self.logits, state.trace, strict=False
        ):
            rows = live & (depth == self.backbone.depth)
            worst = max(worst, _apart(ours[rows], theirs[rows]))
        return worst

    @property
    def _encoded(self) -> bool:
        return self.backbone.is_encoder_decoder

    def drafted(self) -> float:
        """0 where lossless decoding wrote the model's tokens; else how far the token that it wrote
        was from the largest logit, relative to it."""
        run = self.runner((1,))
        prepared = prepare(
            run.intercepted.model, self.inputs, **self.options, min_new_tokens=TOKENS
        )
        state = SequenceState(prepared)
        run.adopt(prepared.cache)
        assert isinstance(run.decider, _Planned)
        run.decider.says = _half_right(state, self.tokens, run.decider)
        try:
            speculate(run, state, prepared, 3)
        finally:
            run.release()
        return self._astray(state.ids[:, -self.tokens.shape[1] :])

    def _astray(self, written: Tensor) -> float:
        worst = 0.0
        for row in range(len(written)):
            wrong = (written[row] != self.tokens[row]).nonzero()
            if len(wrong):  # past the first, the text is another
                step = int(wrong[0])
                values = self.logits[step][row].double()
                gap = values.max() - values[written[row, step]]
                worst = max(worst, float(gap / values[values > -1e30].abs().max()))
        return worst


def _half_right(
    state: SequenceState, tokens: Tensor, decider: _Planned
) -> Callable[[int], Tensor | None]:
    """Drafts that are the model's own token at every second place, so that some are kept."""
    start, reached = state.ids.shape[1], [0]

    def says(drafted: int) -> Tensor | None:
        written = state.ids.shape[1] - start
        if written != reached[0]:  # a new round
            reached[0], decider.drafted, drafted = written, 0, 0
        place = written + drafted
        return tokens[:, place] if drafted % 2 == 0 and place < tokens.shape[1] else None

    return says


@torch.inference_mode()
def check_decoding(
    backbone: Backbone, inputs: Mapping[str, Any], *, depths: Sequence[int] | None = None
) -> DecodeCheck:
    """Hold the loop to the model's own `generate` on `inputs`, one prompt or several.

    depths: of one or two exits, copies of the next layers; a quarter and three quarters of the
    decoder when left out.
    """
    if depths is None:
        depths = propose_depths(backbone.depth, min(2, backbone.depth - 1))
    case = _Case(backbone, inputs, depths)

    def tried(run: Callable[[], float]) -> Outcome:
        try:
            return run()
        except OfframpError as error:
            return f"refused: {error.problem}"
        except Exception as error:  # a model's own, from a state that it was not made for
            return f"{type(error).__name__}: {str(error)[:160]}"

    first = (1, *_PLAN[1:])
    return DecodeCheck(
        plain=tried(lambda: case.forced(None)),
        exits=tried(lambda: case.forced(_PLAN)),
        first_token=tried(lambda: case.forced(first, first=True)),
        lossless=tried(case.drafted),
        allowed=_HALF if scheme(backbone.layers) else _WIDE.get(backbone.dtype, _HALF),
    )


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


def _end_of_a_row(tokens: Tensor) -> int | None:
    """A token that ends one row of [B, N] past its middle and no other before; None without one."""
    for step in range(tokens.shape[1] // 2, tokens.shape[1] - 2):
        for row in tokens if len(tokens) > 1 else ():
            if (
                not (tokens[:, :step] == row[step]).any()
                and (tokens[:, step] == row[step]).sum() == 1
            ):
                return int(row[step])
    return None


def _takes_end(model: Any) -> bool:
    """Whether `generate` leaves the end token to the caller; BLIP's sets its own."""
    return type(model).__name__ != "BlipForConditionalGeneration"


def _apart(ours: Tensor, theirs: Tensor) -> float:
    if not ours.numel():
        return 0.0
    a, b = ours.double(), theirs.to(ours.device).double()
    sayable = b > -1e30  # tokens that are never said stand at the lowest number
    largest = float(b[sayable].abs().max())
    difference = float((a - b)[sayable].abs().max())
    return float("inf") if difference != difference else difference / max(largest, 1e-30)


def adopt_findings(backbone: Backbone, check: DecodeCheck) -> None:
    """Let the backbone do what held, and refuse what did not.

    Raises:
        UnsupportedBackboneError: decoding without exits, or with them, is not the model's own.
    """
    for name, outcome in (("without exits", check.plain), ("with exits", check.exits)):
        if not check.holds(outcome):
            how = f"off by {outcome:.1e}" if isinstance(outcome, float) else outcome
            raise UnsupportedBackboneError(
                f"Self-check, part 3: decoding {name} is not {type(backbone.model).__name__}'s "
                f"own ({how}).",
                "This model cannot be decoded with exits; please report its model_type.",
            )
    backbone.learn(
        causal_prompt=check.holds(check.first_token), lossless=check.holds(check.lossless)
    )


def check_untested(backbone: Backbone, processor: Any, examples: Sequence[Example]) -> None:
    """Check a backbone without tests of its own on `examples`, and take over what holds; see
    `adopt_findings`.
    """
    if not backbone.tested and examples:
        prompts = InputProcessor(backbone, processor).prompts(examples)
        adopt_findings(backbone, check_decoding(backbone, prompts))
