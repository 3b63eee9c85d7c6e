"""Vision towers in PyTorch and in inference engines; rewrites vision.json in lab/records.

One thread, float32. The photo model's tower alone on photographs, by each engine in turn; how far
its tokens are from PyTorch's own; and captions with the shipped exits, as many as are the same. The
same tower in PyTorch with norms folded, channels last and linears in oneDNN's layout. A
tower of SigLIP-base's shape with a projector, random weights, also by llama.cpp in q8_0, with its
products and with ours. Then from a
photograph's file to the tower's inputs, decoded whole and shrunk on load; and from these to what
enters llama.cpp, of a prompt text that is new and of one that is kept.
`python -m offramp_lab.records.vision` takes ten minutes; engines that are not installed are left
out.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from examples.photo_vlm.rows import read_photographs
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from offramp.adapter import Adapter
from offramp.answers import generate_answers
from offramp.data.example import Example
from offramp.errors import InputError
from offramp.models.backbone import Backbone
from offramp.models.input_processor import InputProcessor
from offramp.models.intercept import InterceptedModel
from offramp.models.quantized.prepacked import prepacked
from offramp.models.shrink_on_load import with_shrink_on_load
from offramp.models.vision_cache import VisionCache
from offramp.models.vision_engine import ENGINES, StandIn, check_vision_engine
from offramp.runtimes.llama_cpp.entry import DecoderEntry, PromptEntry
from offramp.runtimes.llama_cpp.graphs import Architecture
from offramp.runtimes.llama_cpp.segment import EngineOptions
from offramp.runtimes.llama_cpp.vision_export import Looks, export_vision
from offramp.runtimes.llama_cpp.vision_tower import mtmd_tower
from offramp_lab.experiments.experiment import (
    Experiment,
    each,
    in_cpu_milliseconds,
    milliseconds,
    same,
)
from offramp_lab.records.record import Record, Some, asked
from offramp_lab.records.subjects import load_photo

RECORD = Record("vision")
TOKENS = 30
LARGE = (4000, 3000)
STANDARD = 128
"""Of the photo model's processor, in 255ths of a pixel's range."""
Call = tuple[tuple[Any, ...], dict[str, Any]]


def names() -> list[str]:
    """The engines that are installed."""
    found = []
    for name in ENGINES:
        try:
            check_vision_engine(name)
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


Models = Mapping[str, tuple[Adapter, InputProcessor]]


@torch.inference_mode()
def measure(models: Models, examples: Sequence[Example], rounds: int) -> list[dict[str, Any]]:
    """An entry for each model's tower; that of "torch" is what the others are compared with."""
    calls = calls_of(*models["torch"], examples)

    def tokens(call: Call, name: str) -> Tensor:
        args, kw = call
        found: Tensor = models[name][0].backbone.vision(*args, **kw).last_hidden_state
        return found

    entries = compared(models, calls, rounds, tokens)
    answers = {
        name: generate_answers(*model, examples, batch_size=1, max_new_tokens=TOKENS)
        for name, model in models.items()
    }
    for entry in entries:
        entry["same_captions"] = same(answers[entry["engine"]], answers["torch"])
    return entries


def compared(
    names: Iterable[str], seen: Sequence[Any], rounds: int, tokens: Callable[..., Tensor]
) -> list[dict[str, Any]]:
    """An entry for each way to see: its CPU milliseconds, and its largest distance from "torch".

    tokens: what something to be seen is to the way of a name.
    """
    methods = {name: milliseconds(partial(tokens, name=name)) for name in names}
    experiment = Experiment(methods, seen, rounds, warm=2)
    entries = experiment.entries(("engine",), in_cpu_milliseconds)
    wanted = [tokens(one, "torch") for one in seen]
    for entry in entries:
        made = [tokens(one, entry["engine"]) for one in seen]
        far = [(got - want).norm() / want.norm() for got, want in zip(made, wanted, strict=True)]
        entry["distance"] = float(max(far))
    return entries


class Rewritten(StandIn):
    """The same tower in PyTorch, written otherwise."""

    def __init__(self, name: str, own: nn.Module, instead: nn.Module) -> None:
        super().__init__(name, own)
        self._instead = instead

    def forward(self, *args: Any, **kw: Any) -> Any:
        return self._instead(*args, **kw)


