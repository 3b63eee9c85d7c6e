"""Pictures: the tiny OPT that ships, as vLLM's own Blip2 sees them."""

from __future__ import annotations

from typing import Any

from PIL import Image

from engine import stored


def test_answers_about_pictures_are_offramps(made: Any, serve: Any) -> None:
    from vllm import SamplingParams

    folder = made("tiny-opt")
    early, full = stored(folder), stored(folder, "full")
    llm = serve(folder / "model", folder / "export", skip_tokenizer_init=False, max_model_len=256)
    asked = [
        {
            "prompt": row["prompt"],
            "multi_modal_data": {"image": Image.open(folder / "images" / f"{place}.png")},
        }
        for place, row in enumerate(early)
    ]
    for rows, extra in ((early, {}), (full, {"offramp_mode": "full"})):
        for at_once in (1, 8, 40):
            params = SamplingParams(temperature=0.0, max_tokens=30, extra_args=extra)
            got = []
            for start in range(0, len(asked), at_once):
                got += llm.generate(asked[start : start + at_once], params, use_tqdm=False)
            tokens = [list(one.outputs[0].token_ids) for one in got]
            depths = [one.kv_transfer_params["offramp"]["depths"] for one in got]
            assert tokens == [row["tokens"] for row in rows]
            assert depths == [row["depths"] for row in rows]
