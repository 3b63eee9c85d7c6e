"""The one decode loop. A token that leaves at depth d runs exactly d decoder layers.

Hugging Face's own `generate` prepares everything (processor output, cache, logits processors,
stopping criteria) and then hands over to this loop. Without exits the loop *is* the full model:
the baseline runs through the same code as the method.

Keys and values of the layers that a token skipped are filled by policy:

recompute: the token's state waits at its exit; when a later token must go deeper, the deeper
    layers run once over all that wait and the new token together. Exact: the cache is what the
    full model's would be.
propagate: the state at the exit is projected to the keys and values of every skipped layer at
    once (CALM, Schuster et al. 2022). Approximate; nothing ever waits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from offramp.backbone import Backbone, View
from offramp.errors import InputError, did_you_mean
from offramp.exits import Exits, first
from offramp.scores import SCORES, check_score, check_thresholds

KV_POLICIES = ("recompute", "propagate")


@dataclass(frozen=True)
class Policy:
    """When tokens leave, and what fills the cache behind them.

    thresholds: by depth; a token leaves at the first depth where score >= threshold. A depth that
        is missing is off and costs nothing. Empty: the full model.
    score: a key of `SCORES`, or "discriminator".
    kv: "recompute" (exact) or "propagate".
    exit_in_prefill: also let the first token leave early, the prompt waiting at its exit until a
        later token needs it deeper. Exact too; off where the prompt is not causal.
    """

    thresholds: Mapping[int, float] = field(default_factory=dict)
    score: str = "max_probability"
    kv: str = "recompute"
    exit_in_prefill: bool = False

    def __post_init__(self) -> None:
        check_score(self.score)
        if self.kv not in KV_POLICIES:
            raise InputError(
                f"KV policy {self.kv!r} is not known.", did_you_mean(self.kv, KV_POLICIES)
            )
        object.__setattr__(self, "thresholds", dict(self.thresholds))


FULL = Policy()
"""Every token at full depth."""


@dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    sequences: token ids [B, T], prompt included where HF's `generate` includes it.
    depths: decoder layers run for each new token [B, N]; 0 where a finished row is padded.
    scores: confidence [B, N] at the last exit that looked at the token (with which it left, if it
        left); NaN where none looked.
    layers: depth L of the full model.
    """

    sequences: Tensor
    depths: Tensor
    scores: Tensor
    layers: int

    @property
    def new_tokens(self) -> Tensor:
        """The generated ids [B, N]."""
        return self.sequences[:, self.sequences.shape[1] - self.depths.shape[1] :]

    @property
    def mean_depth(self) -> float:
        """Mean depth over all generated tokens, those at full depth included."""
        ran = self.depths[self.depths > 0]
        return float(ran.float().mean()) if ran.numel() else 0.0


