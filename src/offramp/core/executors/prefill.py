"""The prompt: what Hugging Face's `generate` prepares of a request, and one pass over it.

`prepare` asks the model's own `generate` for everything up to the first forward pass (options,
processors, criteria, cache, the encoder's states) and takes it from there, so that the caller owns
the decoding loop. `Prefill` runs the prompt and keeps the arguments that every later step repeats.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    StoppingCriteriaList,
    StopStringCriteria,
    SynthIDTextWatermarkingConfig,
)

from offramp.core.decoding.executor import too_long
from offramp.core.errors import InputError, UnsupportedBackboneError
from offramp.core.executors.kv_cache import CACHE_NAMES, cache_name
from offramp.core.models.intercept import InterceptedModel
from offramp.core.models.opened import OpenedModel
from offramp.core.models.sharding import device_of

_BY_TOKEN = ("cross_attention_mask", "full_text_row_masked_out_mask")
"""Masks of Mllama's cross-attention, a row for each token: later ones see what the last did."""
_REPEATED = (*CACHE_NAMES, "encoder_hidden_states", "encoder_attention_mask")


@dataclass(frozen=True, eq=False)
class Prepared:
    """A request as Hugging Face's `generate` prepared it, before the first forward pass.

    model: whose forward pass will run. ids: token ids [B, T] before the answer. processors: of
    logits. criteria: of stopping. config: the generation config. arguments: of the forward pass,
    with the cache.
    """

    model: Any
    ids: Tensor
    processors: Any
    criteria: Any
    config: Any
    arguments: dict[str, Any]

    @property
    def cache(self) -> Any:
        """The empty KV cache."""
        return self.arguments[cache_name(self.arguments)]

    @cached_property
    def lengths(self) -> list[int]:
        """The number of tokens of each prompt, without padding."""
        embeds, mask = (self.arguments.get(n) for n in ("inputs_embeds", "attention_mask"))
        read: int = (self.ids if embeds is None else embeds).shape[1]
        if self.model.config.is_encoder_decoder or mask is None or mask.dim() != 2:
            return [self.ids.shape[1] if self.model.config.is_encoder_decoder else read]
        return [min(read, count) for count in mask.sum(1).tolist()]

    @property
    def pad(self) -> int:
        """The id that fills up rows with shorter answers than others."""
        token = getattr(self.config, "_pad_token_tensor", None)
        return 0 if token is None else int(token.flatten()[0])

    @property
    def most(self) -> int:
        """The most new tokens of an answer; 1 where no criterion says."""
        longest = self.criteria.max_length
        return 1 if longest is None else max(1, longest - self.ids.shape[1])


Use = Callable[[Prepared], Any]


def itself(prepared: Prepared) -> Prepared:
    """Return the prepared request unchanged."""
    return prepared


def prepare(model: Any, inputs: Mapping[str, Any], **options: Any) -> Prepared:
    """Return the request with which `model.generate(**inputs, **options)` would begin decoding.

    The vision tower runs here where the family's `generate` embeds the prompt itself (BLIP-2), and
    so does the encoder of an encoder-decoder. `stop_strings` become a stopping criterion.

    Raises:
        InputError: `stop_strings` without the tokenizer or the processor.
    """
    made: Prepared = within(model, inputs, itself, **options)[0]
    return made


def within(model: Any, inputs: Mapping[str, Any], use: Use, **options: Any) -> tuple[Any, Any]:
    """Call `use` with the prepared request inside the model's own `generate`. Return the result of
    `use`, and what `generate` returns for its `sequences`: a customised `generate` may set up
    modules during the call, or rewrite its result.

    Raises:
        UnsupportedBackboneError: its `generate` does not call Hugging Face's.
    """
    options, device = _with_stop_strings(options), device_of(model)
    inputs = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in inputs.items()}
    taken: list[Any] = []

    def take(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **arguments: Any,
    ) -> Tensor:
        rules = (logits_processor, stopping_criteria, generation_config)
        if arguments.get("encoder_hidden_states") is not None:
            arguments = _with_cross_attention(arguments)
        taken.append(use(Prepared(model, input_ids, *rules, arguments)))
        handed_out: Tensor = getattr(taken[-1], "sequences", input_ids)
        return handed_out.clone()  # it may be rewritten in place

    returned = None
    try:
        named = inspect.signature(model.generate).parameters.values()
        if any(it.name == "custom_generate" or it.kind is it.VAR_KEYWORD for it in named):
            returned = model.generate(**inputs, custom_generate=take, **options)
    except Exception:
        if not taken or hasattr(taken[0], "sequences"):
            raise  # else it was about an answer that is not there
    if not taken:
        raise UnsupportedBackboneError(
            f"{type(model).__name__} writes its answers by a `generate` of its own, which asks "
            "nobody else's.",
            "Call model.generate itself; with exits it can be decoded once its `generate` calls "
            "super().generate(..., **kwargs).",
        )
    return taken[0], getattr(returned, "sequences", returned)


