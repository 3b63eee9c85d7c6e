"""Put the photo model together: a LLaVA in a folder of the user's cache."""

from __future__ import annotations

import contextlib
import copy
import logging
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.common.folders import cache_folder
from offramp.common.progress import progress_bar
from offramp.core.errors import DataError, InputError, OfframpError
from offramp.core.missing import how_to_install
from offramp.core.storage import atomic_folder, digest_file, digest_rows, read_json, write_json
from offramp_photo.packages import LANGUAGE, VISION, data_folder, weights_file
from offramp_photo.tower import ARCHITECTURE, IMAGE_TOKEN, EfficientNetLite0, PhotoTowerConfig

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
CARD = "card.json"
BUILT = "built.json"
LAYOUT = 2
"""Raised where the same trained weights would be built into another folder."""


def built_folder(data: Path | None = None, cache: Path | None = None) -> Path:
    """Return the built model's folder. A model that is missing or was changed is built first.

    data: of the trained weights; None: the installed package's. cache: None: the user's.

    Raises:
        InputError: a package is missing. StorageError: weights could not be fetched, or the folder
            not be written. DataError: weights are not those that were trained.
    """
    data, cache = data or data_folder(), cache or cache_folder("photo")
    trained = digest_file(data / WEIGHTS)
    _check_trained(data, trained)
    parts = [LAYOUT, trained, LANGUAGE.digest, VISION.digest]
    folder = cache / digest_rows([[str(part)] for part in parts])[:16]
    if _is_whole(folder):
        return folder
    if folder.exists():
        log.warning("%s is damaged, and is built again.", folder)
        shutil.rmtree(folder)
    log.info("building the photo model in %s, 310 MB; this is done once", folder)
    with progress_bar("photo model", total=4) as bar:
        lm, tokenizer = load_language(weights_file(LANGUAGE, cache))
        bar.update()
        network = load_network(weights_file(VISION, cache))
        bar.update()
        model, processor = assembled(lm, tokenizer, network, data)
        bar.update()
        save(model, processor, folder)
        bar.update()
    return folder


def save(model: Any, processor: Any, folder: Path) -> None:
    """The folder, with the digests of its files."""
    with atomic_folder(folder) as staging:
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
        config = staging / "config.json"
        write_json(config, {**read_json(config), "architectures": [ARCHITECTURE]})
        files = {file.name: digest_file(file) for file in sorted(staging.iterdir())}
        write_json(staging / BUILT, {"files": files})


def _check_trained(data: Path, digest: str) -> None:
    """Raise `DataError` where the weights are not those of their card."""
    if read_json(data / CARD)["sha256"] != digest:
        raise DataError(
            f"{data / WEIGHTS} is damaged: its SHA-256 is not that of {CARD}.",
            "Install it again: pip install --force-reinstall --no-deps offramp-photo",
        )


def _is_whole(folder: Path) -> bool:
    try:
        files = read_json(folder / BUILT)["files"]
        return all(digest_file(folder / name) == digest for name, digest in files.items())
    except (OfframpError, KeyError, TypeError, AttributeError):
        return False


# -- parts --------------------------------------------------------------------------------------


def load_language(file: Path, **kwargs: Any) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct of a GGUF file, in bfloat16 and frozen, and its tokenizer.

    Raises:
        InputError: the package gguf is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise InputError(
            "The photo model is built of a GGUF file, and the package gguf is not installed.",
            how_to_install("offramp-photo"),
        ) from error
    with _silent():
        tokenizer = AutoTokenizer.from_pretrained(**where)
        # The chat template would put forty tokens around each prompt.
        tokenizer.chat_template = None
        lm = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16, **kwargs)
    # The weights are no longer quantized, and must not be taken for it when they are saved.
    del lm.config.quantization_config
    lm.requires_grad_(False)
    return lm.train(False), tokenizer


def load_network(file: Path) -> EfficientNetLite0:
    """EfficientNet-lite0 with its ImageNet weights, without the classifier."""
    weights = torch.load(file, weights_only=True)
    network = EfficientNetLite0()
    network.load_state_dict({k: v for k, v in weights.items() if not k.startswith("_fc.")})
    network.requires_grad_(False)
    return network.eval()


