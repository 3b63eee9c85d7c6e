"""How a model is loaded: the one owner of names, engines, vision towers and number formats."""

from __future__ import annotations

import copy
import logging
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from offramp.adapter.adapter import Adapter
from offramp.adapter.shipped import exits_folder, load_named
from offramp.core.errors import InputError, StorageError
from offramp.core.inputs.example import Example
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet
from offramp.core.models.hub import grey_example, grey_picture
from offramp.core.save_and_load import read_config
from offramp.data.datasets import CAPTION_PROMPT
from offramp.engines import AUTO, MTMD, TORCH, check_asked, engine_named
from offramp.engines.auto import OPEN, Way, settled
from offramp.features.input_processor import InputProcessor
from offramp.features.shrink_on_load import with_shrink_on_load
from offramp.features.towers import tower_engine, with_vision
from offramp.promises.conditions import Conditions

log = logging.getLogger(__name__)

LONGEST = 64
"""Tokens of an answer whose length neither the caller nor a calibration says."""
TRIAL = Example(grey_picture(), "What is shown?", (), "trial")
"""What a served model is tried on, before anybody asks."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model that is ready to answer.

    model: generates: the adapter, or a runtime in its place. adapter: the exits on their backbone,
    and the policy. processor: Hugging Face's.
    """

    model: Any
    adapter: Adapter
    processor: Any

    @cached_property
    def encoder(self) -> InputProcessor:
        """Return the processor of images and prompts."""
        return InputProcessor(self.adapter.backbone, self.processor)

    @property
    def longest(self) -> int:
        """The most tokens of an answer, where a caller names no limit."""
        return usual_length(self.adapter, LONGEST)

    def answer(
        self,
        image: Any = None,
        prompt: str | None = None,
        *,
        mode: str | None = None,
        **options: Any,
    ) -> str:
        """Return the answer to a prompt about an image, as text.

        image: a PIL image or a file; None: of a language model. prompt: what is asked; None: the
        caption's prompt that the exits know. mode: as of `Adapter.generate`.
        options: of generation, such as max_new_tokens (default: as calibrated, or 64).

        Raises:
            DataError: the image cannot be read. InputError: an option that is not supported.
        """
        if prompt is None:
            prompt = usual_prompt(self.adapter)
        if image is None:
            inputs = self.encoder.text_prompt(prompt)
        else:
            inputs = self.encoder.prompts([Example(image, prompt, (), key="image")])
        usual = {"max_new_tokens": self.longest, "do_sample": False}
        made = self.model.generate(
            inputs, policy=self.adapter.policy.in_mode(mode), **{**usual, **options}
        )
        return self.encoder.texts(made.new_tokens)[0]


def load(
    name: str,
    *,
    engine: str = AUTO,
    vision: str = AUTO,
    quantize: str | None = None,
    gguf: str | Path | None = None,
    context: int = 2048,
    threads: int | None = None,
    **how: Any,
) -> Loaded:
    """Load a model with its processor and exits by the name of the exits.

    name: folder or hub name of an adapter, or photo, tiny-opt or tiny-t5. engine: what runs the
    decoder, of `offramp.engines.ENGINES` or registered; "auto": the fastest here that keeps the
    answers, which is measured once (`offramp.engines.auto`). vision: what runs the vision tower:
    "torch", "onnxruntime", "openvino", "openvino-bf16", "onnxruntime-int8", or "mtmd" in llama.cpp;
    "auto": as the engine is found, else PyTorch. quantize: "int8" or "int4": weights of the layers
    in PyTorch. gguf: folder of `offramp export --gguf`, for llama.cpp. context, threads: of
    llama.cpp and CUDA graphs (None: as many as PyTorch has). how: backbone, revision, dtype,
    device, shrink_on_load and chat_template, as of `open_model`.

    Raises:
        InputError: an unknown engine, or what does not go with it. AdapterError: there is no such
        adapter, or it does not fit. StorageError: it cannot be read.
    """
    check_asked(engine, gguf, quantize)
    engine, vision, gguf = settle(name, Way(engine, vision, gguf), quantize=quantize, **how)
    model, processor = open_model(name, vision=own_vision(vision, engine), quantize=quantize, **how)
    threads = threads or torch.get_num_threads()
    adapter = seeing(with_exits(model), vision, gguf, threads)
    opened = engine_named(engine).open(adapter, gguf=gguf, context=context, threads=threads)
    own = opened if isinstance(opened, Adapter) else getattr(opened, "adapter", adapter)
    return Loaded(opened, own, processor)


def settle(
    name: str,
    asked: Way = OPEN,
    *,
    answers: int | None = None,
    together: bool = False,
    **how: Any,
) -> Way:
    """Return the way to answer by a name; arguments as of `offramp.engines.auto.settled`."""
    config = None
    if asked.engine == AUTO:
        with suppress(InputError):  # a model that ships without exits
            config = read_config(exits_folder(name))
    ready = partial(load, name)
    return settled(ready, config, asked, answers=answers, together=together, **how)