def within_checked(
    model: Any, inputs: Mapping[str, Any], options: Mapping[str, Any], use: Use = itself
) -> tuple[Any, Any]:
    """Do as `within`, after checks of the caller's inputs and options. inputs: of the processor.

    Raises:
        InputError: an image is missing, or an option is not supported.
    """
    config = options.get("generation_config")
    asked = {**inputs, **{name: v for name, v in options.items() if v is not None}}
    # Before Hugging Face sees them, which would refuse some in other words.
    check_options(lambda name: asked.get(name, getattr(config, name, None)))
    check_inputs(inputs, model)

    def checked(prepared: Prepared) -> Any:
        # The model's own defaults may ask for what the caller did not.
        check_options(lambda name: getattr(prepared.config, name, None), own=True)
        with torch.inference_mode(False):
            return use(prepared)

    with torch.inference_mode():
        return within(model, inputs, checked, **options)


def _with_cross_attention(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments whose cache has a part for an encoder's keys.

    A decoder that reads an image's states, and is no encoder-decoder by its configuration (BLIP),
    gets a plain one, and would give it that part anew in every step.
    """
    name = cache_name(arguments)
    if not isinstance(arguments[name], DynamicCache):
        return arguments
    return {**arguments, name: EncoderDecoderCache(arguments[name], DynamicCache())}


def _with_stop_strings(options: dict[str, Any]) -> dict[str, Any]:
    """Generation options with `stop_strings` as the criterion that Hugging Face makes of them.

    Made here because `generate` drops the tokenizer where `custom_generate` is given.
    """
    config = options.get("generation_config")
    strings = options.pop("stop_strings", None) or getattr(config, "stop_strings", None)
    processor = options.pop("processor", None)
    tokenizer = options.pop("tokenizer", None) or getattr(processor, "tokenizer", processor)
    if not strings:
        return options
    if tokenizer is None:
        raise InputError(
            f"To stop at {strings!r}, generation must know how tokens are spelt.",
            "Add tokenizer=processor.tokenizer, or processor=processor.",
        )
    if config is not None and config.stop_strings:
        config = copy.deepcopy(config)
        config.stop_strings = None
        options["generation_config"] = config
    stop = StopStringCriteria(tokenizer, strings)
    criteria = [*(options.get("stopping_criteria") or ()), stop]
    return {**options, "stopping_criteria": StoppingCriteriaList(criteria)}


class Prefill:
    """Runs the prompt of a prepared request and keeps the arguments that later steps repeat.

    logits: of the first token [B, V]. prefill: the stack's arguments. positions: the position ids
    of the last tokens; None: the stack takes none. mask: of all tokens so far [B, T]; None:
    likewise.
    """

    def __init__(self, intercepted: InterceptedModel, prepared: Prepared) -> None:
        """Run the prompt through a model whose handler decides what each layer does.

        Raises:
            InputError: it is longer than the backbone's positions, or its rows lie on both sides of
                a length at which rotary frequencies change.
        """
        self._limit = room_of(intercepted.backbone, prepared.lengths)
        self._read = max(prepared.lengths)
        with intercepted.recording() as calls:
            inputs = prepared.model.prepare_inputs_for_generation(
                prepared.ids,
                is_first_iteration=True,
                next_sequence_length=None,
                **prepared.arguments,
            )
            if all(inputs.get(name) is None for name in CACHE_NAMES):
                # Phi-3 drops it, even empty, beyond its short frequencies.
                inputs = {**inputs, cache_name(prepared.arguments): prepared.cache}
            self.logits: Tensor = prepared.model(**inputs, return_dict=True).logits[:, -1]
        self.prefill: dict[str, Any] = calls[-1]
        self.positions: Tensor | None = self.prefill.get("position_ids")
        # Some models hand their stack a mask made for the prompt; every stack takes the 2-D one,
        # from which it makes its own. In an encoder-decoder, `attention_mask` is the encoder's.
        encoded = prepared.model.config.is_encoder_decoder
        given = self.prefill if encoded else prepared.arguments
        self.mask: Tensor | None = given.get("attention_mask")

    @cached_property
    def _static(self) -> dict[str, Any]:
        """Arguments that are the same in all later calls."""
        given = {name: value for name, value in self.prefill.items() if value is not None}
        repeated = {name: given[name] for name in _REPEATED if name in given}
        switches = {n: v for n, v in given.items() if isinstance(v, bool)}  # is_decoder
        last = {name: given[name][..., -1:, :] for name in _BY_TOKEN if name in given}
        return {**repeated, **switches, "use_cache": True, "return_dict": True, **last}

    def extend(self, tokens: int, real: Tensor | None = None) -> dict[str, Any]:
        """Return the arguments for the stack's next call, on `tokens` new tokens for each row.

        real: which of these tokens [B, tokens] are no padding; None: all.

        Raises:
            InputError: the backbone has no more positions.
        """
        if real is None:  # padded rows are not all that long: their caller knows
            self._read += tokens
            # An embedding would raise IndexError or, on a GPU, stop all that follows.
            if self._limit is not None and self._read > self._limit:
                raise too_long(self._limit)
        kw = dict(self._static)
        if self.positions is not None:
            ahead = torch.arange(1, tokens + 1, device=self.positions.device)
            self.positions = self.positions[..., -1:] + ahead
            kw["position_ids"] = self.positions
            if real is not None:  # a pad's position is never seen, but must be one that exists
                kw["position_ids"] = torch.where(real, self.positions, 0)
        if self.mask is not None:
            new = self.mask.new_ones(len(self.mask), tokens)
            self.mask = torch.cat([self.mask, new if real is None else real.to(new)], 1)
            kw["attention_mask"] = self.mask
        return kw

    def of_row(self, row: int) -> Prefill:
        """Return the prefill of one of several rows."""
        made = copy.copy(self)
        rows = len(self.logits)
        made.logits = self.logits[row : row + 1]
        made._static = _of_row(self._static, row, rows)
        if self.positions is not None and self.positions.shape[-2] > 1:
            made.positions = self.positions[..., row : row + 1, :]
        if self.mask is not None:
            made.mask = self.mask[row : row + 1]
        return made

    def rollback(self, tokens: int) -> None:
        """Forget the last `tokens` tokens that `extend` counted."""
        self._read -= tokens
        if self.positions is not None:
            self.positions = self.positions[..., -1:] - tokens
        if self.mask is not None:
            self.mask = self.mask[:, : self.mask.shape[1] - tokens]


def _of_row(kw: Mapping[str, Any], row: int, rows: int) -> dict[str, Any]:
    """A stack's arguments for one row: of tensors and masks, what has all rows."""
    picked = dict(kw)
    for name, value in kw.items():
        if isinstance(value, dict):
            picked[name] = _of_row(value, row, rows)
        elif isinstance(value, Tensor) and value.dim() > 1 and len(value) == rows:
            picked[name] = value[row : row + 1]
    return picked


def room_of(backbone: OpenedModel, lengths: Sequence[int]) -> int | None:
    """Return the most tokens of a prompt and its answer, for these lengths; None: no limit.

    Raises:
        InputError: a prompt is too long or empty, or the prompts of one batch lie on both sides of
            a length at which rotary frequencies change.
    """
    shortest, longest = min(lengths), max(lengths)
    if shortest < 1:
        raise InputError(
            "A prompt of the batch has no tokens: its attention mask is all zero.",
            "Leave that row out.",
        )
    room = backbone.room(longest)
    if backbone.room(shortest) != room:
        raise InputError(
            f"Prompts of {shortest} and {longest} tokens in one batch: the backbone's rotary "
            f"frequencies change beyond {backbone.rope.switches} tokens.",
            "Give prompts up to that length and longer ones in batches of their own.",
        )
    if room is not None and longest > room:
        raise too_long(room)
    return room


# -- what is asked for ----------------------------------------------------------------------------


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
    "output_attentions": bool,
    "output_hidden_states": bool,
    "output_logits": bool,
    "output_scores": bool,
    "past_key_values": _always,
    "penalty_alpha": bool,
    "prefill_chunk_size": _always,
    "prompt_lookup_num_tokens": bool,
    "synced_gpus": bool,
    "token_healing": bool,
    "use_cache": lambda yes: not yes,
    "use_mtp": bool,
    # Its processor counts what it has seen, and a place may be asked about more than once.
    "watermarking_config": lambda mark: isinstance(mark, SynthIDTextWatermarkingConfig),
}
"""Options that the loop does not do, and the values (other than None) that ask for them."""


