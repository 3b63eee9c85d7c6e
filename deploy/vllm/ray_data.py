"""Answers to a folder of images by many vLLM engines, early exits on: Ray Data LLM.

pip install "ray[data,llm]" and offramp-vllm on every machine, then
    python deploy/vllm/ray_data.py MODEL EXITS IMAGES OUT
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import Any

import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

PROMPT = "Caption:"


def main(model: str, exits: str, images: str, out: str) -> None:
    """Write OUT as JSON lines: the file and its answer."""
    ray.init()
    on_gpus = ray.cluster_resources().get("GPU", 0) > 0
    bundle = {"CPU": 1, "GPU": 1} if on_gpus else {"CPU": 1}
    config = vLLMEngineProcessorConfig(
        model_source=model,
        engine_kwargs={
            "additional_config": {"offramp": {"exits": str(Path(exits).absolute())}},
            "max_model_len": 256, "dtype": "bfloat16" if on_gpus else "float32",
        },
        prepare_multimodal_stage=True,
        placement_group_config={"bundle_per_worker": bundle},
        concurrency=1,
        batch_size=64,
    )  # fmt: skip
    ask = build_processor(
        config,
        preprocess=asking,
        postprocess=lambda row: {"path": row["path"], "answer": row["generated_text"]},
    )
    ask(ray.data.read_binary_files(images, include_paths=True)).write_json(out)


def asking(row: dict[str, Any]) -> dict[str, Any]:
    """What a file's image is asked."""
    picture = base64.b64encode(row["bytes"]).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": PROMPT},
    ]
    return {
        "messages": [{"role": "user", "content": content}],
        "sampling_params": {"temperature": 0.0, "max_tokens": 20},
    }


if __name__ == "__main__":
    main(*sys.argv[1:5])
