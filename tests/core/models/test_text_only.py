"""Laws of language models that see no images: exits are trained, calibrated and run on them as on
others, from a text file of prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from gguf_cases import refused
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from offramp.core.errors import DataError, InputError
from offramp.core.models.backbone import Backbone
from offramp.data.formats import read_items
from offramp.features.input_processor import InputProcessor
from offramp.inputs.example import Example, examples_digest

FAMILIES = ("llama", "qwen3", "gemma3_text", "gpt2", "phi3", "olmo2", "gpt_oss")
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *[f"w{n}" for n in range(92)]]


def config_of(name: str) -> Any:
    from transformers import CONFIG_MAPPING

    sizes: dict[str, Any] = {
        "vocab_size": families.VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if name == "gpt2":
        sizes = {
            "vocab_size": families.VOCABULARY,
            "n_embd": 32,
            "n_layer": 6,
            "n_head": 4,
            "n_positions": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
    if name in ("gemma3_text", "gpt_oss"):
        sizes |= {"head_dim": 8, "sliding_window": 16}
    if name == "gpt_oss":
        sizes |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    return CONFIG_MAPPING[name](**sizes)


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.25)
        model.get_input_embeddings().weight.normal_(0.0, 0.1)
    model.tie_weights()
    return model.eval()


def saved(name: str, folder: Path) -> Path:
    """A folder as a hub has it: the model and its tokenizer."""
    model_of(name).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "prompts.txt"
    lines = [" ".join(f"w{(7 * i + 5 * j) % 92}" for j in range(3 + i % 4)) for i in range(60)]
    file.write_text("\n".join([*lines, "", lines[0]]))
    return file


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_is_exact_in_every_mode(name: str) -> None:
    """By the check at load: exits, a first token that leaves early, drafts taken back."""
    from offramp.features.self_check import check_decoding

    backbone = Backbone(model_of(name), name=name)
    assert backbone.text_only
    ids = torch.tensor([[5, 9, 33, 70, 12]])
    check = check_decoding(backbone, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert all(map(check.holds, (check.plain, check.exits, check.first_token, check.lossless)))


def test_prompts_are_lines_of_a_text_file(prompts: Path, tmp_path: Path) -> None:
    items = read_items([prompts], require_answers=False)
    assert len(items) == 60, "one that comes twice counts once"
    examples = [item.example for item in items]
    assert all(example.is_text and not example.answers for example in examples)
    assert len(read_items([prompts], limit=7, require_answers=False)) == 7
    assert examples_digest(examples) != examples_digest(examples[1:])
    refused(lambda: read_items([prompts]), DataError, "unsupervised")
    (tmp_path / "odd.txt").write_bytes("a\u2028b\fc\r\nd\n".encode())
    odd = read_items([tmp_path / "odd.txt"], require_answers=False)
    assert [item.example.prompt for item in odd] == ["a\u2028b\fc", "d"]
    (tmp_path / "none.txt").write_text("\n \n")
    refused(
        lambda: read_items([tmp_path / "none.txt"], require_answers=False), DataError, "no prompts"
    )
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00a")
    refused(lambda: read_items([tmp_path / "bad.txt"], require_answers=False), DataError, "UTF-8")
    refused(lambda: Example.of_text(" ", key="x"), InputError, "empty")
    refused(examples[0].open_image, DataError, "without an image")


@pytest.mark.slow
def test_from_a_folder_to_an_answer(prompts: Path, tmp_path: Path, run: Any) -> None:
    """inspect, train, calibrate, generate: what each prints, and that exits are taken."""

    def offramp(*arguments: str) -> str:
        code, out, err = run(*arguments)
        assert code == 0, err
        return str(out)

    folder = saved("llama", tmp_path / "model")
    said = json.loads(offramp("inspect", str(folder), "--json"))
    assert said["layers"] == 6 and said["decoding"]["lossless"] == "exact"
    out = tmp_path / "exits"
    offramp(
        "train",
        "--backbone",
        str(folder),
        "--data",
        str(prompts),
        "--out",
        str(out),
        "--regime",
        "unsupervised",
        "--steps",
        "8",
        "--depths",
        "2",
        "--max-new-tokens",
        "6",
    )
    held = tmp_path / "held.txt"
    held.write_text("\n".join(f"w{n} w{n + 1} w{n % 7}" for n in range(60, 90)))
    found = offramp(
        "calibrate",
        "--adapter",
        str(out),
        "--data",
        str(held),
        "--target",
        "0.9",
        "--confidence",
        "0.5",
        "--max-new-tokens",
        "6",
        "--json",
    )
    assert "thresholds" in found
    answers = {}
    for mode in ("full", "lossless", "early_exit"):
        text = offramp(
            "generate",
            "--adapter",
            str(out),
            "--prompt",
            "w3 w4",
            "--threshold",
            "0.02",
            "--max-new-tokens",
            "6",
            "--mode",
            mode,
            "--json",
        )
        answers[mode] = [step["id"] for step in json.loads(text)["steps"]]
    assert answers["lossless"] == answers["full"]
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    ids = torch.tensor([[WORDS.index("w3"), WORDS.index("w4")]])
    expected = stock.generate(ids, max_new_tokens=6, do_sample=False)[0, 2:].tolist()
    assert answers["full"] == expected


def test_a_language_model_sees_no_images(tmp_path: Path) -> None:
    from PIL import Image

    folder = saved("llama", tmp_path / "model")
    backbone = Backbone.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    encoder = InputProcessor(backbone, tokenizer)
    batch = encoder.prompts([Example.of_text(t, key=t) for t in ("w1 w2", "w3")])
    assert batch["input_ids"].tolist() == [[5, 6], [0, 7]]
    picture = Image.new("RGB", (4, 4))
    refused(lambda: encoder.of_text("w1", [picture]), InputError, "sees no images")


@pytest.mark.slow
@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
def test_those_that_llama_cpp_has_a_graph_for_run_there(name: str, tmp_path: Path) -> None:
    from offramp.adapter.adapter import Adapter
    from offramp.core.decoding.policy import ExitPolicy
    from offramp.core.models.exits import Exits, ExitSet
    from offramp_llama_cpp import EngineOptions, LlamaCppRuntime, export_gguf

    backbone = Backbone(model_of(name), name=name)
    adapter = Adapter(backbone, ExitSet(Exits(backbone, (2,))), ExitPolicy({2: 0.2}))
    export_gguf(adapter, tmp_path / "gguf", "f32")
    engine = EngineOptions(context=96, cache="f32", flash_attention=False)
    ids = torch.tensor([[5, 9, 33, 70, 12]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with LlamaCppRuntime(adapter, tmp_path / "gguf", engine=engine) as runtime:
        for mode in ("full", "early_exit", "lossless"):
            options = {"mode": mode, "max_new_tokens": 20, "do_sample": False}
            ours, theirs = (each.generate(inputs, **options) for each in (runtime, adapter))
            assert torch.equal(ours.sequences, theirs.sequences)