def check_options(wanted: Callable[[str], Any], *, own: bool = False) -> None:
    """Refuse options that early exits do not support, rather than ignore them.

    own: whether the options come from the model's generation configuration, not from the caller.
    """
    asked = {name: wanted(name) for name in _UNSUPPORTED}
    refused = [n for n, value in asked.items() if value is not None and _UNSUPPORTED[n](value)]
    if refused:
        of = " of the model's own generation_config" if own else ""
        raise InputError(
            f"Generation option {', '.join(refused)}{of} is not supported with early exits.",
            "Use greedy decoding or sampling with the default cache (num_beams=1, use_cache=True "
            "where the model's own defaults ask for others); else call the model's own generate.",
        )


IMAGES = ("pixel_values", "flattened_patches", "image_patches", "image_embeds", "inputs_embeds")
"""How the names of a processor's outputs begin that stand for an image."""


def image_tokens(config: Any) -> list[int]:
    """Return the ids that stand for an image's features in a prompt, by the configuration."""
    named = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return [mark for mark in named if mark is not None]


def check_inputs(inputs: Mapping[str, Any], model: Any) -> None:
    """Raise `InputError` where the prompt or the model needs an image and none came.

    A prompt without an image token, such as a chat's later turn, needs none.
    """
    if any(name.startswith(IMAGES) and inputs[name] is not None for name in inputs):
        return
    required = inspect.signature(model.generate).parameters.get("pixel_values")
    ids = inputs.get("input_ids")
    if (
        ids is None
        or (required is not None and required.default is inspect.Parameter.empty)
        or any(bool((ids == mark).any()) for mark in image_tokens(model.config))
    ):
        raise InputError(
            "The prompt came without its image (no pixel_values in the inputs).",
            "Pass the processor both: processor(images=image, text=prompt, return_tensors='pt').",
        )