def usual_length(adapter: Adapter, otherwise: int) -> int:
    """Return the most tokens of an answer as calibrated, or `otherwise` where nothing is."""
    longest: int | None = Conditions.of_calibration(adapter.calibration).get("longest")
    return longest or otherwise


def usual_prompt(adapter: Adapter) -> str:
    """Return the prompt of captions that the adapter was calibrated on, or "Caption:"."""
    frames = Conditions.of_calibration(adapter.calibration).get("prompts") or ()
    alone = [frame[0] for frame in frames if len(frame) == 1 and frame[0].strip()]
    return next((p for p in alone if "caption" in p.lower()), CAPTION_PROMPT)


def with_exits(model: Adapter | Backbone) -> Adapter:
    """An adapter itself; of a backbone alone, one that never exits."""
    if isinstance(model, Adapter):
        return model
    return Adapter(model, ExitSet(Exits(model, (1,), kind="lens")))


def own_vision(vision: str, engine: str) -> str:
    """Return what runs the vision tower of the model as it is loaded.

    Raises:
        InputError: what `offramp export` wrote is to run it, and PyTorch the decoder.
    """
    if vision == MTMD and engine != "llama.cpp":
        raise InputError(
            f"--vision {MTMD} sees for --engine llama.cpp alone.",
            "Give --engine llama.cpp and --gguf FOLDER, or another of torch, onnxruntime, "
            "openvino, openvino-bf16, onnxruntime-int8.",
        )
    return TORCH if vision in (MTMD, AUTO) else vision


def seeing(adapter: Adapter, vision: str, gguf: Any, threads: int | None) -> Adapter:
    """The adapter, for which llama.cpp sees images where `vision` asks for that."""
    if vision != MTMD:
        return adapter
    seen = engine_named("llama.cpp").towers[vision]
    made: Adapter = seen(adapter, gguf, threads or torch.get_num_threads())
    return made


def open_model(
    name: str,
    *,
    backbone: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    quantize: str | None = None,
    vision: str = "torch",
    shrink_on_load: bool = False,
    chat_template: Path | None = None,
) -> tuple[Adapter | Backbone, Any]:
    """Open an adapter on its backbone, and the processor; of a model that ships without exits, the
    backbone.

    name: folder or hub name of an adapter, or photo, tiny-opt or tiny-t5. backbone: instead of the
    adapter's own, with revision: of it. dtype, device, quantize, vision: of the backbone,
    as of `open_backbone`. shrink_on_load: as of `with_shrink_on_load`. chat_template: file of what
    that writes conversations, instead of the processor's own.

    Raises:
        AdapterError: there is no such adapter, or it does not fit. InputError: a revision of a
        model that ships, a template that does not work. StorageError: it cannot be read.
    """
    text = None if chat_template is None else _template_of(chat_template)
    how: dict[str, Any] = {"dtype": dtype, "device": device, "quantize": quantize}
    how |= {"vision": vision}
    model: Adapter | Backbone
    try:
        folder = exits_folder(name)
    except InputError:
        model, processor = open_backbone(name, revision=revision, **how)  # which may be missing too
        log.info("%s ships without exits: every token runs at full depth", name)
    else:
        config = read_config(folder)
        if backbone is None:
            backbone, revision = config.backbone, revision or config.revision
        opened, processor = open_backbone(backbone, revision=revision, **how)
        model = Adapter.load(config, opened)
    if shrink_on_load:
        processor = with_shrink_on_load(processor)
    if text is None:
        return model, processor
    return model, _with_template(model, processor, text, str(chat_template))


def open_backbone(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    quantize: str | None = None,
    vision: str = TORCH,
) -> tuple[Backbone, Any]:
    """Open a backbone by name, and its processor.

    name: as of `load_named`, with revision and device. dtype: torch's name of a precision, or
    "auto". quantize: "int8" or "int4": the decoder layers' weights are rounded to that, with states
    in bfloat16. vision: what runs the vision tower, as of `with_vision`.

    Raises:
        InputError: as of `load_named`, `quantized` and `with_vision`.
    """
    tower_engine(vision)  # a mistake should not wait for the model
    if quantize is not None:
        from offramp.features.quantized.linears import check_quantize, quantized

        check_quantize(quantize, dtype)
        dtype = "bfloat16"
    backbone, processor = load_named(name, revision=revision, dtype=dtype, device=device)
    if quantize is not None:
        backbone = quantized(backbone, quantize)
    if vision == TORCH:
        return backbone, processor
    example = backbone.example or grey_example(processor, backbone.model)
    return with_vision(backbone, vision, example), processor


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


def _with_template(model: Adapter | Backbone, processor: Any, text: str, name: str) -> Any:
    """The processor with another chat template, which is tried on one turn with an image."""
    changed = copy.copy(processor)
    changed.chat_template = text
    backbone = model.backbone if isinstance(model, Adapter) else model
    encoder = InputProcessor(backbone, changed)
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
