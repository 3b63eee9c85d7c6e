"""Generation: the full model, early exits and lossless drafts, one row or many.

Hugging Face's own `generate` prepares everything (cache, logits processors, stopping criteria); the
one decoder (`offramp.engine.decoding`) decodes. Without exits it *is* the full model: the baseline
runs through the same loop as the method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from offramp.engine.confidence import check_thresholds
from offramp.engine.decoding.decoder import Decoder
from offramp.engine.decoding.executor import Executor
from offramp.engine.decoding.exit_reader import ExitReader
from offramp.engine.decoding.pace import DraftPace
from offramp.engine.decoding.prompt import PromptReader
from offramp.engine.decoding.reader import ReadsPrompts
from offramp.engine.decoding.rule import NO_EXITS, ExitRule
from offramp.engine.decoding.sampler import Noise, Observer, Sampler, Together
from offramp.engine.decoding.scheduler import AT_ONCE, Schedule
from offramp.engine.decoding.sequence import NAN, Token
from offramp.engine.drafter import Drafter
from offramp.engine.executors.choice import executor_for
from offramp.engine.policy import (
    FULL,
    KV_POLICIES,
    ExitPolicy,
    GenerationOutput,
    first_thresholds,
)
from offramp.engine.prefill import Prepared, check_options, prompt_lengths
from offramp.engine.prefix_cache import PrefixCache
from offramp.engine.self_check import prove, prove_prepared
from offramp.errors import InputError
from offramp.models.backbone import Backbone
from offramp.models.exits import Exits, ExitSet
from offramp.models.vision_cache import VisionCache


def generate(
    backbone: Backbone | nn.Module,
    inputs: Mapping[str, Any],
    *,
    exits: ExitSet | Exits | None = None,
    policy: ExitPolicy = FULL,
    vision_cache: VisionCache | None = None,
    prefix_cache: PrefixCache | None = None,
    streamer: Any = None,
    seed: int | None = None,
    observer: Observer | None = None,
    pace: DraftPace | None = None,
    **options: Any,
) -> GenerationOutput:
    """Generate with early exits; without `exits` or thresholds, with the full model.

    backbone: a `Backbone`, or a Hugging Face model. inputs: what the HF processor returned.
    vision_cache: image features kept between calls, for several questions on an image.
    prefix_cache: keys and values of prompts kept between calls, for the next turn of a dialogue.
    streamer: HF's; where it has a method `step`, that gets each token with its depth and score.
    seed: of the noise where tokens are sampled, one generator a row; None: PyTorch's own goes on,
    as with HF.
    observer: is told the row, the place in the answer and the processed logits [1, V] that each
    token is chosen from.
    pace: of lossless answers: where drafts do not pay, as it found in answers before this one, full
    depth runs; None: drafts are made in any case. An adapter has one of its own.
    options: HF's own (max_new_tokens, do_sample, temperature, top_k, top_p, logits_processor,
    stopping_criteria, stop_strings with tokenizer or processor, generation_config, ...). Raise
    `InputError` for those not supported: beam search, assisted and contrastive decoding, static or
    quantised caches.
    """
    backbone = Backbone.of(backbone)
    made = KV_POLICIES[policy.kv] or Generation
    one = made(backbone, exits, policy, pace, vision_cache, prefix_cache)
    prepared = one.reader.prepare(inputs, options)
    prove(backbone, inputs, one.depths)
    return one.write(prepared, streamer, seed, observer)


def generate_prepared(
    backbone: Backbone,
    prepared: Prepared,
    *,
    exits: ExitSet | Exits | None = None,
    policy: ExitPolicy = FULL,
    prefix_cache: PrefixCache | None = None,
    pace: DraftPace | None = None,
) -> GenerationOutput:
    """Decode what Hugging Face's `generate` has prepared, as its `custom_generate` is asked to.

    prepared: of the backbone's model or, as in BLIP-2, of the language model in it.

    Raises:
        InputError: it is of another model, or asks for what the loop does not do.
        UnsupportedBackboneError: a backbone that was not proven, and cannot be on this prompt.
    """
    check_options(lambda name: getattr(prepared.config, name, None))
    path = next((n for n, m in backbone.model.named_modules() if m is prepared.model), None)
    if path is None:
        raise InputError(
            f"The exits are attached to {backbone.name}, and another model was asked to generate.",
            "Attach them to that model: offramp.attach(model, exits).",
        )
    made = KV_POLICIES[policy.kv] or Generation
    one = made(backbone, exits, policy, pace, None, prefix_cache)
    prove_prepared(backbone, prepared, one.depths)
    twin = one.reader.intercepted.model.get_submodule(path)
    return one.write(replace(prepared, model=twin))


class Generation:
    """One call of `generate`: what reads its prompt, and what decodes it.

    A policy of keys and values that is registered (`KV_POLICIES`) brings a class of its own.
    """

    reads: type[PromptReader] = PromptReader
    decodes: type[Decoder] = Decoder

    def __init__(
        self,
        backbone: Backbone,
        exits: ExitSet | Exits | None,
        policy: ExitPolicy,
        pace: DraftPace | None,
        vision_cache: VisionCache | None,
        prefix_cache: PrefixCache | None,
    ) -> None:
        attached = None if exits is None else ExitSet.of(exits)
        self.drafter = Drafter.of(backbone, attached, policy)
        policy = policy.effective
        stand = () if attached is None else attached.depths
        depths = tuple(check_thresholds(dict(policy.thresholds), stand))
        check_thresholds(dict(policy.first), stand)
        check_thresholds(dict(policy.guesses), stand)
        if self.drafter is not None:
            depths = (self.drafter.depth,)
        if policy.lossless and depths:
            backbone.check_lossless()
        self.backbone, self.exits, self.policy, self.depths = backbone, attached, policy, depths
        self.asker = ExitReader(backbone, attached if depths else None, policy, depths)
        self.rule = self.exit_rule()
        self.pace = pace if self.rule.lossless else None
        self.reader = self.prompt_reader(vision_cache, prefix_cache)

    def exit_rule(self) -> ExitRule:
        if self.drafter is not None:
            return self.drafter.rule
        return exit_rule(self.backbone, self.policy, self.asker)

    def prompt_reader(
        self, vision_cache: VisionCache | None, prefix_cache: PrefixCache | None
    ) -> PromptReader:
        return self.reads(
            self.backbone,
            self.exits,
            self.depths,
            vision_cache=vision_cache,
            prefix_cache=prefix_cache,
        )

    def executor(self, rows: int, longest: int) -> Executor:
        """longest: tokens of the longest prompt."""
        return executor_for(
            self.backbone, self.exits, self.depths, slots=rows, longest=longest,
            watches=self.asker.watches, drafter=self.drafter,
        )  # fmt: skip

    def write(
        self,
        prepared: Prepared,
        streamer: Any = None,
        seed: int | None = None,
        observer: Observer | None = None,
    ) -> GenerationOutput:
        rows = len(prepared.ids)
        executor = self.executor(rows, max(prompt_lengths(prepared)))
        schedule = AT_ONCE if rows == 1 or self.asker.follows else Schedule.of(rows)
        decoder = self.decodes(
            self.backbone.depth, executor, self.asker, schedule=schedule, pace=self.pace
        )
        try:
            return write_answers(
                decoder, self.reader, prepared, self.rule,
                streamer=streamer, seed=seed, observer=observer,
            )  # fmt: skip
        finally:
            executor.close()


def exit_rule(backbone: Backbone, policy: ExitPolicy, asker: ExitReader) -> ExitRule:
    """How single answers use the exits. policy: as it takes effect. asker: asks the exits."""
    if not policy.thresholds:
        return NO_EXITS
    # Guesses are taken back, and a score that follows a token wants it settled before the next.
    guessing = backbone.lossless and not asker.follows
    return ExitRule.of(policy, guessing=guessing, first=first_thresholds(backbone, policy))


def write_answers(
    decoder: Decoder,
    reader: ReadsPrompts,
    prepared: Prepared,
    rule: ExitRule,
    *,
    given: Sequence[Any] | None = None,
    streamer: Any = None,
    seed: int | None = None,
    observer: Observer | None = None,
) -> GenerationOutput:
    """Read a prompt of one or more rows, and write the answer of each.

    decoder: without sequences. reader: reads the prompts for its executor. rule: of all rows.
    given: what the reader takes for each row by itself; None: what is prepared, for all.
    streamer, seed, observer: as of `generate`.
    """
    rows = len(prepared.ids)
    pad = getattr(prepared.config, "_pad_token_tensor", None)
    pad = 0 if pad is None else int(pad.flatten()[0])
    told = None if streamer is None else _Streamed(prepared.ids, pad, streamer)
    noise = _noise(rows, seed, prepared)
    together = Together.of(prepared)
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
    own = noise[0]
    if seed is None and own is not None:
        own.hand_back(max(map(len, answers)))
    if told is not None:
        told.end()
    return GenerationOutput.of_rows(
        prepared.ids,
        answers,
        decoder.layers,
        [s.rounds for s in sequences],
        pad,
        sum(s.undrafted for s in sequences),
    )


def _cut(together: Together, row: int, answer: Sequence[Token]) -> list[Token]:
    """A row's answer as long as the others; what came behind its own end counts at no depth."""
    length, end = min(len(answer), together.length), together.ended.get(row, len(answer))
    return [
        token if place < end else Token(token.token, 0)
        for place, token in enumerate(answer)
        if place < length
    ]


def _noise(rows: int, seed: int | None, prepared: Prepared) -> Sequence[Noise | None]:
    """Each row's own by a seed; without one PyTorch's goes on, for all of them together."""
    if not prepared.config.do_sample:
        return [None] * rows
    device = prepared.ids.device
    if seed is None:
        return [Noise.going_on(rows, device)] * rows
    return [Noise.seeded(seed + row, device) for row in range(rows)]


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
        """A row's next token."""
        self._waiting[row].append((token, depth, score))
        self._hand_on()

    def over(self, row: int) -> None:
        """A row has given out its last token."""
        self._over.add(row)
        self._hand_on()

    def end(self) -> None:
        """All rows are over."""
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
