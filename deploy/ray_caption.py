"""Answers to a folder of images on many machines, by Ray Data.

pip install offramp 'ray[data]>=2.40' on every machine, then
    python deploy/ray_caption.py ADAPTER IMAGES OUT
"""

from __future__ import annotations

import sys
from typing import Any

import ray
from PIL import Image

from offramp import load
from offramp.inputs.example import Example
from offramp.serving.batch_engine import BatchEngine


class Captioner:
    """Adds a column of answers to a batch with a column of images [H, W, 3]."""

    def __init__(self, adapter: str) -> None:
        opened = load(adapter, engine="torch", vision="torch")
        self.encoder = opened.encoder
        self.engine = BatchEngine(opened.adapter, self.encoder, queue=1024)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        pairs = zip(batch["image"], batch["path"], strict=True)
        asked = [Example(Image.fromarray(i), "Caption:", (), path) for i, path in pairs]
        handles = [self.engine.submit(each, wait=True, max_new_tokens=64) for each in asked]
        outputs = [handle.result().output for handle in handles]
        answers = [self.encoder.texts(output.new_tokens)[0] for output in outputs]
        return {"path": batch["path"], "answer": answers}


def main(adapter: str, images: str, out: str) -> None:
    """Write OUT as JSON lines: the file and its answer."""
    pictures = ray.data.read_images(images, include_paths=True, mode="RGB")
    pictures.map_batches(
        Captioner, fn_constructor_args=(adapter,), batch_size=256, concurrency=(1, 8)
    ).write_json(out)


if __name__ == "__main__":
    main(*sys.argv[1:4])