class Judge:
    """Reads an exit's state: logits, score, and whether to leave."""

    def __init__(
        self,
        backbone: Backbone,
        score: str,
        discriminators: nn.ModuleDict | None = None,
    ) -> None:
        if score == "discriminator" and discriminators is None:
            raise InputError(
                "The discriminator score needs the discriminators that were trained with the exits.",
                "Keep discriminator.safetensors in the adapter's folder, or use another score.",
            )
        self._backbone = backbone
        self._score = SCORES.get(score)
        self._discriminators = discriminators

    def __call__(
        self,
        depth: int,
        state: Tensor,
        entry: Tensor,
        constrain: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, V] and score [B] of exit state [B, D], entered with `entry` [B, D].

        The score is confidence in what may be said, so it reads the logits under `constrain`. The
        logits come back as they are: the loop constrains them once, whatever depth they are from.
        """
        normed = self._backbone.finish(state)
        logits = self._backbone.read(normed)
        if self._score is not None:
            return logits, self._score(logits if constrain is None else constrain(logits))
        assert self._discriminators is not None
        judged = self._discriminators[str(depth)](normed.float(), entry.float())
        return logits, judged.sigmoid()


class _KeysStored(Exception):
    """Raised out of a layer once its keys and values are in the cache."""


class Run:
    """The driver of one generation: which layers run for the token at hand, and who waits where."""

    def __init__(
        self,
        backbone: Backbone,
        exits: Exits | None,
        policy: Policy,
        discriminators: nn.ModuleDict | None = None,
    ) -> None:
        depths = exits.depths if exits is not None else ()
        self.thresholds = check_thresholds(dict(policy.thresholds), depths)
        self.backbone = backbone
        self.policy = policy
        self.view = View(backbone, self)
        self.propagate = policy.kv == "propagate"
        self._exits = exits
        self._judge = Judge(backbone, policy.score, discriminators) if self.thresholds else None
        # per generation
        self.cache: Any = None
        self.constrain: Callable[[Tensor], Tensor] | None = None
        self.unfinished: Tensor | None = None
        self._waiting: dict[int, list[tuple[Tensor, Tensor | None]]] = {
            d: [] for d in self.thresholds
        }
        # per stack call
        self._start = 0
        self._chunk: Tensor | None = None
        self._positions: Tensor | None = None
        self._need: int | None = None
        self._left: int | None = None
        # per token
        self._check = True
        self._open: Tensor | None = None
        self.logits: Tensor | None = None
        self.depths: Tensor | None = None
        self.scores: Tensor | None = None

    # -- one token ---------------------------------------------------------------------------

    def begin(self, *, check: bool, rows: int) -> None:
        """A new token for each of `rows` rows; with `check=False` nobody leaves."""
        self._check = check
        self._left = None
        self.logits = None
        device = self.backbone.device
        self.depths = torch.full((rows,), self.backbone.depth, device=device)
        self.scores = torch.full((rows,), float("nan"), device=device)
        self._open = torch.ones(rows, dtype=torch.bool, device=device)
        if self.unfinished is not None:
            self._open &= self.unfinished

    def prompt_stands_at(self, positions: Tensor | None) -> None:
        """The prompt's position ids, known after the prefill, for a prompt that waits at an exit."""
        for depth, waiting in self._waiting.items():
            self._waiting[depth] = [(state, positions) for state, _ in waiting]

    def call(self, **kw: Any) -> Tensor:
        """Run the stack for the new token, catching up those who wait if it must go deeper.

        Returns the last state [B, D], final-normed; meaningless if everybody left.
        """
        self._positions = kw.get("position_ids")
        out = self.view.stack(**kw).last_hidden_state
        while self._need is not None:
            out = self._catch_up(self._need, kw)
        return out[:, -1]  # type: ignore[no-any-return]

    @property
    def everybody_left(self) -> bool:
        return self._left is not None

    def merge(self, logits: Tensor) -> Tensor:
        """Logits [B, V] of the token: full-depth ones, but for the rows that left earlier."""
        if self.logits is None:
            return logits
        assert self._open is not None
        return torch.where(self._open[:, None], logits, self.logits)

    # -- one layer ---------------------------------------------------------------------------

    def layer(
        self, index: int, layer: nn.Module, hidden: Tensor, args: tuple[Any, ...], kw: dict[str, Any]
    ) -> Any:
        """What the stack gets for layer `index`: its output, or the state handed through."""
        if index < self._start:  # a catch-up enters deeper
            return self.backbone.skip(index, hidden, args, kw)
        if self._left is not None or self._need is not None:
            if self.propagate and self._left is not None:
                self._store_keys(index, layer, hidden, args, kw)
            return self.backbone.skip(index, hidden, args, kw)
        if index == self._start and self._chunk is not None:
            hidden = self._chunk
        elif index in self.thresholds and not self._goes_deeper(index, hidden, args, kw):
            if self.propagate:
                self._store_keys(index, layer, hidden, args, kw)
            return self.backbone.skip(index, hidden, args, kw)
        return layer(hidden, *args, **kw)

    def _goes_deeper(
        self, depth: int, hidden: Tensor, args: tuple[Any, ...], kw: dict[str, Any]
    ) -> bool:
        """Run the exit at `depth`; False ends this stack call, all rows having left or waiting."""
        assert self._exits is not None
        state = self._exits.run(depth, hidden, args, kw)
        waiting = self._waiting[depth]
        if self._check and self._leave(depth, state[:, -1], hidden[:, -1]):
            self._left = depth
            if not self.propagate:
                waiting.append((hidden, self._positions))
            return False
        if waiting:
            waiting.append((hidden, self._positions))
            self._need = depth
            return False
        return True

    def _leave(self, depth: int, state: Tensor, entry: Tensor) -> bool:
        """Let confident rows leave at `depth`; True once no unfinished row is left."""
        assert self._judge is not None and self._open is not None
        assert self.depths is not None and self.scores is not None
        logits, score = self._judge(depth, state, entry, self.constrain)
        if len(score) == 1:  # the common case, in one transfer and no masks
            self.scores = score
            if float(score) < self.thresholds[depth]:
                return False
            self.logits = logits
            self.depths = torch.full_like(self.depths, depth)
            self._open = torch.zeros_like(self._open)
            return True
        self.scores = torch.where(self._open, score.to(self.scores), self.scores)
        leaving = self._open & (score >= self.thresholds[depth])
        self.depths = self.depths.masked_fill(leaving, depth)
        self.logits = logits if self.logits is None else torch.where(
            leaving[:, None], logits, self.logits
        )
        self._open = self._open & ~leaving
        return not bool(self._open.any())

    def _catch_up(self, depth: int, kw: dict[str, Any]) -> Tensor:
        """Run the layers from `depth` on over all who wait there, the new token last."""
        waiting, self._waiting[depth] = self._waiting[depth], []
        self._need = None
        self._start = depth
        self._chunk = torch.cat([state for state, _ in waiting], 1)
        positions = [p for _, p in waiting]
        self._positions = None if positions[0] is None else torch.cat(positions, -1)  # type: ignore[arg-type]
        again = {name: v for name, v in kw.items() if name not in ("input_ids", "inputs_embeds")}
        again[_cache_name(kw)] = self._cache_from(depth)
        if self._positions is not None:
            again["position_ids"] = self._positions
        try:
            out = self.view.stack(inputs_embeds=self._chunk, **again).last_hidden_state
        finally:
            self._start, self._chunk = 0, None
        return out  # type: ignore[no-any-return]

    # -- the cache ---------------------------------------------------------------------------

    def adopt(self, cache: Any) -> None:
        """Take the empty KV cache of this generation and add the exits' own entries to it."""
        self.cache = cache
        halves = [cache]
        if hasattr(cache, "cross_attention_cache"):
            halves = [cache.self_attention_cache, cache.cross_attention_cache]
        _check_cache(halves)
        depths = self._exits.depths if self._exits is not None else ()
        if self.thresholds:
            for half in halves:
                half.layers.extend(copy.deepcopy(half.layers[d]) for d in depths)
        if len(halves) == 2:
            cache.is_updated.update({i: False for i in range(len(halves[0].layers))})

    def _cache_from(self, depth: int) -> Any:
        """The same cache entries, with lengths and masks as the layers from `depth` on see them.

        HF asks the first layer (of each attention type) how long the cache is; entries below
        `depth` are ahead of those above, so they are replaced by one of the same type from above.
        """
        from transformers.cache_utils import Cache, EncoderDecoderCache

        own = getattr(self.cache, "self_attention_cache", self.cache)
        layers, end = own.layers, self.backbone.depth

        def kin(index: int) -> Any:
            above = (e for e in layers[depth:end] if type(e) is type(layers[index]))
            return next(above, layers[depth])

        seen = Cache(layers=[kin(i) for i in range(depth)] + layers[depth:])
        if own is self.cache:
            return seen
        both = EncoderDecoderCache(seen, self.cache.cross_attention_cache)
        both.is_updated = self.cache.is_updated
        return both

    def _store_keys(
        self, index: int, layer: nn.Module, hidden: Tensor, args: tuple[Any, ...], kw: dict[str, Any]
    ) -> None:
        """Fill layer `index`'s keys and values (and those of an exit there) from `hidden`."""
        own = getattr(self.cache, "self_attention_cache", self.cache)
        store = own.update

        def store_and_stop(*a: Any, **k: Any) -> None:
            store(*a, **k)
            raise _KeysStored

        own.update = store_and_stop
        try:
            targets = [layer]
            if index in self.thresholds and index != self._left and self._exits is not None:
                targets.append(self._exits.at(index))
            for target in targets:
                try:
                    target(hidden, *args, **kw)
                except _KeysStored:
                    continue
        finally:
            del own.update  # the instance attribute; the method shows again


