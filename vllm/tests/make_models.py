"""Tiny models of random weights with exits, and the answers that offramp gives: written by the
environment that has offramp, read by the one that has vLLM.

    python make_models.py FOLDER [NAME ...]
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import make_vlms
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import offramp
from offramp.adapter.adapter import Adapter
from offramp.calibration.trust_path import NOTHING
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.models.exits import Exits, ExitSet
from offramp_vllm.exports.draft_model import save_draft_model
from offramp_vllm.exports.eagle3 import Eagle3Drafter
from offramp_vllm.exports.speculators import save_drafter
from offramp_vllm.exports.vllm import export_vllm

LAYERS, WORDS = 6, 512
ROPE = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MIXED = ["sliding_attention", "full_attention"] * (LAYERS // 2)
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": ROPE,
    "mistral": {**ROPE, "sliding_window": None},
    "qwen2": ROPE,
    "qwen3": ROPE,
    "phi3": ROPE,
    "granite": {**ROPE, "logits_scaling": 2.0},
    "stablelm": ROPE,
    "cohere": ROPE,
    "glm4": {**ROPE, "partial_rotary_factor": 0.5},
    "gemma2": {**ROPE, "sliding_window": 32, "layer_types": MIXED},
    "gemma3_text": {**ROPE, "sliding_window": 32, "layer_types": MIXED},
    "qwen3_moe": {**ROPE, **make_vlms.MIXTURE},
    "mixtral": {**ROPE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "ends": {**ROPE, "model_type": "llama", "eos_token_id": [*range(2, WORDS, 8)]},
    "ends_on": {**ROPE, "model_type": "llama", "eos_token_id": [*range(2, WORDS, 8)]},
    "short": {**ROPE, "model_type": "llama", "num_hidden_layers": 4},
    "opt": {
        "vocab_size": WORDS,
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "max_position_embeddings": 1024,
        "word_embed_proj_dim": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "gpt2": {
        "vocab_size": WORDS,
        "n_embd": 64,
        "n_layer": LAYERS,
        "n_head": 2,
        "n_positions": 1024,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "bloom": {
        "vocab_size": WORDS,
        "hidden_size": 64,
        "n_layer": LAYERS,
        "n_head": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
AT = {2: 0.7, 4: 0.7}
"""Thresholds of requests where exits have none."""
ADAPTERS = "one", "two"
NEW = 20
PROMPTS = 24
TRUSTS = "ends", "ends_on"
"""Models whose answers end by a token, and whose exits answer early by trust."""


def main(folder: Path, names: list[str]) -> None:
    for name in names or [*CONFIGS, *make_vlms.KINDS]:
        make(folder / name, name)


def scenes(folder: Path) -> None:
    """The tiny OPT that ships, behind Blip2, and pictures: the folders `model`, `export` and
    `images`, and answers.json, whose prompts are texts."""
    from offramp.adapter.shipped import load_tiny, shipped_exits, tiny_folder
    from offramp.data.scenes import tasks
    from offramp.features.input_processor import InputProcessor

    shutil.copytree(tiny_folder("opt"), folder / "model", dirs_exist_ok=True)
    backbone, processor = load_tiny("opt")
    adapter = offramp.attach(backbone, str(shipped_exits("tiny-opt")))
    texts = [processor.tokenizer(t)["input_ids"] for t in ("Caption:", "Question: what? Answer:")]
    encoder = InputProcessor(backbone, processor)
    export_vllm(adapter, folder / "export", texts, encoder=encoder, max_new_tokens=8)
    examples = [*tasks.captions("test", 20).examples, *tasks.questions("test", 20).examples][:40]
    (folder / "images").mkdir(exist_ok=True)
    answers: dict[str, list[Any]] = {"early_exit": [], "full": []}
    for place, example in enumerate(examples):
        example.image.save(folder / "images" / f"{place}.png")
        inputs = encoder.prompts([example])
        for mode, rows in answers.items():
            for _ in range(2 if place == 0 else 1):  # an engine is tried on its first answer
                made = adapter.generate(inputs, mode=mode, do_sample=False, max_new_tokens=30)
            tokens, depths = made.new_tokens[0].tolist(), made.depths[0].tolist()
            rows.append({"prompt": example.prompt, "tokens": tokens, "depths": depths})
    (folder / "answers.json").write_text(json.dumps(answers))
    print("tiny-opt", len(examples), flush=True)


def make(folder: Path, name: str) -> None:
    """The folders `model`, `exits` and `export`, and answers.json."""
    if name == "tiny-opt":
        scenes(folder)
        return
    torch.manual_seed(0)
    if name in make_vlms.KINDS:
        asked = make_vlms.build(name, ROPE, folder)
    else:
        asked = [(ids, _texts(ids)) for ids in _build(name, folder)]
    backbone = offramp.Backbone.from_pretrained(folder / "model", dtype="float32")
    if name not in make_vlms.KINDS:  # as a self-check of theirs shows: first tokens exit
        backbone.learn(causal_prompt=True, lossless=True)
    chat, trusts = name == "photo-chat", name in TRUSTS
    depths = (2, 4) if name == "llama" or chat else (2,)
    exits = Exits(backbone, depths, kind="drafting" if chat or name == "ends_on" else "layer")
    for weight in exits.parameters():
        weight.data += 0.1 * weight.data.std() * torch.randn_like(weight)
    shortlist = torch.arange(3, WORDS, 3) if name in ("qwen3", "opt") else None
    attached = ExitSet(exits.requires_grad_(False), shortlist, measured={"size": 1})
    if shortlist is None:
        attached = ExitSet(exits)
    inputs = [one for _, one in asked]
    policy = _half_leaves(backbone, attached, depths, inputs, shortlist is not None)
    if chat:  # ships without thresholds, so that a request gives one
        policy = ExitPolicy(drafts={2: 0.1}, lossless=True)
    if trusts:
        policy = _half_taken(backbone, attached, inputs)
    adapter = Adapter(backbone, attached, policy)
    adapter.save(folder / "exits")
    adapter = Adapter.load(folder / "exits", backbone)
    texts = _prompts(make_vlms.FIRST)[:4]  # without the token of an image
    encoder = make_vlms.encoder(name, backbone, folder / "model")
    export_vllm(adapter, folder / "export", texts, encoder=encoder, max_new_tokens=8)
    if name == "llama":
        save_draft_model(adapter, None, folder / "draft")
    if name in ("llama", "llava"):  # as untrained: a copy of the last layer
        drafter = Eagle3Drafter(backbone, torch.arange(0, WORDS, 2))
        right = {"acceptance": [0.0] * 3}
        save_drafter(drafter, backbone, folder / "eagle", drafts=3, measured=right)
    answers = {}
    for mode in ("early_exit", "full"):
        chosen = adapter.policy.asked(mode, AT if chat else None, depths)
        made = [(prompt, *_answer(adapter, one, chosen)) for prompt, one in asked]
        answers[mode] = [{"prompt": p, "tokens": t, "depths": d} for p, t, d in made]
    (folder / "answers.json").write_text(json.dumps(answers))
    if name == "llama":
        for seed, adapter_name in enumerate(ADAPTERS):
            adapted(folder, adapter_name, seed, adapter, asked)
    depths_seen = [d for one in answers["early_exit"] for d in one["depths"]]
    shares = {d: depths_seen.count(d) / len(depths_seen) for d in sorted(set(depths_seen))}
    print(name, dict(policy.thresholds), dict(policy.first or {}), shares, flush=True)


def adapted(folder: Path, name: str, seed: int, exits: Adapter, asked: list[Any]) -> None:
    """A random LoRA adapter in PEFT's layout, and the answers of the model it is merged into."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(10 + seed)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32")
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=8, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    tuned = get_peft_model(model, config)
    for part, weight in tuned.named_parameters():
        if "lora_" in part:
            weight.data = 0.2 * torch.randn_like(weight)
    tuned.save_pretrained(folder / name)
    backbone = offramp.Backbone.of(tuned.merge_and_unload().eval())
    backbone.learn(causal_prompt=True, lossless=True)
    beside = Exits(backbone, exits.exits.depths)
    beside.load_state_dict(exits.exits.modules.state_dict())
    answers: dict[str, list[Any]] = {"early_exit": [], "full": []}
    for mode, rows in answers.items():
        policy = exits.chosen_policy(mode, None)
        for prompt, inputs in asked:
            made = _run(backbone, ExitSet(beside.requires_grad_(False)), inputs, policy)
            tokens, depths = made.new_tokens[0].tolist(), made.depths[0].tolist()
            rows.append({"prompt": prompt, "tokens": tokens, "depths": depths})
    (folder / name / "answers.json").write_text(json.dumps(answers))


