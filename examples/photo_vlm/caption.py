"""Say what is on a photograph, or answer a question about it, with the built model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from examples.photo_vlm.command import command, parser_of
from examples.photo_vlm.fetch import WORK

from offramp.data import CAPTION_PROMPT, QUESTION_PROMPT
from offramp.errors import InputError
from offramp.examples import Example


def load(folder: Path) -> tuple[Any, Any]:
    """Backbone and encoder of a built folder. Raise `InputError` where there is none."""
    import examples.photo_vlm.vision  # noqa: F401  registers the tower
    from transformers import AutoProcessor

    from offramp.backbone import Backbone
    from offramp.encode import Encoder

    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} holds no built model.",
            f"Build it: python -m examples.photo_vlm.build --out {folder}",
        )
    backbone = Backbone.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]
    return backbone, Encoder(backbone, processor)


def answer(backbone: Any, encoder: Any, examples: list[Example], longest: int) -> list[str]:
    """Greedy answers of the full model to a batch."""
    import torch

    prompts = encoder.prompts(examples)
    with torch.inference_mode():
        ids = backbone.model.generate(**prompts, max_new_tokens=longest, do_sample=False)
    texts: list[str] = encoder.texts(ids[:, prompts["input_ids"].shape[1] :])
    return texts


def _full(folder: Path, example: Example, longest: int) -> dict[str, Any]:
    backbone, encoder = load(folder)
    start = time.perf_counter()
    (text,) = answer(backbone, encoder, [example], longest)
    return {"text": text, "seconds": round(time.perf_counter() - start, 3)}


MODES = {"full": _full}


@command
def main() -> None:
    parser = parser_of("caption", "photo.jpg --mode full --json", str(__doc__))
    parser.add_argument("photo", type=Path, help="any picture that Pillow reads")
    parser.add_argument("--mode", choices=MODES, default="full", help="default: %(default)s")
    parser.add_argument("--question", help="answer this instead of captioning")
    parser.add_argument("--model", type=Path, default=WORK / "model", help="built folder")
    parser.add_argument("--longest", type=int, default=30, help="tokens of an answer at most")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the text")
    arguments = parser.parse_args()
    if arguments.longest < 1:
        raise InputError(f"--longest is {arguments.longest}.", "Give 1 or more.")
    prompt = CAPTION_PROMPT
    if arguments.question:
        prompt = QUESTION_PROMPT.replace("{question}", arguments.question)
    example = Example(arguments.photo, prompt, (), key=str(arguments.photo))
    example.open_image()  # before the model is loaded, so that a bad photograph is told at once
    said = MODES[arguments.mode](arguments.model, example, arguments.longest)
    if arguments.json:
        row = {"photo": str(arguments.photo), "prompt": prompt, "mode": arguments.mode, **said}
        print(json.dumps(row, ensure_ascii=False))
    else:
        print(said["text"])


if __name__ == "__main__":
    main()
