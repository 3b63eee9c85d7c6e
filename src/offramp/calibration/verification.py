"""Whether every way to decode comes to what it should: at full size, on this machine.

Greedy answers are held to something that shares nothing with the decoder: full depth and lossless
to the model's own `generate`, early exit to a pass in which every layer and every exit runs for
every token, one by one. Rows of a batch, and requests in the company of others, are held to the
same answers alone. One prompt is asked at length as well, beyond windows and lengths from which
positions are scaled. A runtime in other numbers than the model's is held to its own full depth.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import GREEDY
from offramp.adapter.certificate import PathResult, Run, VerificationSettings, finite
from offramp.adapter.runtime import Runtime
from offramp.calibration.trust_path import NOTHING
from offramp.common.provenance import provenance
from offramp.core.decoding.policy import (
    FULL,
    ExitPolicy,
    GenerationOutput,
    Thresholds,
    policy_to_json,
)
from offramp.core.decoding.reader import Query
from offramp.core.decoding.rule import ExitVerdict
from offramp.core.decoding.scheduler import Schedule
from offramp.core.engine.sampler import Sampler
from offramp.core.errors import InputError, OfframpError
from offramp.core.executors.kv_cache import add_exit_entries
from offramp.core.executors.prefill import Prefill, prepare
from offramp.core.executors.segments import ExitOutput
from offramp.core.models.backbone import Backbone
from offramp.core.models.discovery.comparison import relative_difference
from offramp.core.models.fingerprint import fingerprint
from offramp.core.models.intercept import InterceptedModel
from offramp.core.models.weights import scheme
from offramp.core.storage import digest_rows
from offramp.data.scenes import language, world
from offramp.features.input_processor import InputProcessor
from offramp.features.quantized.linears import SCHEMES
from offramp.features.self_check import lengthened
from offramp.features.teacher_forcing import StateRecorder
from offramp.inputs.example import Example, examples_digest
from offramp.promises.conditions import Conditions
from offramp.serving.batch_engine import BatchEngine
from offramp.serving.engine_config import EngineConfig
from offramp.serving.host import is_runtime

_LARGEST = 32
"""Logits of a token that are compared: its largest ones."""
OWN, EVERY_LAYER = "the model's own generate", "every layer, every exit"
ALONE, IN_TORCH = "alone", "early exit in PyTorch"
ONE_RUN = "what a run that takes no drafts offers"
_NAN = float("nan")


class _Row(NamedTuple):
    """An answer: N ids and, where they are known, depths and scores."""

    ids: Sequence[int]
    depths: Sequence[int] | None = None
    scores: Sequence[float] | None = None


class _Largest:
    """As `observer`: the largest logits of each place, and which tokens' they are."""

    def __init__(self) -> None:
        self.at: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, row: int, place: int, logits: Tensor) -> None:
        self.at[place] = logits[0].float().topk(min(_LARGEST, logits.shape[1]))


class _Apart:
    """As `observer`: how far logits are from those of another, by place; of a place that is asked
    about again, the last time."""

    def __init__(self, of: _Largest) -> None:
        self._of, self.at = of.at, dict[int, float]()

    def __call__(self, row: int, place: int, logits: Tensor) -> None:
        if place in self._of:
            theirs, ids = self._of[place]
            self.at[place] = relative_difference(logits[0].float()[ids], theirs)


