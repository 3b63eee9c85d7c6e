"""Generation: one loop for the full model, for early exits, and for lossless drafts.

Hugging Face's own `generate` prepares everything (cache, logits processors, stopping criteria); the
loop here decodes. Without exits it *is* the full model: the baseline runs through the same code as
the method.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from offramp.engine.exit_check import decider_of
from offramp.engine.kv_cache import croppable
from offramp.engine.model_runner import ModelRunner
from offramp.engine.policy import FULL, ExitPolicy, GenerationOutput, first_token_may_exit
from offramp.engine.prefill import Prefill, Prepared, prepare
from offramp.engine.prefix_cache import PrefixCache
from offramp.engine.sampling import SequenceState
from offramp.engine.speculative import speculate, write_with_guesses
from offramp.errors import InputError
from offramp.models.backbone import Backbone
from offramp.models.exits import Exits, ExitSet
from offramp.models.vision_cache import VisionCache


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
}
"""Options that the loop does not do, and the values (other than None) that ask for them."""


def check_options(wanted: Callable[[str], Any], *, own: bool = False) -> None:
    """Refuse what the loop does not do, rather than ignore it.

    own: whether the model's own generation configuration says what is wanted, not the caller.
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


def generate(
    backbone: Backbone | nn.Module,
    inputs: Mapping[str, Any],
    *,
    exits: ExitSet | Exits | None = None,
    policy: ExitPolicy = FULL,
    vision_cache: VisionCache | None = None,
    prefix_cache: PrefixCache | None = None,
    streamer: Any = None,
    **options: Any,
) -> GenerationOutput:
    """Generate with early exits; without `exits` or thresholds, with the full model.

    backbone: a `Backbone`, or a Hugging Face model. inputs: what the HF processor returned.
    vision_cache: image features kept between calls, for several questions on an image.
    prefix_cache: keys and values of prompts kept between calls, for the next turn of a dialogue.
    streamer: HF's; where it has a method `step`, that gets each token with its depth and score.
    options: HF's own (max_new_tokens, do_sample, temperature, top_k, top_p, logits_processor,
    stopping_criteria, stop_strings with tokenizer or processor, generation_config, ...). Raise
    `InputError` for those not supported: beam search, assisted and contrastive decoding, static or
    quantised caches.
    """
    backbone = Backbone.of(backbone)
    # Before HF sees them, which would refuse some in other words and build caches for others.
    config = options.get("generation_config")
    asked = {**inputs, **{name: value for name, value in options.items() if value is not None}}
    check_options(lambda name: asked.get(name, getattr(config, name, None)))
    check_inputs(inputs, backbone.model)
    run, policy = _runner(backbone, exits, policy)
    if vision_cache is not None:
        run.intercepted.remember_images(backbone, vision_cache)
    try:
        with torch.inference_mode():
            prepared = prepare(run.intercepted.model, inputs, **options)
            # The model's own defaults may ask for what the caller did not.
            check_options(lambda name: getattr(prepared.config, name, None), own=True)
            return _decode(run, policy, prepared, prefix_cache, streamer)
    finally:
        run.release()