def assembled(lm: Any, tokenizer: Any, network: EfficientNetLite0, data: Path) -> tuple[Any, Any]:
    """The whole VLM, in the language model's precision, and its processor.

    data: folder of what was trained; its updates are added to `lm` itself.
    """
    from safetensors.torch import load_file

    card = read_json(data / CARD)
    config = PhotoTowerConfig(**card["tower"])
    groups: dict[str, dict[str, Tensor]] = {"bridge": {}, "detector": {}, "lora": {}}
    for name, tensor in load_file(data / WEIGHTS).items():
        group, _, inner = name.partition(".")
        groups[group][inner] = tensor
    add_updates(lm, lm.state_dict(), groups["lora"])
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    model = empty_model(lm, config, image_token)
    tower = model.model.vision_tower
    model.model.language_model.load_state_dict(lm.model.state_dict())
    tower.net.load_state_dict(network.state_dict())
    tower.bridge.load_state_dict(groups["bridge"])
    tower.detector.load_state_dict(groups["detector"])
    model.tie_weights()
    return model.eval().requires_grad_(False), new_processor(tokenizer, config)


@torch.no_grad()
def add_updates(lm: Any, start: Mapping[str, Tensor], updates: Mapping[str, Tensor]) -> None:
    """Set linear layers of a language model to their weights in `start` plus low-rank updates.

    updates: for each layer's name, NAME.a [rank, in] and NAME.b [out, rank].
    """
    for layer in sorted({name.rpartition(".")[0] for name in updates}):
        change = updates[f"{layer}.b"].float() @ updates[f"{layer}.a"].float()
        weight = start[f"{layer}.weight"].float() + change
        lm.get_submodule(layer).weight.copy_(weight)


@torch.no_grad()
def hand_on(projector: Any) -> None:
    """Make a LLaVA's projector the identity."""
    for linear in (projector.linear_1, projector.linear_2):
        torch.nn.init.eye_(linear.weight)
        torch.nn.init.zeros_(linear.bias)


def empty_model(lm: Any, config: PhotoTowerConfig, image_token: int) -> Any:
    """A `LlavaForConditionalGeneration` in whose tower all visual tokens are made.

    Its own projector hands them on as they are: the detected words are embeddings already.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    whole = LlavaConfig(
        vision_config=config,
        # A copy: a LLaVA configuration sets its text model's attention, here to none.
        text_config=copy.deepcopy(lm.config),
        image_token_index=image_token,
        image_seq_length=config.tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        projector_hidden_act="linear",
        tie_word_embeddings=True,
    )
    model: Any = LlavaForConditionalGeneration._from_config(whole, dtype=lm.dtype)  # type: ignore[no-untyped-call]
    hand_on(model.model.multi_modal_projector)
    model.generation_config.eos_token_id = lm.config.eos_token_id
    model.generation_config.pad_token_id = lm.config.eos_token_id
    return model


def new_processor(tokenizer: Any, config: PhotoTowerConfig) -> Any:
    """LLaVA's own processor; a photograph becomes as many image tokens as the tower gives."""
    from transformers import LlavaProcessor

    return LlavaProcessor(  # type: ignore[no-untyped-call]
        image_processor(config.image_size),
        tokenizer,
        patch_size=config.image_size // config.grid,
        num_additional_image_tokens=config.queries + config.words,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
    )


def image_processor(side: int = 224) -> Any:
    """(x - 127) / 128 at side x side, squashed as the photographs that were trained on are."""
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(
        do_resize=True,
        size={"height": side, "width": side},
        do_center_crop=False,
        do_rescale=False,
        do_convert_rgb=True,
        do_normalize=True,
        image_mean=[127.0] * 3,
        image_std=[128.0] * 3,
    )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what transformers says while it reads a GGUF file: bars, and advice on precision."""
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging as theirs

    bar = vars(reader)["tqdm"]  # which no setting of theirs hides
    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()  # type: ignore[no-untyped-call]
    theirs.disable_progress_bar()  # type: ignore[no-untyped-call]
    vars(reader)["tqdm"] = partial(bar, disable=True)
    try:
        yield
    finally:
        vars(reader)["tqdm"] = bar
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()  # type: ignore[no-untyped-call]
