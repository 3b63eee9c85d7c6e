"""What is served, by name: an adapter finds its backbone."""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path
from typing import Any

from offramp.adapter import Adapter
from offramp.data.example import Example
from offramp.errors import AdapterError, InputError, StorageError
from offramp.models.backbone import Backbone
from offramp.models.hub import grey_picture
from offramp.models.input_processor import InputProcessor
from offramp.models.shipped import load_named, shipped_exits
from offramp.models.shrink_on_load import with_shrink_on_load
from offramp.save_and_load import read_config

log = logging.getLogger(__name__)

TRIAL = Example(grey_picture(), "What is shown?", (), "trial")
"""What a served model is tried on, before anybody asks."""


def load_served(
    name: str,
    *,
    backbone: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    quantize: str | None = None,
    compile: bool = False,
    vision: str = "torch",
    shrink_on_load: bool = False,
    chat_template: Path | None = None,
) -> tuple[Adapter | Backbone, Any]:
    """An adapter on its backbone, and the processor; of a tiny model without exits, the backbone.

    name: folder or hub name of an adapter, or photo, tiny-opt or tiny-t5. backbone: instead of the
    adapter's own, with revision: of it. dtype, device, quantize, compile, vision: of the backbone,
    as of `load_named`. shrink_on_load: as of `with_shrink_on_load`. chat_template: file of the one
    that writes conversations, instead of the processor's own.

    Raises:
        AdapterError: there is no such adapter, or it does not fit. InputError: a revision of a
        model that ships, a template that does not work. StorageError: it cannot be read.
    """
    text = None if chat_template is None else _template_of(chat_template)
    how: dict[str, Any] = {"dtype": dtype, "device": device, "quantize": quantize}
    how |= {"compile": compile, "vision": vision}
    model: Adapter | Backbone
    try:
        shipped = shipped_exits(name)
    except InputError:
        model, processor = load_named(name, revision=revision, **how)  # which may be missing too
        log.info("%s ships without exits: every token runs at full depth", name)
    else:
        config = read_config(adapter_folder(name) if shipped is None else shipped)
        if backbone is None:
            backbone, revision = config.backbone, revision or config.revision
        opened, processor = load_named(backbone, revision=revision, **how)
        model = Adapter.load(config, opened)
    if shrink_on_load:
        processor = with_shrink_on_load(processor)
    if text is None:
        return model, processor
    return model, _with_template(model, processor, text, str(chat_template))


def adapter_folder(name: str) -> str:
    """The adapter's folder on this machine, fetched from the hub if it is not there.

    Raises:
        AdapterError: the hub gave none.
    """
    if os.path.isdir(name):
        return name
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(name))
    except Exception as error:  # offline, missing, private: hub errors share no useful base
        raise AdapterError(
            f"No adapter folder {name!r}, and the hub gave none: {error}",
            "Correct the path or the name, or be online; tiny-opt and tiny-t5 ship with offramp.",
        ) from error


# -- chat templates --------------------------------------------------------------------------------


def _template_of(file: Path) -> str:
    """A template's text; read before a model is, which takes longer."""
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
