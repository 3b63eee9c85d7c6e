"""Generation: the full model, early exits and lossless drafts, one row or many.

Hugging Face's own `generate` prepares everything (cache, logits processors, stopping criteria); the
one decoder (`offramp.core.decoding`) decodes. Without exits it *is* the full model: the baseline
runs through the same loop as the method.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from offramp.core.decoding.decoder import Decoder
from offramp.core.decoding.plan import Plan
from offramp.core.decoding.policy import FULL, ExitPolicy, GenerationOutput
from offramp.core.decoding.reader import PrefillBackend
from offramp.core.decoding.rule import ExitRule
from offramp.core.decoding.scheduler import AT_ONCE, Schedule
from offramp.core.decoding.sequence import NAN, Token
from offramp.core.engine.plan import plan_of
from offramp.core.engine.read_again import (
    DEEP,
    TRIAL,
    Case,
    Kept,
    Withheld,
    by_model,
    difference,
    has_own_loop,
    own_model,
    shape_of,
    tell,
)
from offramp.core.engine.sampler import Noise, Observer, Sampler, SeededNoise, StopTogether
from offramp.core.errors import InputError
from offramp.core.executors.choice import EXECUTORS
from offramp.core.executors.kv_cache import cache_name
from offramp.core.executors.prefill import Prepared, check_options, within
from offramp.core.executors.prompt import PromptMemory, PromptReader
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet
from offramp.core.models.intercept import ImageMemory
from offramp.core.models.readings import OWN

Planned = Callable[[], Plan]
"""Returns the plan that answers are written by, made anew where what it was made of has changed."""


def generate(
    backbone: Backbone | nn.Module,
    inputs: Mapping[str, Any],
    *,
    exits: ExitSet | Exits | None = None,
    policy: ExitPolicy = FULL,
    planned: Planned | None = None,
    vision_cache: ImageMemory | None = None,
    prefix_cache: PromptMemory | None = None,
    streamer: Any = None,
    seed: int | None = None,
    observer: Observer | None = None,
    **options: Any,
) -> GenerationOutput:
    """Generate with early exits; without `exits` or thresholds, with the full model.

    backbone: a `Backbone`, or a Hugging Face model. inputs: what the HF processor returned.
    planned: in place of `exits` and `policy`, the plan that an adapter keeps.
    vision_cache: image features kept between calls, for several questions on an image.
    prefix_cache: keys and values of prompts kept between calls, for the next turn of a dialogue.
    streamer: HF's; where it has a method `step`, that gets each token with its depth and score.
    seed: where tokens are sampled; row r draws by seed + r, the same tokens in every engine. None:
    PyTorch's own generator goes on, as with HF.
    observer: is told the row, the place in the answer and the processed logits [1, V] that each
    token is chosen from.
    options: HF's own (max_new_tokens, do_sample, temperature, top_k, top_p, logits_processor,
    stopping_criteria, stop_strings with tokenizer or processor, generation_config, ...). Raise
    `InputError` for those not supported: beam search, assisted and contrastive decoding, static or
    quantised caches.
    """
    whole = Backbone.of(backbone)
    if planned is None:
        whole.version()
        planned = partial(plan_of, whole, exits, policy)
    plan = planned()
    with plan.reading(vision_cache=vision_cache, prefix_cache=prefix_cache) as reader:
        again = partial(reader.prepare, inputs, options)
        held, model = reader.backbone, own_model(reader.backbone)
        case = Case(held, inputs, again, lambda use: within(model, inputs, use, **options))
        answer = _Answer(plan, reader, case, streamer, seed, observer)
        _, handed_out = reader.within(inputs, options, answer.write)
        return answer.settled(handed_out)


def generate_prepared(
    backbone: Backbone,
    prepared: Prepared,
    planned: Planned,
    *,
    prefix_cache: PromptMemory | None = None,
    streamer: Any = None,
) -> GenerationOutput:
    """Decode what Hugging Face's `generate` has prepared, as its `custom_generate` is asked to.

    prepared: of the backbone's model or, as in BLIP-2, of the language model in it.

    Raises:
        InputError: it is of another model, or asks for what the loop does not do.
    """
    check_options(lambda name: getattr(prepared.config, name, None))
    path = next((n for n, m in backbone.model.named_modules() if m is prepared.model), None)
    if path is None:
        raise InputError(
            f"The exits are attached to {backbone.name}, and another model was asked to generate.",
            "Attach them to that model: offramp.attach(model, exits).",
        )
    plan = planned()
    reader = plan.reader(prefix_cache=prefix_cache)
    inner = reader.intercepted.model.get_submodule(path)
    name, empty = cache_name(prepared.arguments), copy.deepcopy(prepared.cache)

    def again(model: Any) -> Prepared:
        arguments = {**prepared.arguments, name: copy.deepcopy(empty)}
        return replace(prepared, model=model, arguments=arguments)

    def own(use: Callable[[Prepared], Any]) -> tuple[Any, Any]:
        made = use(again(prepared.model))
        return made, getattr(made, "sequences", None)

    given = {"input_ids": prepared.ids, **prepared.arguments, name: None}
    answer = _Answer(plan, reader, Case(backbone, given, partial(again, inner), own), streamer)
    return answer.settled(getattr(answer.write(again(inner)), "sequences", None))


def way(plan: Plan) -> Any:
    """Return a key for how a plan writes answers; the first answers of each are read again."""
    return plan.depths, plan.own_rule.early, plan.own_rule.uses_exits


class _Answer:
    """A request's answer, which the model reads again where that is due (`read_again`); one that is
    not the model's own is written again: by its own stack, or by its own forward pass."""

    def __init__(
        self, plan: Plan, reader: PromptReader, case: Case, streamer: Any = None, *rules: Any
    ) -> None:
        """rules: seed and observer, as of `generate`."""
        self._plan, self._case, self._rules = plan, case, rules
        self._readings = case.backbone.readings
        self._run = partial(_write, plan, reader)
        self._shape = shape_of(case.backbone, case.given, way(plan))
        self._streamer, self._noise, self._why = streamer, torch.get_rng_state(), ""
        self._made: GenerationOutput | None = None

    def settled(self, handed_out: Any) -> GenerationOutput:
        """Return the answer as it stands. handed_out: what the model's `generate` makes of it."""
        made = self._made
        if made is not None:
            if isinstance(handed_out, Tensor) and torch.equal(handed_out, made.sequences):
                return made
            self._why, self._streamer = "its own `generate` hands out other tokens", None
            torch.set_rng_state(self._noise)
        if self._why and self._readings.fail(self._shape, self._why):
            tell(self._case.backbone, self._why)
        return by_model(self._case, self._streamer, *self._rules)

    def write(self, prepared: Prepared) -> Any:
        """Return an answer that was read again where that was due; where none was right, what the
        request came with: the model is to write it."""
        self._made = self._attempt(prepared)
        return self._made or prepared

    def _attempt(self, prepared: Prepared) -> GenerationOutput | None:
        plan, case, readings, shape = self._plan, self._case, self._readings, self._shape
        backbone, share = case.backbone, case.backbone.decoding.again
        exact, run = not plan.own_rule.early, self._run
        streamer, rules, verdict = self._streamer, self._rules, readings.verdicts.get(shape)
        if verdict == OWN:
            return None
        first = verdict is None and (share is not None or not plan.tested)
        due = first or bool(share and readings.due(share))
        if plan.tested and not due:
            return run(prepared, streamer, *rules, engine=verdict)
        told = Withheld(streamer) if first and streamer is not None else streamer
        engines = [verdict] if verdict else ["stack"] if backbone.engine == "stack" else EXECUTORS
        if first and has_own_loop(prepared.model):
            engines, self._why = [], "it chooses tokens by a loop of its own"
        for engine in engines:
            kept = Kept()
            try:
                made = run(prepared, told, *rules, engine=engine, kept=kept)
                tokens = made.depths.shape[1]
                if not due and not readings.is_longer(shape, tokens):
                    return made
                found = difference(case, made, kept, exact=exact)
                again = not plan.tested or (not kept.logits and tokens > 1)
                if first and found is None and again:
                    # A second time: modules may keep what they were asked before.
                    trial = Kept() if kept.logits else Kept(DEEP, TRIAL)
                    after = torch.get_rng_state()
                    short = run(case.fresh(), None, *rules[:1], engine=engine, kept=trial)
                    found = difference(case, short, trial, exact=exact)
                    torch.set_rng_state(after)
            except InputError:
                raise
            except Exception as error:  # of a model that nobody has tried, as slots may not hold it
                if plan.tested or not first:
                    raise
                found = f"{type(error).__name__}: {str(error)[:200]}"
            if found is None:
                readings.note(shape, engine, tokens)
                backbone.engine = backbone.engine or engine
                if isinstance(told, Withheld):
                    told.hand_on()
                return made
            self._why = found
            if isinstance(told, Withheld):
                told.forget()
            torch.set_rng_state(self._noise)
            prepared = case.fresh()
        if not first:
            self._streamer = None  # it was told already
        return None


