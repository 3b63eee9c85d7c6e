"""Pictures: the tiny OPT that ships in Blip2, random models of other families, and the photo
models' tower before one, as vLLM's own classes and processors see them."""

from __future__ import annotations

from typing import Any

import pytest
from engine import depths as depths_of
from engine import stored
from PIL import Image

from offramp_vllm.drafts import NAME

FAMILIES = (
    "tiny-opt",
    "llava",
    "llava-mistral",
    "llava-next",
    "photo",
    "photo-chat",
    "idefics3",
    "smolvlm",
    "qwen2-vl",
    "qwen2.5-vl",
    "qwen3-vl",
    "qwen3-vl-moe",
    "internvl",
    "internvl-qwen3",
)
NEW = {"tiny-opt": 30}
EARLY = {"photo-chat": {"offramp_threshold": 0.7}}
"""What asks for early exit of exits without thresholds."""


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_about_pictures_are_offramps(name: str, made: Any, serve: Any) -> None:
    from vllm import SamplingParams

    folder = made(name)
    early, full = stored(folder), stored(folder, "full")
    llm = serve(
        folder / "model",
        folder / "export",
        skip_tokenizer_init=False,
        max_model_len=256,
        speculative_config={"model": NAME, "num_speculative_tokens": 3},
        disable_log_stats=False,
    )
    asked = [
        {
            "prompt": row["prompt"],
            "multi_modal_data": {"image": Image.open(folder / "images" / f"{place}.png")},
        }
        for place, row in enumerate(early)
    ]
    assert len({depth for row in early for depth in row["depths"]}) > 1
    for rows, mode in ((early, "early_exit"), (full, "full"), (full, "lossless")):
        extra = {"offramp_mode": mode}
        if mode == "early_exit":
            extra = EARLY.get(name, extra)
        params = SamplingParams(temperature=0.0, max_tokens=NEW.get(name, 20), extra_args=extra)
        for at_once in (1, 8, 40):
            got = []
            for start in range(0, len(asked), at_once):
                got += llm.generate(asked[start : start + at_once], params, use_tqdm=False)
            assert [list(one.outputs[0].token_ids) for one in got] == [r["tokens"] for r in rows]
            if mode != "lossless":
                depths = [depths_of(one) for one in got]
                assert depths == [row["depths"] for row in rows]
    counts = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
    assert counts["vllm:spec_decode_num_accepted_tokens"] > 0
