"""How a model is loaded: the one owner of names, engines, vision towers and number formats."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from offramp.adapter.adapter import Adapter
from offramp.adapter.shipped import exits_folder, load_named, tiny_kind
from offramp.core.errors import InputError, StorageError
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet
from offramp.core.models.hub import check_device, grey_example, grey_picture
from offramp.core.save_and_load import AdapterConfig, read_config
from offramp.data.datasets import CAPTION_PROMPT
from offramp.engines import AUTO, TORCH, check_asked, engine_named
from offramp.engines.auto import Way, settled
from offramp.features.input_processor import InputProcessor
from offramp.features.shrink_on_load import with_shrink_on_load
from offramp.features.towers import tower_engine, with_vision
from offramp.inputs.example import Example
from offramp.promises.conditions import Conditions
from offramp.promises.verdict import Verdict

log = logging.getLogger(__name__)

LONGEST = 64
"""Tokens of an answer whose length neither the caller nor a calibration says."""
TRIAL = Example(grey_picture(), "What is shown?", (), "trial")
"""What a served model is tried on, before anybody asks."""


class Text(str):
    """The text of an answer. verdict: what is promised of the answer."""

    verdict: Verdict


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model that is ready to answer.

    model: the adapter, or a runtime in its place, with `generate`. adapter: the exits on their
    backbone, and the policy. processor: Hugging Face's. engine: name of the decoder's engine.
    sequences: answers written at the same time.
    """

    model: Any
    adapter: Adapter
    processor: Any
    engine: str = TORCH
    sequences: int = 1

    def __repr__(self) -> str:
        backbone, (by, level) = self.adapter.backbone, self.adapter.policy.decides
        depths = ", ".join(map(str, self.adapter.exits.depths)) if self.has_exits else "none"
        return (
            f"Loaded model of {backbone.depth} layers on {backbone.model.device}\n"
            f"  engine: {self.engine}, {self.sequences} at a time\n"
            f"  exits at depth: {depths}\n"
            f"  {by}: {level or 'none'}\n"
            f"  answers: loaded.answer(image, prompt), of {self.longest} tokens at most"
        )

    @property
    def runtime(self) -> Any:
        """Return the runtime in the adapter's place; None: the adapter itself generates."""
        return None if isinstance(self.model, Adapter) else self.model

    @property
    def has_exits(self) -> bool:
        """Return False for a model that ships without exits, which never leaves early."""
        return self.adapter.exits.modules.kind != "lens"

    @cached_property
    def encoder(self) -> InputProcessor:
        """Return the processor of images and prompts."""
        return InputProcessor(self.adapter.backbone, self.processor)

    @property
    def longest(self) -> int:
        """The most tokens of an answer without a caller's limit."""
        return usual_length(self.adapter, LONGEST)

    def answer(
        self,
        image: Any = None,
        prompt: str | None = None,
        *,
        mode: str | None = None,
        **options: Any,
    ) -> Text:
        """Return the answer to a prompt about an image, as text with a `verdict`.

        image: a PIL image or a file; None: for a language model. prompt: a question; None: the
        prompt for captions that the exits know. mode: as of `Adapter.generate`.
        options: of generation, such as max_new_tokens (default: as calibrated, or 64).

        Raises:
            DataError: the image cannot be read. InputError: an option that is not supported, or
                neither an image nor a prompt.
        """
        if prompt is None and image is None:
            raise InputError(
                "There is neither an image to caption nor a prompt.",
                "Give one: answer('dog.jpg'), or answer(prompt='Who are you?') of a model that "
                "also answers text alone.",
            )
        if prompt is None:
            prompt = usual_prompt(self.adapter)
        if image is None:
            inputs = self.encoder.text_prompt(prompt)
        else:
            image = Path(image) if isinstance(image, str) else image
            image = Example(image, "", (), key="image").open_image(self.encoder.smallest_side)
            inputs = self.encoder.prompts([Example(image, prompt, (), key="image")])
        options = {"max_new_tokens": self.longest, "do_sample": False, **options}
        where = None if self.runtime is None else self.runtime.name
        policy = self.adapter.policy_of(prompt, engine=where).in_mode(mode)
        made = self.model.generate(inputs, policy=policy, **options)
        plain = options.keys() <= {"max_new_tokens", "do_sample", "vision_cache", "prefix_cache"}
        text = Text(self.encoder.texts(made.new_tokens)[0])
        text.verdict = self.adapter.verdict(
            made,
            self.processor,
            prompt,
            image,
            policy=policy,
            engine=where,
            longest=options["max_new_tokens"],
            sampling="greedy" if plain and not options["do_sample"] else "sampled or ruled",
        )
        return text