def _write(
    plan: Plan,
    reader: PromptReader,
    prepared: Prepared,
    streamer: Any = None,
    seed: int | None = None,
    observer: Observer | None = None,
    *,
    engine: str | None = None,
    kept: Kept | None = None,
) -> GenerationOutput:
    rows = len(prepared.ids)
    own = reader.backbone.has_own_frequencies(max(prepared.lengths))
    sizes: dict[str, Any] = {"slots": rows, "own_frequencies": own}
    if engine is not None and not own:
        sizes["engine"] = engine
    with plan.running(**sizes) as executor:
        decoder = plan.decoder(executor, AT_ONCE if rows == 1 else Schedule.of(rows))
        return write_answers(
            decoder,
            reader,
            prepared,
            plan.own_rule,
            streamer=streamer,
            seed=seed,
            observer=observer,
            kept=kept,
        )


def write_answers(
    decoder: Decoder,
    reader: PrefillBackend,
    prepared: Prepared,
    rule: ExitRule,
    *,
    given: Sequence[Any] | None = None,
    streamer: Any = None,
    seed: int | None = None,
    observer: Observer | None = None,
    kept: Kept | None = None,
) -> GenerationOutput:
    """Read a prompt of one or more rows, and write the answer of each.

    decoder: without sequences. reader: reads the prompts for its executor. rule: of all rows.
    given: inputs of each row by itself, for the reader; None: `prepared`, for all rows. streamer,
    seed, observer: as of `generate`. kept: keeps the logits of the answers.
    """
    rows = len(prepared.ids)
    told = None if streamer is None else _Streamed(prepared.ids, prepared.pad, streamer)
    noise = _noise(rows, seed, prepared)
    together = StopTogether.of(prepared)
    samplers = [
        Sampler(
            prepared,
            row,
            noise=noise[row],
            on_token=None if told is None else partial(told.take, row),
            on_end=None if told is None else partial(told.over, row),
            observer=observer,
            together=together,
        )
        for row in range(rows)
    ]
    if kept is not None:
        for sampler in samplers:
            kept.of(sampler)
    groups: list[tuple[Any, list[Sampler]]] = [(prepared, samplers)]
    if given is not None:
        groups = [(one, [sampler]) for one, sampler in zip(given, samplers, strict=True)]
    sequences = []
    for what, group in groups:
        prompt, firsts = decoder.read(reader, what, group, rule)
        with torch.inference_mode():
            sequences += [
                decoder.join(prompt, row, sampler, rule, said)
                for row, (sampler, said) in enumerate(zip(group, firsts, strict=True))
            ]
        del prompt
    decoder.finish()
    answers = [sequence.tokens for sequence in sequences]
    if together is not None:
        answers = [_cut(together, row, answer) for row, answer in enumerate(answers)]
    if noise[0] is not None:
        noise[0].hand_back(max(map(len, answers)))
    if told is not None:
        told.end()
    return GenerationOutput.of_rows(
        prepared.ids,
        answers,
        decoder.layers,
        [s.rounds for s in sequences],
        prepared.pad,
        [s.offers for s in sequences],
    )


