"""Models and processors by a folder or a hub name: what keeps one from loading, in two lines."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from offramp.core.errors import InputError, UnsupportedBackboneError
from offramp.core.missing import how_to_install, missing_package


def load_model(
    name: str | Path,
    *,
    revision: str | None,
    dtype: torch.dtype | str,
    device: str | None,
    **kwargs: Any,
) -> Any:
    """Load a model by hub name or folder; see `Backbone.from_pretrained`.

    Raises:
        InputError: there is no such model or device, or a package that it needs, or some of its
            weights, are missing.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if device is not None:
        check_device(device)
    options = {"trust_remote_code": False, **kwargs}
    try:
        text = _is_language_model(name, revision, options)
        kind = AutoModelForCausalLM if text else AutoModelForImageTextToText
        loaded: Any = kind.from_pretrained(
            str(name), revision=revision, dtype=dtype, output_loading_info=True, **options
        )
    except Exception as error:  # damaged files and missing packages raise nearly every builtin
        raise not_loaded(
            f"No vision-language model could be loaded from {str(name)!r}, nor a language model",
            error,
            "Give a folder written by save_pretrained, or a hub name such as "
            "Salesforce/blip2-opt-2.7b (and be online, or have it in the cache).",
        ) from error
    model, told = loaded
    _check_whole(name, model, told["missing_keys"])
    if device is None or _is_on(model.device, torch.device(device)):
        return model
    return model.to(device)


def _check_whole(name: str | Path, model: nn.Module, missing: Iterable[str]) -> None:
    """Raise `InputError` where weights were not in the files: transformers draws them anew."""
    drawn = sorted({key for key, _ in model.named_parameters()} & {*missing})
    if drawn:
        raise InputError(
            f"{len(drawn)} weights of {str(name)!r} are not in its files, {drawn[0]} among them.",
            "Give a folder that is whole; if they are meant to be drawn, load the model with "
            "transformers and pass it to Backbone.",
        )


def _is_language_model(name: str | Path, revision: str | None, options: dict[str, Any]) -> bool:
    """Whether the configuration is of a model that continues text, and sees no images."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
    )

    trusted = options["trust_remote_code"]
    config = AutoConfig.from_pretrained(str(name), revision=revision, trust_remote_code=trusted)
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return False
    named = getattr(config, "auto_map", None) or {}
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or (
        "AutoModelForCausalLM" in named and "AutoModelForImageTextToText" not in named
    )


def _is_on(device: torch.device, wanted: torch.device) -> bool:
    """Whether it is there already: some quantised models refuse to be moved."""
    return device.type == wanted.type and wanted.index in (None, device.index)


def unwrap_peft(model: nn.Module) -> nn.Module:
    """Return the base model of a LoRA-wrapped one: LoRA lives in the layers, so nothing is lost."""
    unwrap = getattr(model, "get_base_model", None)
    if unwrap is None:
        return model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise UnsupportedBackboneError(
            "A prompt-learning PEFT adapter changes the input, outside the layers.",
            "Use an adapter that lives in the layers (such as LoRA), or merge it.",
        )
    return unwrap()  # type: ignore[no-any-return]


def load_processor(
    name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Load the processor that was saved beside a model.

    trust_remote_code: whether code that comes with it may run.

    Raises:
        InputError: there is none, or a package that it needs is missing.
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            str(name), revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # damaged files and missing packages raise nearly every builtin
        raise not_loaded(
            f"No processor could be loaded from {str(name)!r}",
            error,
            "Save the model's processor beside it: processor.save_pretrained(folder).",
        ) from error


def grey_picture() -> Image.Image:
    """Return a plain grey image, on which models are tried."""
    return Image.new("RGB", (64, 64), "gray")


def grey_example(processor: Any, model: Any) -> dict[str, Any] | None:
    """Return a processor's output for a grey picture and a few words; None where the model cannot
    take such a prompt."""
    words = "Describe the picture."
    for written in (_by_template, _behind_mark, lambda _, words: words):
        try:
            text = written(processor, words)
            made = processor(images=[grey_picture()], text=[text], return_tensors="pt")
            inputs = {
                key: value.to(model.device, model.dtype if value.is_floating_point() else None)
                for key, value in made.items()
                if isinstance(value, torch.Tensor)
            }
            with torch.inference_mode():
                model.generate(**inputs, max_new_tokens=1)
        except Exception:  # each processor, and each model, has its own way to refuse
            continue
        return inputs
    return None


def _by_template(processor: Any, words: str) -> Any:
    content = [{"type": "image"}, {"type": "text", "text": words}]
    turns = [{"role": "user", "content": content}]
    return processor.apply_chat_template(turns, add_generation_prompt=True)


def _behind_mark(processor: Any, words: str) -> str:
    return f"{processor.image_token} {words}"


def not_loaded(what: str, error: Exception, remedy: str) -> InputError:
    """Return the error for a failed load by transformers. what: its name. remedy: used where no
    package is missing."""
    if "trust_remote_code" in str(error):
        return InputError(
            f"{what}: it comes with code of its own, which was not run.",
            "Read that code; if you trust it, pass trust_remote_code=True in Python.",
        )
    package = missing_package(error)
    if package is None and not isinstance(error, ImportError):
        return InputError(f"{what}: {_reason(error)}", remedy)
    named = "" if package is None else f"the package {package} is missing or broken: "
    return InputError(f"{what}: {named}{_reason(error)}", how_to_install(package))


def check_device(name: str) -> None:
    """Raise `InputError` where the machine has no such device."""
    try:
        if torch.empty(0, device=name).is_meta:
            raise NotImplementedError("it holds no numbers")
    except (RuntimeError, AssertionError, NotImplementedError, ValueError, ImportError) as error:
        raise InputError(
            f"The device {name!r} cannot be used: {_reason(error)}",
            "Give cpu, or cuda on a machine with a GPU and a torch that was built for it.",
        ) from error


def _reason(error: Exception) -> str:
    """What went wrong, in a line of at most 300 letters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