def _build(name: str, folder: Path) -> list[list[int]]:
    """Write a language model; return prompts."""
    options = dict(CONFIGS[name])
    config = AutoConfig.for_model(options.pop("model_type", name), **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    sharpen(model)
    model.save_pretrained(folder / "model")
    return _prompts()


def sharpen(model: Any) -> None:
    """Random weights whose answers do not repeat one token, and are sure of some."""
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            wide = "embed" in name or "wte" in name
            weight.data = torch.randn_like(weight) * (0.5 if wide else 0.1)
    head = model.get_output_embeddings()
    head.weight.data = torch.randn_like(head.weight) * 0.35


def _prompts(first: int = 3) -> list[list[int]]:
    """Token ids of prompts, none below `first`."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 70, (PROMPTS,), generator=draw).tolist()
    return [torch.randint(first, WORDS, (n,), generator=draw).tolist() for n in lengths]


def _half_leaves(backbone: Any, exits: Any, depths: Any, inputs: Any, short: bool) -> ExitPolicy:
    """Thresholds at which about half of the tokens leave."""
    policy = ExitPolicy(dict.fromkeys(depths, 1.0), shortlist=short)
    scores = []
    for one in inputs[:8]:
        scores += _run(backbone, exits, one, policy).scores[0].tolist()
    at = float(torch.tensor(scores).nanmedian())
    return ExitPolicy(
        {d: round(at, 4) for d in depths}, shortlist=short, first={depths[0]: round(at * 0.9, 4)}
    )


def _half_taken(backbone: Any, exits: Any, inputs: Any) -> ExitPolicy:
    """A trust at which about half of the drafts that end an answer are taken."""
    policy = ExitPolicy(drafts={2: 0.0}, max_draft=12, trust=NOTHING)
    made = [_run(backbone, exits, one, policy) for one in inputs]
    products = sorted(product for one in made for product, _ in one.offers[0])
    half = len(products) // 2
    return replace(policy, trust=sum(products[half : half + 2]) / 2)


def _texts(ids: list[int]) -> dict[str, Any]:
    prompt = torch.tensor([ids])
    return {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}


def _run(backbone: Any, exits: Any, inputs: dict[str, Any], policy: ExitPolicy) -> Any:
    return offramp.generate(
        backbone, dict(inputs), exits=exits, policy=policy, do_sample=False, max_new_tokens=NEW
    )


def _answer(
    adapter: Adapter, inputs: dict[str, Any], policy: ExitPolicy
) -> tuple[list[int], list[int]]:
    made = _run(adapter.backbone, adapter.exits, inputs, policy)
    return made.new_tokens[0].tolist(), made.depths[0].tolist()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