def load(
    name: str,
    *,
    engine: str = AUTO,
    vision: str = AUTO,
    quantize: str | None = None,
    gguf: str | Path | None = None,
    context: int = 2048,
    threads: int | None = None,
    sequences: int | None = 1,
    answers: int | None = None,
    keep_decoder: bool = False,
    chat_template: Path | None = None,
    **how: Any,
) -> Loaded:
    """Load a model with its processor and exits by the name of the exits. Commands, the server and
    Python all open models here.

    name: folder or hub name of an adapter, or photo, photo-chat, tiny-opt or tiny-t5.
    engine: of the decoder, from `offramp.engines` or registered; "auto": the fastest here that
    keeps the answers, measured once (`offramp.engines.auto`).
    vision: the vision tower's engine: "torch", "onnxruntime", "openvino", "openvino-bf16",
    "onnxruntime-int8", or one that the decoder's engine brings; "auto": found together with the
    engine, else PyTorch.
    quantize: "int8" or "int4": weights of the layers in PyTorch.
    gguf: folder of files for an engine that reads some. context: tokens of a
    prompt and its answer, in an engine with caches of its own. threads: of such an engine; None: as
    many as PyTorch has. sequences: answers at the same time; None: the engine's default. answers:
    expected number; None: many; 0: the model is only exported. keep_decoder: whether PyTorch keeps
    the decoder's weights beside an engine that reads its own. chat_template: file with a template
    for conversations, instead of the processor's own. how: backbone (instead of the adapter's own),
    revision, dtype, device and shrink_on_load, as of `open_backbone`.

    Raises:
        InputError: an unknown engine, or an option that does not fit it. AdapterError: there is no
            such adapter, or it does not fit. StorageError: it cannot be read.
    """
    check_asked(engine, gguf, quantize, vision)
    text = None if chat_template is None else _template_of(chat_template)
    found = _find(name, quantize=quantize, **how)

    threads = threads or torch.get_num_threads()

    def opened(way: Way) -> Loaded:
        return _open(found, way, context, threads, sequences, keep_decoder=keep_decoder)

    given = {n: v for n, v in found.how.items() if v not in (None, False, AUTO)}
    if found.config is not None and found.backbone != found.config.backbone:
        given["backbone"] = found.backbone
    way = settled(
        opened,
        found.config,
        Way(engine, vision, gguf),
        answers=answers,
        threads=threads,
        together=sequences != 1,
        **given,
    )
    loaded = opened(way)
    kind = loaded.adapter.of_format
    if kind is not None and way.gguf is None and answers != 0:
        log.warning(
            "These exits learnt from the backbone in %s, and agree less with it as it is here: "
            "export them (--gguf %s) and use --engine llama.cpp.",
            kind,
            kind,
        )
    if text is None:
        return loaded
    return replace(loaded, processor=_with_template(loaded, text, str(chat_template)))


@dataclass(frozen=True)
class _Named:
    """A model by its name, found once.

    config: of its exits; None: it ships without. backbone: the name of its backbone. how: of the
    backbone, as of `open_backbone`, without vision.
    """

    name: str
    config: AdapterConfig | None
    backbone: str
    how: Mapping[str, Any]


def _find(
    name: str, *, backbone: str | None = None, revision: str | None = None, **how: Any
) -> _Named:
    try:
        config = read_config(exits_folder(name))
    except InputError:
        return _Named(name, None, name, {**how, "revision": revision})
    if backbone is None:
        backbone, revision = config.backbone, revision or config.revision
    return _Named(name, config, backbone, {**how, "revision": revision})


def _open(
    found: _Named,
    way: Way,
    context: int,
    threads: int,
    sequences: int | None,
    *,
    keep_decoder: bool,
) -> Loaded:
    """Open a model by a way, for one answer or to be timed: the same object."""
    engine = engine_named(way.engine)
    brought = engine.towers.get(way.vision)
    own = TORCH if brought is not None or way.vision == AUTO else way.vision
    backbone, processor = open_backbone(found.backbone, vision=own, **found.how)
    if found.config is None:
        log.info("%s ships without exits: every token runs at full depth", found.name)
        if engine.replaces:
            raise InputError(
                f"{found.name} has no exits, and {way.engine} runs a model with some.",
                "Name an adapter, or leave the engine out.",
            )
        adapter = Adapter(backbone, ExitSet(Exits(backbone, (1,), kind="lens")))
    else:
        adapter = Adapter.load(found.config, backbone)
    if brought is not None:
        adapter = brought(adapter, way.gguf, threads)
    several = engine.together if sequences is None else sequences
    model = engine.open(adapter, gguf=way.gguf, context=context, threads=threads, sequences=several)
    if engine.replaces and not keep_decoder and hasattr(model, "release_decoder"):
        model.release_decoder()
    own_adapter = model if isinstance(model, Adapter) else getattr(model, "adapter", adapter)
    return Loaded(model, own_adapter, processor, way.engine, several)