def _cache_name(kw: Mapping[str, Any]) -> str:
    return "past_key_values" if "past_key_values" in kw else "cache"  # renamed in transformers 5.24


def _check_cache(halves: list[Any]) -> None:
    from transformers.cache_utils import DynamicCache

    for half in halves:
        if not isinstance(half, DynamicCache) or half.offloading or not half.layers:
            raise InputError(
                f"KV cache {type(half).__name__} is not supported with exits.",
                "Leave cache_implementation unset (the dynamic cache).",
            )
        if half.get_seq_length():
            raise InputError(
                "A KV cache from an earlier call was passed in, which lacks the exits' entries.",
                "Pass the whole prompt and no cache.",
            )


# ---------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------


def _loop(run: Run, trace: list[tuple[Tensor, Tensor, Tensor]], streamer: Any) -> Callable[..., Tensor]:
    """The function that HF's `generate` calls once everything is prepared."""

    def decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        # The model's own defaults may ask for what the caller did not.
        _check_options(lambda name: getattr(generation_config, name, None))
        run.constrain = _constraints(logits_processor, lambda: input_ids)
        eos = any(hasattr(c, "eos_token_id") for c in stopping_criteria)
        pad = generation_config._pad_token_tensor
        rows = len(input_ids)
        unfinished = torch.ones(rows, dtype=torch.bool, device=input_ids.device)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        steps = _logits_of_steps(run, model, lambda: input_ids, model_kwargs)
        for logits in steps:
            logits = logits.to(dtype=torch.float32, device=input_ids.device, copy=True)
            scores = logits_processor(input_ids, logits)
            if generation_config.do_sample:
                tokens = torch.multinomial(scores.softmax(-1), 1).squeeze(1)
            else:
                tokens = scores.argmax(-1)
            if eos and rows > 1:
                tokens = torch.where(unfinished, tokens, pad)
            input_ids = torch.cat([input_ids, tokens[:, None]], 1)
            assert run.depths is not None and run.scores is not None
            trace.append((unfinished, run.depths, run.scores))
            if streamer is not None:
                streamer.put(tokens.cpu())
            unfinished = unfinished & ~stopping_criteria(input_ids, None)
            run.unfinished = unfinished
            if not bool(unfinished.any()):
                break
        if streamer is not None:
            streamer.end()
        return input_ids

    return decode