class Verification:
    """The ways to decode with an adapter, compared one after the other; see the module.

    examples: prompts to answer. policy: instead of the adapter's. runtime: decodes in PyTorch's
    place; None: no runtime.
    """

    def __init__(
        self,
        adapter: Adapter,
        encoder: InputProcessor,
        examples: Sequence[Example],
        *,
        policy: ExitPolicy | None = None,
        runtime: Runtime | None = None,
        settings: VerificationSettings | None = None,
    ) -> None:
        """Raise `InputError` where there are no examples, or visual tokens stay behind."""
        if not examples:
            raise InputError("There are no prompts to verify by.", "Give examples.")
        self.settings: VerificationSettings = settings or VerificationSettings()
        self.policy: ExitPolicy = adapter.policy if policy is None else policy
        self.adapter: Adapter = adapter
        self.encoder: InputProcessor = encoder
        self.runtime: Runtime | None = runtime
        self.backbone: Backbone = adapter.backbone
        self.examples: list[Example] = list(examples)
        self._told: Callable[[int], object] = lambda _: None
        self._options = {**GREEDY, "max_new_tokens": self.settings.longest}
        self._policies = _modes(self.policy)
        held_in = scheme(self.backbone.layers)
        self._exact = not held_in and self.backbone.dtype in (torch.float32, torch.float64)
        """Whether rounding is too small to change a token."""
        self._alone_exact = self._exact or held_in in SCHEMES
        """Whether a token's result at least does not depend on the tokens beside it."""

    @property
    def answers(self) -> int:
        """Return the number of answers that are written in all."""
        modes, n = self._policies, len(self._inputs)
        each = 1 + len(modes) + ("early exit" in modes)  # the model's own, and every layer's
        each += 0 if self.runtime is not None else len(modes)
        each += len(modes) * self._keeps_company
        of_rows = sum(-(-len(self.examples) // rows) * rows for rows in self._rows)
        return n * each + len(modes) * of_rows

    @property
    def _rows(self) -> list[int]:
        """Of the batches that are written."""
        most = math.inf if self.runtime is None else self.runtime.rows
        return [rows for rows in self.settings.rows if rows <= most]

    @property
    def _keeps_company(self) -> bool:
        return self.runtime is None or is_runtime(self.runtime)

    def run(self, told: Callable[[int], object] = lambda _: None) -> list[PathResult]:
        """Return the result of each path. told: is called with the number of further answers."""
        self._told = told
        noted = self._notes()
        own = self._each(partial(self._own, noted))
        alone = {m: self._each(partial(self._write, p)) for m, p in self._policies.items()}
        if self.runtime is not None:
            results = self._of_runtime(self.runtime, alone, own)
        else:
            results = [self._single(m, p, alone, own, noted) for m, p in self._policies.items()]
        # A runtime's sequences have cells of their own, and what they share changes no bit.
        exact = self._exact or self.backbone.decoding.exact_batches is not None
        promised = exact or self.runtime is not None
        for rows in self._rows:
            for mode, policy in self._policies.items():
                made = _tried(partial(self._batched, rows, policy))
                theirs = alone[mode]
                if isinstance(made, list) and isinstance(theirs, list):
                    theirs = [theirs[i % len(self.examples)] for i in range(len(made))]
                results.append(_compared(f"{mode}, {rows} rows", ALONE, promised, made, theirs))
        if not self._keeps_company:
            return results
        together = _tried(self._in_company)
        for mode, theirs in alone.items():
            made = together if isinstance(together, _Refused) else together[mode]
            name = f"{mode}, among {self._slots}"
            results.append(_compared(name, ALONE, promised, made, theirs))
        return results

    def _single(
        self,
        mode: str,
        policy: ExitPolicy,
        alone: Mapping[str, Any],
        own: Any,
        noted: Sequence[_Largest],
    ) -> PathResult:
        """Single answers in a mode. own, noted: the model's own answers and their logits."""
        # Several tokens of one call, as drafts are, get what each gets alone.
        against, theirs, promised = OWN, own, self._alone_exact
        if mode == "early exit" and policy.trust is not None:
            against, promised = ONE_RUN, self._exact
            theirs = self._each(partial(self._offered, policy))
        elif mode == "early exit":
            noted = self._notes()
            against, promised = EVERY_LAYER, self._exact
            theirs = alone[mode]
            if isinstance(theirs, list):
                theirs = self._each(partial(self._forced, policy, theirs, noted))
        apart = self._each(partial(self._off, policy, noted))
        return _compared(mode, against, promised, alone[mode], theirs, apart)

    def _of_runtime(self, runtime: Runtime, made: Mapping[str, Any], own: Any) -> list[PathResult]:
        """Single answers of what decodes in PyTorch's place: lossless to its own,
        which are the model's as far as its numbers are."""
        same = self._exact and "graphs" in runtime.name
        results = []
        for mode, policy in self._policies.items():
            against, theirs, promised = OWN, own, same
            if mode == "early exit":
                against, theirs = IN_TORCH, self._each(partial(self._in_torch, policy))
            elif mode != "full":
                mine = "full" if mode == "lossless" else "early exit"
                against, theirs, promised = f"its own {mine}", made[mine], True
                theirs = _without_depths(theirs) if mode == "lossless" else theirs
            results.append(_compared(mode, against, promised, made[mode], theirs))
        return results

    def certified(
        self, paths: Sequence[PathResult], engine: str, exits: str, command: Sequence[str]
    ) -> Run:
        """Return the results of `run` as a certificate's entry.

        engine: by the name of the command line. exits: SHA-256 of their file. command: the command
        line.
        """
        backbone = self.backbone
        if self.runtime is not None:
            engine = self.runtime.name
        else:
            engine = f"{engine} ({backbone.engine or 'slots'})"
        return Run(
            engine=engine,
            quantized=scheme(backbone.layers) or "",
            dtype=str(backbone.dtype).removeprefix("torch."),
            device=backbone.device.type,
            exits=exits,
            backbone=digest_rows([fingerprint(backbone)]),
            policy=digest_rows([policy_to_json(self.policy)]),
            thresholds=_decides(self.policy),
            prompts=len(self.examples),
            longest=self.settings.longest,
            paths=paths,
            provenance=provenance(None, command, examples_digest(self.examples)),
        )

    # -- answers -------------------------------------------------------------------------------

    @cached_property
    def _inputs(self) -> list[Mapping[str, Any]]:
        """What the model is given: each prompt, and the first lengthened."""
        inputs: list[Mapping[str, Any]] = [self.encoder.prompts([each]) for each in self.examples]
        context = getattr(self.runtime, "context", None)
        long = lengthened(self.backbone, inputs[0], self.settings.longest, context)
        return inputs if long is None else [*inputs, long]

    def _notes(self) -> list[_Largest]:
        return [_Largest() for _ in self._inputs]

    def _each(self, answer: Callable[[int], Any]) -> Any:
        """An answer to each prompt, or why there is none. answer: of the prompt at a place."""

        def one(place: int) -> Any:
            made = answer(place)
            self._told(1)
            return made

        return _tried(lambda: [one(place) for place in range(len(self._inputs))])

    def _own(self, noted: Sequence[_Largest], place: int) -> _Row:
        """The model's own answer."""
        with torch.inference_mode():
            made = self.backbone.model.generate(
                **self._inputs[place],
                **self._options,
                output_scores=True,
                return_dict_in_generate=True,
            )
        for at, logits in enumerate(made.scores):
            noted[place](0, at, logits)
        return _Row(made.sequences[0, -len(made.scores) :].tolist())

    def _write(self, policy: ExitPolicy, place: int, **more: Any) -> _Row:
        return _row(self._generate(self._inputs[place], policy, **more))

    def _off(self, policy: ExitPolicy, noted: Sequence[_Largest], place: int) -> dict[int, float]:
        """How far the logits of the same answer are from those that were noted, by place."""
        apart = _Apart(noted[place])
        self._write(policy, place, observer=apart)
        return apart.at

    def _generate(
        self, inputs: Mapping[str, Any], policy: ExitPolicy, **more: Any
    ) -> GenerationOutput:
        model: Any = self.adapter if self.runtime is None else self.runtime
        made: GenerationOutput = model.generate(inputs, policy=policy, **self._options, **more)
        return made

    def _offered(self, policy: ExitPolicy, place: int) -> _Row:
        """What a policy's trust takes of a run in which every draft is verified."""
        made = self._generate(self._inputs[place], replace(policy, trust=NOTHING))
        assert policy.trust is not None
        offered = (ids for product, ids in made.offers[0] if product >= policy.trust)
        return _Row(next(offered, _row(made).ids))

    def _in_torch(self, policy: ExitPolicy, place: int) -> _Row:
        return _row(self.adapter.generate(self._inputs[place], policy=policy, **self._options))

    def _batched(self, rows: int, policy: ExitPolicy) -> list[_Row]:
        """Answers in batches of so many rows; the first prompts fill up the last batch."""
        n, made = len(self.examples), list[_Row]()
        for start in range(0, n, rows):
            chunk = [self.examples[(start + i) % n] for i in range(rows)]
            output = self._generate(self.encoder.prompts(chunk), policy)
            made += [_row(output, row) for row in range(rows)]
            self._told(rows)
        return made

    def _in_company(self) -> dict[str, list[_Row]]:
        """The answers again, of all modes at once, by requests to one engine."""
        slots, longest = self._slots, self.settings.longest
        ids = [one["input_ids"].shape[1] for one in self._inputs if "input_ids" in one]
        limit = max([1024, *(n + longest + 1 for n in ids)])
        if self.runtime is not None and is_runtime(self.runtime):
            limit = self.runtime.context
        config = EngineConfig(slots, limit, schedule=Schedule.of(slots))
        modes = self._policies
        policy = modes.get("early exit", modes.get("lossless", FULL))
        adapter = replace(self.adapter, policy=policy, calibration=None)
        names = {"full": "full", "early exit": "early_exit", "lossless": "lossless"}
        model: Any = adapter
        if self.runtime is not None:
            model = copy.copy(self.runtime)
            model.adapter = adapter
        with BatchEngine(model, config=config) as engine:
            asked = [
                (mode, engine.submit(given, mode=names[mode], wait=True, **self._options))
                for given in self._inputs
                for mode in modes
            ]
            made: dict[str, list[_Row]] = {mode: [] for mode in modes}
            for mode, handle in asked:
                made[mode].append(_row(handle.result().output))
                self._told(1)
        return made

    @property
    def _slots(self) -> int:
        """Requests in company: as many as a runtime has sequences, where one runs."""
        return self.settings.slots if self.runtime is None else self.runtime.rows

    @torch.inference_mode()
    def _forced(
        self, policy: ExitPolicy, answers: Sequence[_Row], noted: Sequence[_Largest], place: int
    ) -> _Row:
        """What exits and the full model say after each prefix of an answer, where every layer and
        every exit runs for every token, one by one."""
        backbone, exits, ids = self.backbone, self.adapter.exits, answers[place].ids
        depths = tuple(policy.thresholds)
        entered = {depth - k for depth in depths for k in (0, 1)}  # "saturation" reads both
        recorder = StateRecorder(backbone, entered, exits, depths)
        intercepted = InterceptedModel(backbone, recorder)
        prepared = prepare(intercepted.model, self._inputs[place], **self._options)
        add_exit_entries(prepared.cache, exits.entries, backbone.depth)
        prefill = Prefill(intercepted, prepared)
        sampler = Sampler(prepared, 0, observer=noted[place])
        plan = self.adapter.plan(policy)
        heads, later = plan.heads, plan.rule()
        words: list[tuple[int, int, float]] = []
        for at in range(len(ids)):
            if at:
                fed = torch.tensor([[ids[at - 1]]], device=prepared.ids.device)
                intercepted.stack(input_ids=fed, **prefill.extend(1))
            entries, states, final = recorder.take()
            rule = later if at else later.opening
            query = Query(sampler, rule, list(ids[:at]))
            said, score = None, _NAN
            for depth in (depth for depth in depths if depth in rule.thresholds):
                parts = (entries[depth], states[depth], entries[depth - 1])
                output = ExitOutput(*(backbone.here(part[0, -1:]) for part in parts))
                [verdict] = heads.verdicts(depth, output, [query])
                if not isinstance(verdict, ExitVerdict):
                    assert verdict is not None
                    raise verdict
                score = verdict.score
                if rule.exits(depth, verdict):
                    said = verdict.token, depth, score
                    break
            if said is None:
                word = heads.words(backbone.final_norm(final[:1, -1]))
                said = word(0, query), backbone.depth, score
            words.append(said)
        return _Row(*zip(*words, strict=True))


_PROMPTS = (
    "Caption:",
    "What is shown?",
    "Question: how many things are there, and which of them is the largest? Answer:",
    "Describe the image.",
)


def own_examples(adapter: Adapter, n: int) -> list[Example]:
    """Return examples to verify on, where the user gives none: different drawn pictures, under the
    prompts of the calibration or else prompts of several lengths; texts for a language model."""
    frames = Conditions.of_calibration(adapter.calibration).get("prompts") or ()
    prompts = [" what is there ".join(frame) if len(frame) > 1 else frame[0] for frame in frames]
    prompts = [prompt for prompt in prompts if prompt.strip()] or list(_PROMPTS)
    if adapter.backbone.text_only:
        texts = [language.caption(world.scene("test", i)) for i in range(n)]
        return [Example.of_text(f"Go on: {text}", key=f"text-{i}") for i, text in enumerate(texts)]
    return [
        Example(
            world.render(world.scene("test", i)), prompts[i % len(prompts)], (), key=f"drawn-{i}"
        )
        for i in range(n)
    ]


def with_thresholds(
    policy: ExitPolicy, adapter: Adapter, encoder: InputProcessor, examples: Sequence[Example]
) -> ExitPolicy:
    """Return a policy with thresholds. A policy without any gets one between the middle scores of a
    few prompts, so that some tokens exit; unchanged where exits have no tensors."""
    decides = policy.thresholds or policy.trust is not None
    if decides or not list(adapter.exits.modules.parameters()):
        return policy
    looked = replace(policy, thresholds=Thresholds.shared(adapter.exits.depths, 1.0))
    seen: list[Tensor] = []
    for example in examples[:4]:
        inputs = encoder.prompts([example])
        made = adapter.generate(inputs, policy=looked, max_new_tokens=10, **GREEDY)
        seen.append(made.scores[made.scores.isfinite()])
    between = _between(torch.cat(seen))
    return replace(policy, thresholds=Thresholds.shared(adapter.exits.depths, between))


def _between(scores: Tensor) -> float:
    """Return the middle of the widest gap in the middle half of scores [N]: a threshold that is a
    score itself would be reached or not by rounding."""
    if len(scores) < 2:
        return 1.0
    ordered, cut = scores.double().sort().values, len(scores) // 4
    middle = ordered[cut : len(ordered) - cut]
    at = int(middle.diff().argmax())
    return float(middle[at : at + 2].mean())


def _modes(policy: ExitPolicy) -> dict[str, ExitPolicy]:
    """The policy of each mode that an adapter has."""
    modes = {"full": FULL}
    if policy.thresholds or policy.trust is not None:
        modes["early exit"] = replace(policy, lossless=False)
    if modes.keys() - {"full"} or policy.drafter:
        modes["lossless"] = replace(policy, lossless=True)
    return modes


def _decides(policy: ExitPolicy) -> str:
    """The policy's thresholds, or its trust, in words."""
    by, level = policy.decides
    return f"by trust, {level}" if by == "trust" else level


def _without_depths(answers: Any) -> Any:
    """Answers whose depths are not to be compared."""
    return answers if isinstance(answers, _Refused) else [_Row(row.ids) for row in answers]


def _row(output: GenerationOutput, row: int = 0) -> _Row:
    """An answer of a generation, without its padding."""
    live = output.depths[row] > 0
    values = (output.new_tokens[row], output.depths[row], output.scores[row])
    return _Row(*(value[live].tolist() for value in values))


@dataclass(frozen=True)
class _Refused:
    """Why there is no answer. clean: in words that were meant for it."""

    why: str
    clean: bool


def _tried(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except OfframpError as error:
        return _Refused(error.problem, clean=True)
    except (MemoryError, torch.OutOfMemoryError) as error:
        return _Refused(f"not enough memory ({type(error).__name__})", clean=True)
    except Exception as error:  # whatever a model raises where it is not driven as it must be
        return _Refused(f"{type(error).__name__}: {str(error)[:200]}", clean=False)


def _compared(
    path: str, against: str, promised: bool, ours: Any, theirs: Any, apart: Any = None
) -> PathResult:
    """Answers and what they are held to. apart: differences of their logits, by place; None: not
    compared."""
    for side in (ours, theirs, apart):
        if isinstance(side, _Refused):
            return PathResult(path, against, promised, refused=side.why, declined=side.clean)
    pairs = list(zip(ours, theirs, strict=True))
    wrong = [_differing(*pair) for pair in pairs]
    logits, scores = list[float](), list[float]()
    for place, ((mine, other), places) in enumerate(zip(pairs, wrong, strict=True)):
        until = min(places, default=len(mine.ids))
        if apart is not None:
            logits += [value for at, value in apart[place].items() if at <= until]
        if mine.scores is not None and other.scores is not None:
            both = zip(mine.scores[:until], other.scores[:until], strict=True)
            scores += [abs(a - b) for a, b in both if a == a or b == b]
    return PathResult(
        path,
        against,
        promised,
        answers=len(pairs),
        answers_differ=sum(map(bool, wrong)),
        tokens=sum(max(len(mine.ids), len(other.ids)) for mine, other in pairs),
        tokens_differ=sum(map(len, wrong)),
        logits_apart=_largest(logits),
        scores_apart=_largest(scores),
    )


def _differing(ours: _Row, theirs: _Row) -> list[int]:
    """Places at which two answers differ, in ids or in depths where both know them."""
    shared = range(min(len(ours.ids), len(theirs.ids)))
    longer = range(len(shared), max(len(ours.ids), len(theirs.ids)))
    depths = None if ours.depths is None else theirs.depths
    different = [
        place
        for place in shared
        if ours.ids[place] != theirs.ids[place]
        or (depths is not None and ours.depths[place] != depths[place])  # type: ignore[index]
    ]
    return [*different, *longer]


def _largest(values: Sequence[float]) -> float | None:
    """The largest, as JSON has it; None of none."""
    return max((finite(math.inf if v != v else v) for v in values), default=None)