def _cut(together: StopTogether, row: int, answer: Sequence[Token]) -> list[Token]:
    """A row's answer, as long as the others; tokens after its own end get depth 0."""
    length, end = min(len(answer), together.length), together.ended.get(row, len(answer))
    return [
        token if place < end else Token(token.token, 0)
        for place, token in enumerate(answer)
        if place < length
    ]


def _noise(rows: int, seed: int | None, prepared: Prepared) -> Sequence[Noise | None]:
    """Return each row's noise: by `seed` plus its number; without a seed, PyTorch's for all."""
    if not prepared.config.do_sample:
        return [None] * rows
    if seed is None:
        from offramp.core.engine.pytorch_noise import PyTorchNoise

        return [PyTorchNoise(rows, prepared.ids.device)] * rows
    return [SeededNoise(seed + row) for row in range(rows)]


class _Streamed:
    """Hands tokens to a streamer of Hugging Face's, a place at a time, once every row has it or is
    over; those that are get pads."""

    def __init__(self, ids: Tensor, pad: int, streamer: Any) -> None:
        self._rows, self._pad, self._streamer = len(ids), pad, streamer
        self._step = getattr(streamer, "step", None)
        self._waiting: list[list[tuple[int, int, float]]] = [[] for _ in range(self._rows)]
        self._over: set[int] = set()
        streamer.put(ids.cpu())

    def take(self, row: int, place: int, token: int, depth: int, score: float) -> None:
        """Take a row's next token."""
        self._waiting[row].append((token, depth, score))
        self._hand_on()

    def over(self, row: int) -> None:
        """Note that a row has given out its last token."""
        self._over.add(row)
        self._hand_on()

    def end(self) -> None:
        """Note that all rows are over."""
        self._over.update(range(self._rows))
        self._hand_on()
        self._streamer.end()

    def _hand_on(self) -> None:
        rows = [*enumerate(self._waiting)]
        while any(self._waiting) and all(waiting or row in self._over for row, waiting in rows):
            self._tell([w.pop(0) if w else (self._pad, 0, NAN) for w in self._waiting])

    def _tell(self, step: Sequence[tuple[int, int, float]]) -> None:
        tokens, depths, scores = (torch.tensor(column) for column in zip(*step, strict=True))
        self._streamer.put(tokens)
        if self._step is not None:
            self._step(tokens, depths, scores)