def _logits_of_steps(
    run: Run, model: Any, ids: Callable[[], Tensor], model_kwargs: dict[str, Any]
) -> Iterator[Tensor]:
    """Yield the next-token logits [B, V], step after step, for as long as the caller asks."""
    backbone = run.backbone
    run.adopt(model_kwargs["cache"] if "cache" in model_kwargs else model_kwargs["past_key_values"])
    rows = len(ids())
    check = bool(run.thresholds) and (
        backbone.is_encoder_decoder or (run.policy.exit_in_prefill and backbone.family.causal_prompt)
    )
    run.begin(check=check, rows=rows)
    with run.view.recording() as calls:
        inputs = model.prepare_inputs_for_generation(
            ids(), is_first_iteration=True, next_sequence_length=None, **model_kwargs
        )
        logits = model(**inputs, return_dict=True).logits[:, -1]
    yield run.merge(logits)

    kw = _decode_arguments(calls[-1])
    positions = calls[-1].get("position_ids")
    run.prompt_stands_at(positions)
    # Some models hand their stack a mask made for the prompt; every stack takes the 2-D one, from
    # which it makes its own. In an encoder-decoder, `attention_mask` is the encoder's.
    mask = (calls[-1] if backbone.is_encoder_decoder else model_kwargs).get("attention_mask")
    while True:
        tokens = ids()[:, -1:]
        if positions is not None:
            positions = positions[..., -1:] + 1
            kw["position_ids"] = positions
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(rows, 1)], 1)
            kw["attention_mask"] = mask
        run.begin(check=True, rows=rows)
        state = run.call(input_ids=tokens, **kw)
        if run.everybody_left:
            assert run.logits is not None
            yield run.logits
        else:
            yield run.merge(backbone.read(state))


_STATIC = ("cache", "past_key_values", "use_cache", "encoder_hidden_states", "encoder_attention_mask")


def _decode_arguments(prefill: Mapping[str, Any]) -> dict[str, Any]:
    """Of the arguments the model gave its stack in the prefill, those that every step repeats."""
    kept = {name: prefill[name] for name in _STATIC if prefill.get(name) is not None}
    return {**kept, "use_cache": True, "return_dict": True}


