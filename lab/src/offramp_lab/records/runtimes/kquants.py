"""Products of K-quants, by our kernels and by llama.cpp's; rewrites runtimes-kquants.json.

Three layers of the shape of a 1B Llama with random weights, milliseconds of CPU time of calls over
some rows, all ways in turns: medians. `python -m offramp_lab.records.runtimes.kquants` takes two
minutes; one thread.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from offramp.models.backbone import Backbone
from offramp.runtimes.llama_cpp import EngineOptions, ExportFormats
from offramp.runtimes.llama_cpp.gguf_export import export_whole
from offramp.runtimes.llama_cpp.segment import Segment
from offramp_lab.experiments.experiment import Experiment, each, milliseconds
from offramp_lab.records.record import Record, asked

RECORD = Record("runtimes-kquants", "runtimes.kquants")
FORMATS = ("q4_k", "q5_k", "q6_k", "q5_0", "q4_1")
ROWS = (1, 2, 4, 8)
OURS = EngineOptions(context=128)
WAYS = {"ours": OURS, "llama.cpp": replace(OURS, kernels=False)}


def main() -> None:
    rounds = asked(__doc__, rounds=15).rounds
    backbone = _backbone()
    entries = [entry for layers in FORMATS for entry in _timed(backbone, layers, rounds)]
    RECORD.write({"rounds": rounds, "entries": entries})


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
        logits = {way: _logits(segment, states).copy() for way, segment in opened.items()}
        calls = {
            (way, rows): milliseconds(partial(_logits, segment, states[:rows]))
            for rows in ROWS
            for way, segment in opened.items()
        }
        entries = Experiment(calls, rounds=rounds).entries(
            ("kernels", "rows"), lambda taken: {"milliseconds": median(each(taken))}
        )
        for segment in opened.values():
            segment.close()
        size = file.stat().st_size
    alike = float(np.corrcoef(logits["ours"].ravel(), logits["llama.cpp"].ravel())[0, 1])
    return [{"format": layers, "bytes": size, "alike": alike, **entry} for entry in entries]


def _logits(segment: Segment, states: Any, _: None = None) -> Any:
    """Of states that are taken back."""
    segment.feed(states, 1)
    logits = segment.logits(1)
    segment.crop(len(states))
    return logits


if __name__ == "__main__":
    main()