def open_backbone(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    quantize: str | None = None,
    vision: str = TORCH,
    shrink_on_load: bool = False,
) -> tuple[Backbone, Any]:
    """Open a backbone by name, and its processor.

    name: as of `load_named`, with revision. dtype: torch's name of a precision, or "auto". device:
    None or "auto": see `choose_device`. quantize: "int8" or "int4": the decoder layers' weights are
    rounded to it, with states in bfloat16. vision: the vision tower's engine, as of `with_vision`.
    shrink_on_load: as of `with_shrink_on_load`.

    Raises:
        InputError: as of `load_named`, `quantized` and `with_vision`.
    """
    tower_engine(vision)  # a mistake should not wait for the model
    if quantize is not None:
        from offramp.features.quantized.linears import check_quantize, quantized

        check_quantize(quantize, dtype)
        dtype = "bfloat16"
    device = choose_device(device, is_tiny=tiny_kind(name) is not None, quantize=quantize)
    backbone, processor = load_named(name, revision=revision, dtype=dtype, device=device)
    if quantize is not None:
        backbone = quantized(backbone, quantize)
    if vision != TORCH:
        example = backbone.example or grey_example(processor, backbone.model)
        backbone = with_vision(backbone, vision, example)
    return backbone, with_shrink_on_load(processor) if shrink_on_load else processor


def choose_device(asked: str | None, *, is_tiny: bool = False, quantize: str | None = None) -> str:
    """Return the backbone's device; where the machine has a GPU, log which is used and why.

    Raises:
        InputError: there is no such device.
    """
    gpu = torch.cuda.is_available()
    if asked not in (None, AUTO):
        check_device(asked)
        device, why = asked, "as asked"
    elif quantize is not None:
        device, why = "cpu", "quantised weights are read by a processor's kernels"
    elif gpu and not is_tiny:
        device, why = "cuda", "this machine has a GPU; device cpu runs on the processor"
    else:
        device, why = "cpu", "a tiny model is faster there; device cuda runs on the GPU"
    if gpu:
        log.info("device: %s (%s)", device, why)
    return device


def usual_length(adapter: Adapter, otherwise: int) -> int:
    """Return the most tokens of a calibrated answer; `otherwise` without a calibration."""
    longest: int | None = Conditions.of_calibration(adapter.calibration).get("longest")
    return longest or otherwise


def usual_prompt(adapter: Adapter) -> str:
    """Return the prompt for captions that the adapter was calibrated on, or "Caption:"."""
    frames = Conditions.of_calibration(adapter.calibration).get("prompts") or ()
    alone = [frame[0] for frame in frames if len(frame) == 1 and frame[0].strip()]
    return next((p for p in alone if "caption" in p.lower()), CAPTION_PROMPT)


# -- chat templates --------------------------------------------------------------------------------


def _template_of(file: Path) -> str:
    """The text of a template file, read before the model, which takes longer."""
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(
            f"The chat template {file} cannot be read: "
            f"{getattr(error, 'strerror', None) or 'no text'}.",
            "Name a text file with a Jinja template.",
        ) from error


def _with_template(loaded: Loaded, text: str, name: str) -> Any:
    """The processor with another chat template, which is tried on one turn with an image."""
    changed = copy.copy(loaded.processor)
    changed.chat_template = text
    encoder = InputProcessor(loaded.adapter.backbone, changed)
    try:
        written = encoder.prompt_text(TRIAL.prompt)
        encoder.prompts([TRIAL])
    except Exception as error:  # Jinja's, the template's own, or the processor's
        first = str(error).strip().partition("\n")[0]
        raise InputError(
            f"The chat template {name} does not work: {type(error).__name__}: {first}",
            "Give one that writes messages of texts and images as the model was tuned on them.",
        ) from error
    if TRIAL.prompt not in written:
        raise InputError(
            f"The chat template {name} leaves out what is asked.",
            "Let it write the parts of a message: {% for part in message.content %}, part.text.",
        )
    return changed