def _constraints(
    processors: Any, ids: Callable[[], Tensor]
) -> Callable[[Tensor], Tensor] | None:
    """The processors that say what may come (minimum length, repetition penalty, the user's own),
    without the warpers that only shape sampling (temperature, top-k, top-p, ...)."""
    hard = type(processors)(p for p in processors if not type(p).__name__.endswith("Warper"))
    if not hard:
        return None
    # A copy: a processor may write into what it is given.
    return lambda logits: hard(ids(), logits.to(torch.float32, copy=True))


def _always(_: Any) -> bool:
    return True


_UNSUPPORTED: dict[str, Callable[[Any], bool]] = {
    "assistant_early_exit": _always,
    "assistant_model": _always,
    "cache": _always,
    "cache_implementation": lambda name: name != "dynamic",
    "cache_params": _always,
    "constraints": _always,
    "custom_generate": _always,
    "dola_layers": _always,
    "force_words_ids": _always,
    "guidance_scale": lambda scale: scale != 1,
    "negative_prompt_attention_mask": _always,
    "negative_prompt_ids": _always,
    "num_beam_groups": lambda groups: groups > 1,
    "num_beams": lambda beams: beams > 1,
    "past_key_values": _always,
    "penalty_alpha": bool,
    "prefill_chunk_size": _always,
    "prompt_lookup_num_tokens": bool,
    "return_dict_in_generate": bool,
    "stop_strings": _always,
    "synced_gpus": bool,
    "token_healing": bool,
    "use_cache": lambda yes: not yes,
    "use_mtp": bool,
}
"""Options that the loop does not do, and the values (other than None) that ask for them."""


def _check_options(wanted: Callable[[str], Any]) -> None:
    """Refuse what the loop does not do, rather than ignore it."""
    asked = {name: wanted(name) for name in _UNSUPPORTED}
    refused = [n for n, value in asked.items() if value is not None and _UNSUPPORTED[n](value)]
    if refused:
        raise InputError(
            f"Generation option {', '.join(refused)} is not supported with early exits.",
            "Use greedy decoding or sampling with the default cache (num_beams=1 where the model's "
            "own defaults ask for beams, a StopStringCriteria for stop_strings); for the rest call "
            "the model's own generate.",
        )


def generate(
    backbone: Backbone,
    inputs: Mapping[str, Any],
    *,
    exits: Exits | None = None,
    policy: Policy = FULL,
    discriminators: nn.ModuleDict | None = None,
    streamer: Any = None,
    **options: Any,
) -> Generation:
    """Generate with early exits; without `exits` or thresholds, with the full model.

    inputs: what the HF processor returned. options: HF's own generation options (max_new_tokens,
    min_new_tokens, do_sample, temperature, top_k, top_p, repetition_penalty, logits_processor,
    stopping_criteria, generation_config, ...). Raise `InputError` for those not supported: beam
    search, assisted and contrastive decoding, static or quantised caches.
    """
    # Before HF sees them, which would refuse some in other words and build caches for others.
    config = options.get("generation_config")
    asked = {**inputs, **{name: value for name, value in options.items() if value is not None}}
    _check_options(lambda name: asked.get(name, getattr(config, name, None)))
    _check_inputs(inputs)
    run = Run(backbone, exits, policy, discriminators)
    trace: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.inference_mode():
        sequences = run.view.model.generate(
            **inputs, custom_generate=_loop(run, trace, streamer), **options
        )
    live = torch.stack([live for live, _, _ in trace], 1)
    depths = torch.stack([depths for _, depths, _ in trace], 1)
    scores = torch.stack([scores for _, _, scores in trace], 1)
    return Generation(
        sequences,
        torch.where(live, depths, 0),
        torch.where(live, scores.float(), float("nan")),
        backbone.depth,
    )


def _check_inputs(inputs: Mapping[str, Any]) -> None:
    images = [name for name in inputs if name.startswith("pixel_values") and inputs[name] is not None]
    if not images:
        raise InputError(
            "The prompt came without its image (no pixel_values in the inputs).",
            "Pass the processor both: processor(images=image, text=prompt, return_tensors='pt').",
        )