def rewritten() -> Models:
    """The photo model's tower in PyTorch, step by step as compilers write it."""
    adapter, encoder = load_photo()
    own = adapter.backbone.vision
    folded = with_norms_folded(copy.deepcopy(own))
    channels_last = copy.deepcopy(folded)
    channels_last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    laid_out = copy.deepcopy(channels_last)
    for parent in laid_out.modules():
        for name, part in parent.named_children():
            if type(part) is nn.Linear:
                setattr(parent, name, prepacked(part))
        if isinstance(parent, nn.TransformerEncoderLayer):  # else it reads plain weights
            parent.register_forward_pre_hook(lambda *_: None)
    towers = {"folded": folded, "channels last": channels_last, "oneDNN linears": laid_out}
    models = {"torch": (adapter, encoder)}
    for name, tower in towers.items():
        seeing = adapter.backbone.with_tower(Rewritten(name, own, tower))
        models[name] = (replace(adapter, backbone=seeing), encoder)
    return models


def with_norms_folded(root: nn.Module) -> nn.Module:
    """Convolutions that do what the batch norms behind them did; in place."""
    for parent in root.modules():
        parts = [*parent.named_children()]
        for (_, conv), (name, norm) in pairwise(parts):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                assert norm.running_mean is not None and norm.running_var is not None
                conv.weight, conv.bias = fuse_conv_bn_weights(
                    conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps,
                    norm.weight, norm.bias,
                )  # fmt: skip
                setattr(parent, name, nn.Identity())
    return root


SHAPE: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 224, "patch_size": 16,
}  # fmt: skip
"""Of google/siglip-base-patch16-224."""
LOOKS = Looks((0.5,) * 3, (0.5,) * 3)


