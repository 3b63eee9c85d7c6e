"""Several answers at once inside llama.cpp against one after the other; writes
runtimes-together.json.

A small Llama with random weights and one exit, by our kernels and by llama.cpp's: tokens a CPU
second of whole answers, prompts with them, both ways in turns on the same prompts, medians; and
whether all answers are the same. `python -m offramp_lab.records.runtimes.together` takes three
minutes; one thread.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from offramp.adapter import Adapter
from offramp.engine.policy import MODES, ExitPolicy
from offramp.models.backbone import Backbone
from offramp.models.exits import Exits, ExitSet
from offramp.provenance import provenance
from offramp.runtimes.llama_cpp import EngineOptions, LlamaCppRuntime, export_gguf
from offramp.storage import write_json
from offramp_lab.places import RECORDS

RECORD = RECORDS / "runtimes-together.json"
PROMPT, NEW, EXIT = 16, 32, 2
FORMAT = "q4_1"
Rows = list[list[tuple[int, int]]]
"""Tokens and depths of each answer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RECORD)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    adapter = _adapter()
    engine = EngineOptions(context=256, sequences=arguments.sequences)
    entries: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        export_gguf(adapter, folder, FORMAT)
        for kernels in (True, False):
            options = replace(engine, kernels=kernels)
            with LlamaCppRuntime(adapter, folder, engine=options) as runtime:
                entries += [_timed(runtime, mode, arguments.rounds) for mode in MODES]
    found = {"sequences": arguments.sequences, "rounds": arguments.rounds, "format": FORMAT}
    about = provenance(0, [__name__], None)
    write_json(arguments.out, {**found, "entries": entries, "provenance": about})
    for entry in entries:
        print(
            f"{entry['kernels']:9} {entry['mode']:10} at once {entry['at_once']:7.1f} "
            f"tokens/CPU s, one by one {entry['one_by_one']:7.1f}: {entry['ratio']:.2f}x, "
            f"{'the same' if entry['same'] else 'OTHER'} answers"
        )


def _adapter() -> Adapter:
    config = LlamaConfig(
        vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=8,
        num_attention_heads=12, num_key_value_heads=4, max_position_embeddings=512,
        tie_word_embeddings=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    backbone = Backbone(LlamaForCausalLM(config), name="a small Llama")
    exits = Exits(backbone, (EXIT,)).requires_grad_(False)
    return Adapter(backbone, ExitSet(exits), ExitPolicy({EXIT: 0.5}))


def _timed(runtime: LlamaCppRuntime, mode: str, rounds: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1, runtime.backbone.vocabulary, (runtime.rows, PROMPT), generator=draw)
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    # At the median of the exit's scores about half of the tokens exit.
    sure = runtime.generate({"input_ids": ids}, policy=ExitPolicy({EXIT: 1.0}), **options)
    level = float(sure.scores[~sure.scores.isnan()].median())
    options["policy"] = ExitPolicy({EXIT: level}).in_mode(mode)

    def rows_of(some: torch.Tensor) -> Rows:
        made = runtime.generate({"input_ids": some}, **options)
        pairs = zip(made.new_tokens.tolist(), made.depths.tolist(), strict=True)
        return [list(zip(*pair, strict=True)) for pair in pairs]

    ways: dict[str, Callable[[], Rows]] = {
        "at_once": lambda: rows_of(ids),
        "one_by_one": lambda: [rows_of(row[None])[0] for row in ids],
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    answers: dict[str, Rows] = {}
    for _ in range(rounds):
        for way, run in ways.items():
            begin = time.process_time()
            answers[way] = run()
            seconds[way].append(time.process_time() - begin)
    tokens = runtime.rows * NEW
    rates = {way: tokens / median(times) for way, times in seconds.items()}
    return {
        "kernels": "ours" if runtime.packed_bytes else "llama.cpp",
        "mode": mode,
        **rates,
        "ratio": rates["at_once"] / rates["one_by_one"],
        "same": answers["at_once"] == answers["one_by_one"],
        "sizes": [runtime.call_sizes.least, runtime.call_sizes.most],
        "shared": runtime.call_sizes.shared,
    }


if __name__ == "__main__":
    main()
