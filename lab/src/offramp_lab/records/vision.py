"""Vision towers in PyTorch and in inference engines; rewrites vision.json in lab/records.

One thread, float32. The photo model's tower alone on photographs, by each engine in turn; how far
its tokens are from PyTorch's own; and captions with the shipped exits, as many as are the same. A
tower of SigLIP-base's shape with a projector, random weights, also by llama.cpp in q8_0, with its
products and with ours. `python -m offramp_lab.records.vision` takes ten minutes; engines that are
not installed are left out.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from examples.photo_vlm.rows import read_photographs
from offramp_llama_cpp.entry import DecoderEntry
from offramp_llama_cpp.segment import EngineOptions
from offramp_llama_cpp.vision_export import Looks, export_vision
from offramp_llama_cpp.vision_tower import mtmd_tower
from PIL import Image
from torch import Tensor

from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import generate_answers
from offramp.core.errors import InputError
from offramp.core.models.backbone import Backbone
from offramp.core.models.intercept import InterceptedModel
from offramp.core.models.stand_in import TORCH
from offramp.features.input_processor import InputProcessor
from offramp.features.towers import ENGINES, tower_engine
from offramp.inputs.example import Example
from offramp_lab.experiments.experiment import Experiment, each, same, spent
from offramp_lab.records.record import Record
from offramp_lab.records.subjects import load_photo

RECORD = Record("vision")
TOKENS = 30
Call = tuple[tuple[Any, ...], dict[str, Any]]


def names() -> list[str]:
    """The engines that are installed."""
    found = []
    for name in (TORCH, *ENGINES):
        try:
            tower_engine(name)
        except InputError as error:
            print(error)
            continue
        found.append(name)
    return found


def calls_of(model: Adapter, encoder: InputProcessor, examples: Sequence[Example]) -> list[Call]:
    """How the model calls its tower for each photograph."""
    calls: list[Call] = []
    hook = model.backbone.vision.register_forward_pre_hook(
        lambda _, args, kw: calls.append((args, kw)), with_kwargs=True
    )
    generate_answers(model, encoder, examples, batch_size=1, max_new_tokens=1)
    hook.remove()
    return calls


@torch.inference_mode()
def engines(examples: Sequence[Example], rounds: int) -> list[dict[str, Any]]:
    """An entry for each engine that is installed, of the photo model's tower; that of "torch" is
    what the others are compared with."""
    models = {name: load_photo(vision=name) for name in names()}
    calls = calls_of(*models[TORCH], examples)

    def tokens(call: Call, name: str) -> Tensor:
        args, kw = call
        found: Tensor = models[name][0].backbone.vision(*args, **kw).last_hidden_state
        return found

    entries = compared(models, calls, rounds, tokens)
    answers = {
        name: generate_answers(*model, examples, batch_size=1, max_new_tokens=TOKENS)
        for name, model in models.items()
    }
    return [{**e, "same_captions": same(answers[e["engine"]], answers[TORCH])} for e in entries]


def compared(
    names: Iterable[str], seen: Sequence[Any], rounds: int, tokens: Callable[..., Tensor]
) -> list[dict[str, Any]]:
    """An entry for each way to see: its CPU milliseconds, and its largest distance from "torch".

    tokens: what something to be seen is to the way of a name.
    """
    methods = {name: spent(partial(tokens, name=name)) for name in names}
    runs = Experiment(methods, seen, rounds, warm=2).run()
    wanted, entries = [found for found, _ in runs["torch"][0]], []
    for name, found in runs.items():
        pairs = zip(found[0], wanted, strict=True)
        far = [float((made - want).norm() / want.norm()) for (made, _), want in pairs]
        milliseconds = 1e3 * median(seconds for _, seconds in each(found))
        entries.append({"engine": name, "cpu_milliseconds": milliseconds, "distance": max(far)})
    return entries


SHAPE: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}
"""Of google/siglip-base-patch16-224."""
LOOKS = Looks((0.5,) * 3, (0.5,) * 3)


def vit_model() -> Backbone:
    """A LLaVA whose tower has that shape and whose decoder is as wide as SmolLM2-135M, with two
    layers."""
    from transformers import (
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
    )

    torch.manual_seed(0)
    words = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=128,
    )
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**SHAPE, vision_use_head=False),
        text_config=words,
        image_token_index=1,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return Backbone(LlavaForConditionalGeneration(config), name="siglip-base shape")


@torch.inference_mode()
def vit(examples: Sequence[Example], rounds: int) -> list[dict[str, Any]]:
    """An entry for each way to run a tower of that shape: in PyTorch, and by llama.cpp in q8_0 with
    its products and with ours."""
    own, side = vit_model(), SHAPE["image_size"]
    seen = []
    for photograph in examples:
        small = photograph.open_image().resize((side, side), Image.Resampling.BICUBIC)
        seen.append(LOOKS.seen(np.asarray(small.convert("RGB")))[None])
    ways = {TORCH: own}
    with TemporaryDirectory() as folder:
        file = Path(folder) / "q8_0"
        export_vision(own, file, "q8_0", LOOKS)
        for name, kernels in (("mtmd q8_0", False), ("mtmd q8_0, our kernels", True)):
            ways[name] = own.with_tower(mtmd_tower(own, file, EngineOptions(kernels=kernels)))
        models = {name: InterceptedModel(way, DecoderEntry()).model for name, way in ways.items()}

        def tokens(pixels: Tensor, name: str) -> Tensor:
            features = models[name].base_model.get_image_features
            return torch.cat([*features(pixel_values=pixels, return_dict=True).pooler_output])

        return compared(models, seen, rounds, tokens)


def told(entries: Callable[..., Any], arguments: Namespace, **more: Any) -> dict[str, Any]:
    """A part of the record. more: what else is told of it."""
    photographs = read_photographs(arguments.data)["captions_val"][: arguments.pictures]
    sizes = {"pictures": len(photographs), "rounds": arguments.rounds}
    return {**sizes, **more, "engines": entries(photographs, arguments.rounds)}


PARTS = {"towers": partial(told, engines), "vit": partial(told, vit, shape=SHAPE)}


if __name__ == "__main__":
    RECORD.run(__doc__, PARTS, data=True, rounds=3, pictures=50)
