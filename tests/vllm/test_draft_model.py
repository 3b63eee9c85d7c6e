"""An exit as a plain checkpoint: it says what the exit says."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from command_line import RunCommand
from PIL import Image

import offramp
from offramp.adapter.shipped import load_tiny, shipped_exits
from offramp_vllm.exports.draft_model import save_draft_model


def test_a_draft_model_writes_what_the_exit_writes(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    backbone, processor = load_tiny("opt")
    adapter = offramp.attach(backbone, str(shipped_exits("tiny-opt")))
    assert save_draft_model(adapter, processor, tmp_path / "draft") == 3
    draft = AutoModelForImageTextToText.from_pretrained(tmp_path / "draft")
    assert draft.config.get_text_config().num_hidden_layers == 3
    inputs = processor(
        images=Image.new("RGB", (64, 64), "red"), text="Caption:", return_tensors="pt"
    )
    policy = offramp.ExitPolicy({2: 0.0})
    ours = adapter.generate(dict(inputs), policy=policy, do_sample=False, max_new_tokens=8)
    with torch.inference_mode():
        theirs = offramp.Backbone.of(draft)
        made = offramp.generate(theirs, dict(inputs), do_sample=False, max_new_tokens=8)
    assert made.new_tokens.tolist() == ours.new_tokens.tolist()


def test_the_command_writes_it_with_a_card(run: RunCommand, tmp_path: Path) -> None:
    out = tmp_path / "draft"
    code, said, err = run(
        "export", "--to", "draft-model", "--adapter", "tiny-opt", "--out", out, "--json"
    )
    assert code == 0, err
    assert json.loads(said) == {"draft_model": str(out), "layers": 3}
    card = (out / "README.md").read_text()
    assert all(word in card for word in ("assistant_model", "convert_hf_to_gguf", "openvino_genai"))
    code, _, err = run(
        "export", "--to", "draft-model", "--adapter", "tiny-opt", "--out", out, "--depths", "5"
    )
    assert code != 0 and "No exit stands at depth 5" in err
