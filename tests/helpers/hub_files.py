"""Files as a hub has them, of tiny random models: with a tokenizer and a template."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import families
import torch
from gguf_cases import SHORT
from transformers import LlamaForCausalLM

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.models.backbone import Backbone
from offramp.core.models.exits import Exits, ExitSet
from offramp_llama_cpp import ExportFormats, slice_gguf
from offramp_llama_cpp.gguf_export import export_whole

SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<vision>", "</vision>", "<video>", "<7>"]
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?-:;'()+*/=<>@#&"
WORDS = [*SPECIAL, *LETTERS, "Ġ", "ab", "Ċ"]
WORDS += [f"<{n}>" for n in range(len(WORDS), families.VOCABULARY)]
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}a:"


def text_adapter() -> Adapter:
    """Exits at two depths of a tiny Llama that sees no images; a copy that a test may change."""
    return copy.deepcopy(_text_adapter())


def image_adapter() -> Adapter:
    """Exits of a tiny LLaVA with a SigLIP tower; a copy that a test may change."""
    return copy.deepcopy(_image_adapter())


@cache
def _text_adapter() -> Adapter:
    state = torch.random.get_rng_state()
    torch.manual_seed(3)
    model = LlamaForCausalLM(families.llama_config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.25)
        model.get_input_embeddings().weight.normal_(0.0, 0.1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = families.PAD
    backbone = Backbone(model.eval(), name="tiny-text")
    exits = Exits(backbone, (2, 4))
    with torch.no_grad():
        for parameter in exits.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape))
    torch.random.set_rng_state(state)
    exits.requires_grad_(False)
    policy = ExitPolicy({2: 0.3, 4: 0.3}, shortlist=True, first={})
    return Adapter(backbone, ExitSet(exits, SHORT), policy)


def hub_file(
    backbone: Backbone, path: Path, formats: str = "f32", words: Sequence[str] = WORDS
) -> Path:
    """The whole decoder with a tokenizer of one letter a token."""
    import gguf

    plain = path.with_suffix(".plain")
    export_whole(backbone, plain, ExportFormats(formats))
    reader = gguf.GGUFReader(plain)
    name = str(reader.fields["general.architecture"].contents())
    out = gguf.GGUFWriter(path, name)
    for key, field in reader.fields.items():
        if key.startswith(f"{name}."):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            out.add_key_value(key, field.contents(), field.types[0], inner)
    out.add_name("Tiny")
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("default")
    out.add_token_list(list(words))
    out.add_token_types([3] * len(SPECIAL) + [1] * (len(words) - len(SPECIAL)))
    out.add_token_merges(["a b"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_add_bos_token(True)
    out.add_chat_template(TEMPLATE)
    embeddings = backbone.stack.get_input_embeddings().weight.detach().float().numpy()
    out.add_tensor("token_embd.weight", embeddings)
    for tensor in reader.tensors:  # whose embeddings are the head, as no token comes in
        named = tensor.name.replace("token_embd", "output")
        out.add_tensor(named, tensor.data, raw_dtype=tensor.tensor_type)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    plain.unlink()
    return path


def sliced(
    adapter: Adapter, folder: Path, formats: str = "f32", words: Sequence[str] = WORDS
) -> Path:
    """The folder that `offramp export` cuts of both."""
    folder.mkdir(parents=True, exist_ok=True)
    exits = replace(adapter.exits, measured={"shortlist": {"size": len(SHORT)}})
    replace(adapter, exits=exits).save(folder / "adapter")
    hub_file(adapter.backbone, folder / "hub.gguf", formats, words)
    slice_gguf(folder / "hub.gguf", folder / "adapter", folder / "sliced", exits=formats)
    return folder / "sliced"


@cache
def _image_adapter() -> Adapter:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    state = torch.random.get_rng_state()
    torch.manual_seed(5)
    tower = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        vision_use_head=False,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=tower,
            text_config=families.llama_config(),
            image_token_index=families.IMAGE,
            image_seq_length=4,
            vision_feature_select_strategy="full",
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.25)
        model.get_input_embeddings().weight.normal_(0.0, 0.1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = families.PAD
    backbone = Backbone(model.eval(), name="tiny-siglip")
    exits = Exits(backbone, (2, 4))
    torch.random.set_rng_state(state)
    exits.requires_grad_(False)
    policy = ExitPolicy({2: 0.3, 4: 0.3}, shortlist=True, first={})
    return Adapter(backbone, ExitSet(exits, SHORT), policy)
