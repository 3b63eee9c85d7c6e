"""An EAGLE-3 drafter learns what it will be asked: what is unrolled is what an engine drafts, slot
by slot, from keys of true states."""

from __future__ import annotations

import json
from pathlib import Path

import fakes
import hub_files
import pytest
import torch
from safetensors.torch import load_file

from offramp.adapter.answers import full_model_answers
from offramp.core.errors import DataError, UnsupportedBackboneError
from offramp.features.input_processor import InputProcessor
from offramp.features.teacher_forcing import Answered, record
from offramp.training.config import TrainConfig
from offramp.training.feature_store import FeatureStore
from offramp_vllm.exports.eagle3 import Eagle3Drafter, check_drafter, read_depths
from offramp_vllm.exports.speculators import save_drafter
from offramp_vllm.exports.train_eagle3 import ONLY, _Training, train_eagle3

NAME = "blip2-llama"
CONFIG = TrainConfig(
    steps=24,
    batch_size=4,
    evaluate_every=8,
    max_new_tokens=8,
    validation_fraction=0.25,
    patience=None,
    learning_rate=3e-3,
    shortlist=64,
)
MEASURED = {"acceptance": [0.6, 0.5]}


@pytest.fixture
def whole(backbone):
    return backbone(NAME)


@pytest.fixture
def encoder(whole):
    return InputProcessor(whole, fakes.Blip2FakeProcessor(NAME))


def answered(encoder, n, new=7):
    """Each alone."""
    return full_model_answers(encoder, fakes.examples(n), batch_size=1, max_new_tokens=new)


def drafter_of(whole):
    """One whose every weight counts."""
    drafter = Eagle3Drafter(whole, torch.arange(0, whole.vocabulary, 2))
    with torch.no_grad():
        for weight in drafter.parameters():
            weight.add_(0.05 * torch.randn(weight.shape))
    return drafter


def training(whole, drafter):
    class Alone:
        is_main_process, num_processes = True, 1

        def reduce(self, tensor, _):
            return tensor

        def backward(self, loss):
            loss.backward()

    return _Training(drafter, whole, CONFIG, Alone())


def drafted(drafter, whole, batch, place, count):
    """Drafts' states from an answer's place on, one slot after the other, as llama.cpp makes them:
    slots of a text are written with true states, those of images never."""
    ids = torch.cat([batch.prompt_ids, batch.targets], 1)[0]
    states = drafter.fuse(
        [torch.cat([batch.prompt[d], batch.answer[d]], 1).float() for d in drafter.depths]
    )
    embed = whole.stack.get_input_embeddings()
    last = batch.prompt_ids.shape[1] - 1 + place
    held, state = [], None
    for slot in range(last + count):
        if slot <= last:
            if ids[slot] < 0 or ids[slot + 1] < 0:
                continue
            state = states[:, slot : slot + 1]
        seen = torch.ones(1, 1, 1, len(held) + 1, dtype=torch.bool)
        embedded = embed(ids[None, slot + 1 : slot + 2]).float()
        state = drafter(embedded, state, torch.tensor([slot]), held, seen)
        if slot >= last:
            yield state[0, 0]


@pytest.mark.parametrize("place", [0, 2])
def test_what_is_unrolled_is_what_an_engine_drafts(whole, encoder, place):
    [row] = answered(encoder, 1)
    drafter = drafter_of(whole)
    batch = record(encoder, [row], drafter.depths)
    with torch.no_grad():
        rolled = training(whole, drafter).rollouts(batch, 3)[ONLY].drafts
        one_by_one = list(drafted(drafter, whole, batch, place, 3))
    for k, state in enumerate(one_by_one):
        torch.testing.assert_close(rolled[k][0, place + k], state, atol=2e-5, rtol=1e-4)


def test_a_row_drafts_the_same_alone_and_beside_longer_ones(whole, encoder):
    rows = answered(encoder, 3)
    rows[1] = Answered(rows[1].example, rows[1].ids[:4], False)
    drafter = drafter_of(whole)
    stage = training(whole, drafter)
    with torch.no_grad():
        together = stage.rollouts(record(encoder, rows, drafter.depths), 3)[ONLY].drafts
        alone = stage.rollouts(record(encoder, rows[1:2], drafter.depths), 3)[ONLY].drafts
    for k in range(3):
        torch.testing.assert_close(together[k][1:2, k:3], alone[k][:, k:], atol=2e-5, rtol=1e-4)


def test_ids_of_a_prompt_are_those_of_its_text(whole, encoder):
    rows = answered(encoder, 3)
    batch = record(encoder, rows, (2,))
    given = encoder.prompts([row.example for row in rows])
    image = given["input_ids"] == whole.model.config.image_token_index
    hidden = image | (given["attention_mask"] == 0)
    assert image.any() and torch.equal(batch.prompt_ids < 0, hidden)
    assert torch.equal(batch.prompt_ids[~hidden], given["input_ids"][~hidden])


def test_it_learns(whole, encoder):
    stage = training(whole, drafter_of(whole))
    store = FeatureStore(encoder, answered(encoder, 8), stage.drafter.depths, batch_size=4)
    store.fill()
    before = stage.measure(store)[ONLY].tokens
    assert stage.follow((store, store))[ONLY].tokens > before + 0.2


