"""Answers to a folder of images by many vLLM engines, early exits on: Ray Data LLM.

pip install "ray[data,llm]" and offramp-vllm on every machine, then
    python deploy/vllm/ray_data.py MODEL EXITS IMAGES OUT
"""

from __future__ import annotations

import sys

import ray
from ray.data.llm import build_llm_processor, vLLMEngineProcessorConfig


def main(model: str, exits: str, images: str, out: str) -> None:
    """Write OUT as JSON lines: the file and its answer."""
    config = vLLMEngineProcessorConfig(
        model_source=model,
        engine_kwargs={"additional_config": {"offramp": {"exits": exits}}, "max_model_len": 2048},
        concurrency=1,
        batch_size=64,
        has_image=True,
    )
    ask = build_llm_processor(
        config,
        preprocess=lambda row: {
            "messages": [{"role": "user", "content": [
                {"type": "image", "image": row["image"]}, {"type": "text", "text": "Caption:"},
            ]}],
            "sampling_params": {"temperature": 0.0, "max_tokens": 40},
        },
        postprocess=lambda row: {"path": row["path"], "answer": row["generated_text"]},
    )  # fmt: skip
    ask(ray.data.read_images(images, include_paths=True)).write_json(out)


if __name__ == "__main__":
    main(*sys.argv[1:5])
