"""Products of K-quants, by our kernels and by llama.cpp's; rewrites runtimes-kquants.json.

Three layers of the shape of a 1B Llama with random weights, milliseconds of CPU time of calls over
some rows, all ways in turns: medians. `python -m offramp_lab.records.runtimes.kquants` takes two
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

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from offramp.models.backbone import Backbone
from offramp.provenance import provenance
from offramp.runtimes.llama_cpp import EngineOptions, ExportFormats
from offramp.runtimes.llama_cpp.gguf_export import export_whole
from offramp.runtimes.llama_cpp.segment import Segment
from offramp.storage import write_json
from offramp_lab.places import RECORDS

RECORD = RECORDS / "runtimes-kquants.json"
FORMATS = ("q4_k", "q5_k", "q6_k", "q5_0", "q4_1")
ROWS = (1, 2, 4, 8)
OURS = EngineOptions(context=128)
WAYS = {"ours": OURS, "llama.cpp": replace(OURS, kernels=False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    backbone = _backbone()
    entries = [entry for layers in FORMATS for entry in _timed(backbone, layers, rounds)]
    about = provenance(0, ["offramp_lab.records.runtimes.kquants"], None)
    write_json(RECORD, {"rounds": rounds, "entries": entries, "provenance": about})


def _backbone() -> Backbone:
    config = LlamaConfig(
        vocab_size=256, hidden_size=2048, intermediate_size=5632, num_hidden_layers=3,
        num_attention_heads=16, num_key_value_heads=8, max_position_embeddings=256,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return Backbone(LlamaForCausalLM(config), name="three layers of a 1B Llama")


def _timed(backbone: Backbone, layers: str, rounds: int) -> list[dict[str, Any]]:
    states = np.random.default_rng(0).normal(size=(max(ROWS), backbone.width)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "whole.gguf"
        export_whole(backbone, file, ExportFormats(layers, layers, layers))
        opened = {way: Segment(file, options, tap_layer=None) for way, options in WAYS.items()}
        found: dict[tuple[str, int], list[float]] = {}
        logits = {}
        for way, segment in opened.items():
            logits[way] = _call(segment, states)().copy()
        for _ in range(rounds):
            for rows in ROWS:
                for way, segment in opened.items():
                    begin = time.process_time()
                    _call(segment, states[:rows])()
                    found.setdefault((way, rows), []).append(time.process_time() - begin)
        for segment in opened.values():
            segment.close()
        size = file.stat().st_size
    alike = float(np.corrcoef(logits["ours"].ravel(), logits["llama.cpp"].ravel())[0, 1])
    entry = {"format": layers, "bytes": size, "alike": alike}
    return [
        {**entry, "kernels": way, "rows": rows, "milliseconds": 1000 * median(times)}
        for (way, rows), times in found.items()
    ]


def _call(segment: Segment, states: Any) -> Callable[[], Any]:
    def run() -> Any:
        segment.feed(states, 1)
        logits = segment.logits(1)
        segment.crop(len(states))
        return logits

    return run


if __name__ == "__main__":
    main()