def generate_prepared(
    backbone: Backbone,
    prepared: Prepared,
    *,
    exits: ExitSet | Exits | None = None,
    policy: ExitPolicy = FULL,
    prefix_cache: PrefixCache | None = None,
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
    run, policy = _runner(backbone, exits, policy)
    try:
        with torch.inference_mode():
            twin = run.intercepted.model.get_submodule(path)
            return _decode(run, policy, replace(prepared, model=twin), prefix_cache)
    finally:
        run.release()


def _runner(
    backbone: Backbone, exits: ExitSet | Exits | None, policy: ExitPolicy
) -> tuple[ModelRunner, ExitPolicy]:
    """What runs the decoder, and the policy that is in effect."""
    policy = policy.effective
    attached = None if exits is None else ExitSet.of(exits)
    decider = decider_of(backbone, attached, policy)
    if policy.lossless and decider is not None:
        backbone.check_lossless()
    return ModelRunner(backbone, attached, decider, propagate=policy.kv == "propagate"), policy


def _decode(
    run: ModelRunner,
    policy: ExitPolicy,
    prepared: Prepared,
    prefix_cache: PrefixCache | None = None,
    streamer: Any = None,
) -> GenerationOutput:
    """Decode by a policy that is in effect."""
    sequence = SequenceState(prepared, streamer)
    run.adopt(prepared.cache)
    run.constrain = sequence.constraints(lambda: sequence.ids)
    first_exits = first_token_may_exit(run.backbone, policy)
    if run.decider is not None and first_exits and run.propagate:
        prefix_cache = None  # the prompt's keys may be approximate
    served = None if prefix_cache is None else prefix_cache.serve(run)
    rounds: list[tuple[int, int]] = []
    if policy.lossless and run.decider is not None:
        rounds = speculate(run, sequence, prepared, policy.max_draft)
    else:
        guesses = None if sequence.samples else _guess_above(run, policy)
        decode_steps(run, sequence, prepared, first_exits=first_exits, guess_above=guesses)
    if served is not None:
        served.end()
    sequence.end()
    return sequence.output(run.backbone.depth, rounds)


def _guess_above(run: ModelRunner, policy: ExitPolicy) -> float | None:
    """From which score a token that is not confident is guessed; None where none is: with several
    exits, approximate keys, or a backbone that cannot take tokens back."""
    if len(run.exits_on) != 1 or run.propagate or not run.backbone.lossless:
        return None
    return policy.guesses.get(run.exits_on[0])


def decode_steps(
    run: ModelRunner,
    sequence: SequenceState,
    prepared: Prepared,
    *,
    first_exits: bool,
    guess_above: float | None = None,
) -> None:
    """Write token after token, each at the depth where it exits, until every row is finished.

    first_exits: whether the first token may exit; see `first_token_may_exit`. guess_above: score
    from which a single row goes on from a guess (`offramp.engine.speculative`), where tokens can be
    taken back out of the cache.
    """
    backbone = run.backbone
    run.begin(sequence.unfinished, sequence.ids, check=first_exits)
    prefill = Prefill(run.intercepted, prepared)
    step = run.prompt_step(prefill.positions, sequence.unfinished)
    sequence.emit(
        sequence.choose(step.merge(prefill.logits, backbone.depth)), step.depths, step.scores
    )
    if guess_above is not None and len(sequence.ids) == 1 and croppable(run.cache):
        write_with_guesses(run, sequence, prefill, guess_above)
    while live := sequence.live:
        run.keep_rows(sequence.written, live)
        run.begin(sequence.unfinished, sequence.ids)
        step = run.step(input_ids=sequence.ids[:, -1:], **prefill.extend(1))
        sequence.emit(sequence.choose(step.logits(backbone)), step.depths, step.scores)


IMAGES = ("pixel_values", "flattened_patches", "image_patches", "image_embeds", "inputs_embeds")
"""How the names of a processor's outputs begin that stand for an image."""


def check_inputs(inputs: Mapping[str, Any], model: Any) -> None:
    """Raise `InputError` where the prompt, or the model, wants an image and none came.

    A prompt without an image token, as a chat's later turns may be, needs none.
    """
    if any(name.startswith(IMAGES) and inputs[name] is not None for name in inputs):
        return
    required = inspect.signature(model.generate).parameters.get("pixel_values")
    ids = inputs.get("input_ids")
    names = ("image_token_id", "image_token_index")
    marks = {getattr(model.config, name, None) for name in names} - {None}
    if (
        ids is None
        or (required is not None and required.default is inspect.Parameter.empty)
        or any(bool((ids == mark).any()) for mark in marks)
    ):
        raise InputError(
            "The prompt came without its image (no pixel_values in the inputs).",
            "Pass the processor both: processor(images=image, text=prompt, return_tensors='pt').",
        )
