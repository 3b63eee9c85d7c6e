"""Say what is on a photograph, or answer a question about it, with the built model."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.photo_vlm.command import command, parser_of
from offramp.data.datasets import CAPTION_PROMPT, QUESTION_PROMPT
from offramp.data.example import Example
from offramp.engine.policy import MODES
from offramp.errors import InputError

ADAPTER = Path(__file__).parent / "adapter"


def load(
    folder: Path, dtype: Any = "auto", quantize: str | None = None, vision: str = "torch"
) -> tuple[Any, Any]:
    """Backbone and encoder of "photo" or of a built folder; "auto": in bfloat16, as it was built.

    quantize, vision: as of `Backbone.from_pretrained`.

    Raises:
        InputError: there is none.
    """
    from transformers import AutoProcessor

    import examples.photo_vlm.vision  # noqa: F401  registers the tower
    from offramp.models.backbone import Backbone
    from offramp.models.input_processor import InputProcessor
    from offramp.models.shipped import is_photo, load_named

    if is_photo(str(folder)):
        name = {"auto": "bfloat16"}.get(dtype, str(dtype).removeprefix("torch."))
        backbone, processor = load_named("photo", dtype=name, quantize=quantize, vision=vision)
        return backbone, InputProcessor(backbone, processor)
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} holds no built model.",
            f"Build it: python -m examples.photo_vlm.build --out {folder}",
        )
    backbone = Backbone.from_pretrained(folder, dtype=dtype, quantize=quantize, vision=vision)
    processor = AutoProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]
    return backbone, InputProcessor(backbone, processor)


def answer(
    backbone: Any, encoder: Any, examples: list[Example], longest: int, **how: Any
) -> list[str]:
    """Greedy answers of the full model to a batch. how: of `generate`."""
    import torch

    prompts = encoder.prompts(examples)
    with torch.inference_mode():
        ids = backbone.model.generate(**prompts, max_new_tokens=longest, do_sample=False, **how)
    texts: list[str] = encoder.texts(ids[:, prompts["input_ids"].shape[1] :])
    return texts


def said(
    model: Path, adapter: Path, mode: str, dtype: str, example: Example, longest: int
) -> dict[str, Any]:
    """The answer to one example in a mode, how long it took, and how deep its tokens ran."""
    from offramp.adapter import Adapter
    from offramp.engine.policy import FULL
    from offramp.models.exits import Exits, ExitSet

    backbone, encoder = load(model, dtype)
    if mode == "full":
        ours = Adapter(backbone, ExitSet(Exits(backbone, (1,), kind="lens")), FULL)
    else:
        ours = Adapter.load(adapter, backbone)
        ours = ours.with_policy(replace(ours.policy, lossless=mode == "lossless"))
    inputs = encoder.prompts([example])
    start = time.perf_counter()
    result = ours.generate(inputs, max_new_tokens=longest, do_sample=False)
    seconds = time.perf_counter() - start
    (text,) = encoder.texts(result.new_tokens)
    pieces = [encoder.tokenizer.decode([i]) for i in result.new_tokens[0].tolist()]
    return {
        "text": text,
        "seconds": round(seconds, 3),
        "layers": result.layers,
        "mean_depth": round(result.mean_depth, 2),
        "tokens": list(zip(pieces, result.depths[0].tolist(), strict=True)),
    }


DTYPES = ("float32", "bfloat16")


@command
def main() -> None:
    parser = parser_of("caption", "photo.jpg --mode full --json", str(__doc__), "model")
    parser.add_argument("photo", type=Path, help="any image that Pillow reads")
    parser.add_argument("--mode", choices=MODES, default="full", help="default: %(default)s")
    parser.add_argument(
        "--dtype", choices=DTYPES, default=DTYPES[0],
        help="in bfloat16 the likeliest tokens may tie, and lossless then picks another one "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--question", help="answer this instead of captioning")
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help="folder of trained exits")
    parser.add_argument("--longest", type=int, default=30, help="tokens of an answer at most")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the text")
    arguments = parser.parse_args()
    if arguments.longest < 1:
        raise InputError(f"--longest is {arguments.longest}.", "Give 1 or more.")
    prompt = CAPTION_PROMPT
    if arguments.question:
        prompt = QUESTION_PROMPT.replace("{question}", arguments.question)
    example = Example(arguments.photo, prompt, (), key=str(arguments.photo))
    example.open_image()  # before the model is loaded, so that a bad photograph is reported at once
    mode, dtype = arguments.mode, arguments.dtype
    answer = said(arguments.model, arguments.adapter, mode, dtype, example, arguments.longest)
    if arguments.json:
        row = {"photo": str(arguments.photo), "prompt": prompt, "mode": mode, "dtype": dtype}
        row |= answer
        print(json.dumps(row, ensure_ascii=False))
    else:
        print(answer["text"])


if __name__ == "__main__":
    main()
