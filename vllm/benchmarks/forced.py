"""CPU seconds of a large random model at full depth, or where every token leaves at its exit.

    python forced.py FOLDER OUT [exits]

FOLDER has `model` and `exits`, as `record_vllm.py --parts shape` writes them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from speed import make

NEW, PROMPT, AT_ONCE = 24, 16, (1, 8)


def main(folder: Path, out: Path, exits: str | None) -> None:
    from vllm import SamplingParams

    llm = make(folder, exits, model="model", dtype="bfloat16")
    found = []
    for load in AT_ONCE:
        asked = [
            {"prompt_token_ids": [5 + 7 * row + one for one in range(PROMPT)]}
            for row in range(load)
        ]
        took = {}
        for new in (1, NEW):  # of the first token alone, and of all: the rest is decoding
            params = SamplingParams(
                temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False
            )
            begin = time.process_time()
            made = llm.generate(asked, params, use_tqdm=False)
            took[new] = time.process_time() - begin
        found.append(
            {
                "exits": exits is not None,
                "at_once": load,
                "seconds_a_step": (took[NEW] - took[1]) / (NEW - 1),
                "depths": sorted(set(getattr(made[0].outputs[0], "offramp_depths", [])[1:])),
            }
        )
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