def vit_model() -> tuple[Backbone, dict[str, Any]]:
    """A LLaVA whose tower has that shape and whose decoder is as wide as SmolLM2-135M, with two
    layers; and what its processor would make of a prompt with an image."""
    from transformers import (
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
    )

    torch.manual_seed(0)
    words = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=128,
    )  # fmt: skip
    tower = SiglipVisionConfig(**SHAPE, vision_use_head=False)
    config = LlavaConfig(
        vision_config=tower, text_config=words, image_token_index=1,
        vision_feature_select_strategy="full", vision_feature_layer=-1,
    )  # fmt: skip
    model: Any = LlavaForConditionalGeneration(config)
    ids = torch.tensor([[1] * (SHAPE["image_size"] // SHAPE["patch_size"]) ** 2 + [2, 3]])
    pixels = torch.zeros(1, 3, SHAPE["image_size"], SHAPE["image_size"])
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return Backbone(model, name="siglip-base shape"), example


@torch.inference_mode()
def vit(examples: Sequence[Example], rounds: int) -> list[dict[str, Any]]:
    """An entry for each way to run a tower of that shape."""
    own, example = vit_model()
    ways = {name: own.with_vision(name, example) for name in names()}
    with TemporaryDirectory() as folder:
        for number_format in ("q8_0", "f16"):
            file = Path(folder) / number_format
            export_vision(own, file, number_format, LOOKS)
            for kernels in (False, True):
                tower = mtmd_tower(own, file, EngineOptions(kernels=kernels))
                name = f"mtmd {number_format}{', our products' if kernels else ''}"
                ways[name] = own.with_tower(tower)
        return _seen(ways, examples, rounds)


def _seen(
    ways: Mapping[str, Backbone], examples: Sequence[Example], rounds: int
) -> list[dict[str, Any]]:
    models = {name: InterceptedModel(way, DecoderEntry()).model for name, way in ways.items()}
    side = SHAPE["image_size"]
    seen = []
    for photograph in examples:
        small = photograph.open_image().resize((side, side), Image.Resampling.BICUBIC)
        seen.append(LOOKS.seen(np.asarray(small.convert("RGB")))[None])

    def tokens(pixels: Tensor, name: str) -> Tensor:
        found = models[name].base_model.get_image_features(pixel_values=pixels, return_dict=True)
        return torch.cat([*found.pooler_output])

    entries = compared(models, seen, rounds, tokens)
    for entry in entries:
        entry["tokens"] = len(tokens(seen[0], entry["engine"]))
        entry["packed_bytes"] = getattr(ways[entry["engine"]].tower, "packed_bytes", 0)
    return entries


def decode(photographs: Sequence[Example], rounds: int) -> dict[str, Any]:
    """Milliseconds from a file of 12 megapixels to the model's inputs, and how far the pixels that
    the tower gets are from those of the whole photograph."""
    _, encoder = load_photo()
    shrunk = InputProcessor(encoder.backbone, with_shrink_on_load(encoder.processor))
    encoders = {"whole": encoder, "shrunk": shrunk}
    with TemporaryDirectory() as folder:
        examples = list[Example]()
        for example in photographs:
            file = Path(folder) / f"{len(examples)}.jpg"
            example.open_image().resize(LARGE, Image.Resampling.BICUBIC).save(file, quality=90)
            examples.append(replace(example, image=file))

        def opened(example: Example, name: str) -> Any:
            return encoders[name].prompts([example])

        methods = {name: milliseconds(partial(opened, name=name)) for name in encoders}
        taken = Experiment(methods, examples, rounds, warm=2).run()
        far = []
        for example in examples:
            whole, shrunk = (e.prompts([example])["pixel_values"] for e in encoders.values())
            far.append((whole - shrunk).abs() * STANDARD)
        size = median(example.image.stat().st_size for example in examples)  # type: ignore[union-attr]
    ways = {name: median(each(rows)) for name, rows in taken.items()}
    return {
        "pictures": len(examples), "rounds": rounds, "size": LARGE, "bytes": size,
        "cpu_milliseconds": ways, "mean": float(torch.stack(far).mean()),
        "largest": float(torch.stack(far).max()),
    }  # fmt: skip


@torch.inference_mode()
def prompts(examples: Sequence[Example], rounds: int) -> dict[str, Any]:
    """Milliseconds from a processor's output to what enters llama.cpp, the tower left out: as
    Hugging Face prepares it, and of a prompt text that is kept."""
    adapter, encoder = load_photo()
    inputs = [encoder.prompts([example]) for example in examples]
    options = {"max_new_tokens": TOKENS, "do_sample": False}

    def entry() -> PromptEntry:  # the cache takes the tower's part
        return PromptEntry(
            adapter.backbone, Architecture("llama", {}), EngineOptions(context=512), cache
        )

    def whole(one: dict[str, Any]) -> Any:
        fresh = entry()  # as for every answer, before texts were kept
        return fresh.prompts(fresh.prepare(one, options))[0]

    def lean(one: dict[str, Any]) -> Any:
        return kept.read(one, options)[1][0]

    cache = VisionCache()
    kept = entry()
    same = [np.array_equal(whole(one).states, lean(one).states) for one in inputs]

    methods = {"whole": milliseconds(whole), "kept": milliseconds(lean)}
    taken = Experiment(methods, inputs, rounds).run()
    ways = {name: median(each(rows)) for name, rows in taken.items()}
    return {
        "pictures": len(inputs), "rounds": rounds, "cpu_milliseconds": ways,
        "same_states": sum(same), "from_what_was_kept": kept.kept.hits,
    }  # fmt: skip


Measure = Callable[[Sequence[Example], int], list[dict[str, Any]]]
"""Entries of towers, from photographs and rounds."""


def towers(measured: Measure, photographs: Sequence[Example], rounds: int, **more: Any) -> Any:
    """Those entries, and the machine's load before and after."""
    before = os.getloadavg()[0]
    told: dict[str, Any] = {"pictures": len(photographs), "rounds": rounds, **more}
    told["engines"] = measured(photographs, rounds)
    told["load"] = [round(before, 1), round(os.getloadavg()[0], 1)]
    return told


def engines(photographs: Sequence[Example], rounds: int) -> list[dict[str, Any]]:
    models = {name: load_photo(vision=name) for name in names()}
    return measure(models, photographs, rounds)


def own(photographs: Sequence[Example], rounds: int) -> list[dict[str, Any]]:
    return measure(rewritten(), photographs, rounds)


PARTS: dict[str, Callable[[Sequence[Example], int], Any]] = {
    "towers": partial(towers, engines),
    "own": partial(towers, own),
    "vit": partial(towers, vit, shape=SHAPE),
    "decoding": decode,
    "prompts": prompts,
}


def main() -> None:
    arguments = asked(__doc__, data=True, rounds=3, pictures=50, parts=Some(PARTS))
    photographs = read_photographs(arguments.data)["captions_val"][: arguments.pictures]
    how = (photographs, arguments.rounds)
    RECORD.parts({n: partial(part, *how) for n, part in PARTS.items()}, arguments.parts)


if __name__ == "__main__":
    main()