def test_the_backbone_stays_and_the_most_frequent_tokens_can_be_said(whole, tmp_path):
    frozen = {n: t.clone() for n, t in whole.model.state_dict().items()}
    processor = fakes.Blip2FakeProcessor(NAME)
    drafter, found = train_eagle3(whole, processor, fakes.examples(12), CONFIG, tmp_path)
    state = whole.model.state_dict()
    assert all(torch.equal(state[n], t) for n, t in frozen.items())
    assert 2 <= len(drafter.words) <= CONFIG.shortlist and found.tried[0] > 0


def test_it_begins_as_the_models_last_layer(whole):
    drafter = Eagle3Drafter(whole, torch.arange(8))
    last, width = whole.layers[whole.depth - 1], whole.width
    query = drafter.layer.self_attn.q_proj.weight
    assert torch.equal(query[:, width:], last.self_attn.q_proj.weight.float())
    assert not query[:, :width].any()
    states = [torch.randn(2, width) for _ in drafter.depths]
    torch.testing.assert_close(drafter.fuse(states), states[-1])


@pytest.mark.parametrize("name", ["blip2-llama", "gemma3", "qwen2.5-vl"])
def test_it_reads_states_as_the_model_does(name, backbone):
    """Its last norm and its rows of the head are the model's, however that keeps its norms."""
    whole = backbone(name)
    words, states = torch.arange(0, whole.vocabulary, 3), torch.randn(4, whole.width)
    with torch.no_grad():
        own = Eagle3Drafter(whole, words).logits(states)
        theirs = whole.logits(whole.final_norm(states))[..., words]
    order = theirs.argsort(-1)
    torch.testing.assert_close(
        own.gather(-1, order).diff().clamp(max=0), torch.zeros(4, len(words) - 1), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("layers", [4, 5, 6, 7, 12, 30])
def test_three_depths_are_read_low_middle_high(layers):
    low, middle, high = read_depths(layers)
    assert 1 <= low < middle < high < layers


@pytest.mark.parametrize(
    ("name", "reason"), [("blip2-t5", "an encoder"), ("blip2-opt", "not rotary")]
)
def test_what_no_engine_could_run_is_refused(name, reason, backbone):
    with pytest.raises(UnsupportedBackboneError, match=reason):
        check_drafter(backbone(name))


def test_no_examples_are_refused(whole, tmp_path):
    with pytest.raises(DataError, match="no examples"):
        train_eagle3(whole, fakes.Blip2FakeProcessor(NAME), [], CONFIG, tmp_path)


# -- the folder that other engines read -----------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    whole = hub_files.text_adapter().backbone
    words = torch.arange(1, whole.vocabulary, 3)
    save_drafter(
        Eagle3Drafter(whole, words), whole, tmp_path / "drafter", drafts=4, measured=MEASURED
    )
    return tmp_path / "drafter"


def test_tensors_have_the_names_and_shapes_that_are_read(folder):
    config = json.loads((folder / "config.json").read_text())
    assert "model_type" not in config  # as the library speculators writes it, and vLLM reads it
    layer, words = config["transformer_layer_config"], config["draft_vocab_size"]
    width, size = layer["hidden_size"], layer["head_dim"]
    query, key = (layer[f"num_{kind}_heads"] * size for kind in ("attention", "key_value"))
    inner = layer["intermediate_size"]
    expected = {
        "fc.weight": (width, 3 * width),
        "norm.weight": (width,),
        "lm_head.weight": (words, width),
        "d2t": (words,),
        "t2d": (layer["vocab_size"],),
        "layers.0.self_attn.q_proj.weight": (query, 2 * width),
        "layers.0.self_attn.k_proj.weight": (key, 2 * width),
        "layers.0.self_attn.v_proj.weight": (key, 2 * width),
        "layers.0.self_attn.o_proj.weight": (width, query),
        "layers.0.mlp.gate_proj.weight": (inner, width),
        "layers.0.mlp.up_proj.weight": (inner, width),
        "layers.0.mlp.down_proj.weight": (width, inner),
        **{
            f"layers.0.{name}.weight": (width,)
            for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")
        },
    }
    tensors = load_file(folder / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == expected


def test_tokens_of_the_draft_are_mapped_to_the_models(folder):
    tensors = load_file(folder / "model.safetensors")
    ids = torch.arange(len(tensors["d2t"])) + tensors["d2t"]
    assert tensors["d2t"].dtype == torch.int64 and tensors["t2d"].dtype == torch.bool
    assert torch.equal(ids, torch.arange(1, len(tensors["t2d"]), 3))
    assert torch.equal(tensors["t2d"].nonzero()[:, 0], ids)


def test_the_configuration_names_the_model_and_the_states(folder):
    whole = hub_files.text_adapter().backbone
    config = json.loads((folder / "config.json").read_text())
    said = config["speculators_config"]
    assert said["algorithm"] == config["speculators_model_type"] == "eagle3"
    assert said["verifier"]["architectures"] == ["LlamaForCausalLM"]
    assert said["proposal_methods"][0]["speculative_tokens"] == 4
    assert config["eagle_aux_hidden_state_layer_ids"] == list(read_depths(whole.depth))
    assert config["transformer_layer_config"]["rope_theta"] > 0


def test_the_card_says_how_often_drafts_were_right(folder):
    card = (folder / "README.md").read_text()
    assert "| 1 | 60.0% |" in card and "| 2 | 50.0% |" in card and "vllm serve" in card
