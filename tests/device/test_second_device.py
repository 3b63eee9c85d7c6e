"""On a device with memory of its own, everything answers as the CPU does, and as the model itself.

The device is one of the tests' own (`second_device`): it refuses operands on both sides as a GPU
does, and counts how often the host waits.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fakes
import families
import numpy as np
import pytest
import second_device
import torch
from torch import Tensor
from training_runs import learnt_beside_the_device

from offramp.adapter.adapter import Adapter
from offramp.adapter.shipped import load_tiny, tiny_exits
from offramp.calibration.calibrate import calibrate
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.models.backbone import Backbone, DecodeOptions
from offramp.core.models.exits import Exits
from offramp.features.input_processor import InputProcessor
from offramp.serving.batch_engine import BatchEngine
from offramp.serving.engine_config import EngineConfig
from offramp.serving.server.config import ServerConfig
from offramp.serving.server.pytorch import service_of
from serving import asking, messages, scene_examples

MODES = ("full", "lossless", "early_exit")
MODELS = ("tiny-opt", "tiny-t5", "qwen2-vl")
NEW = 8
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}

pytestmark = pytest.mark.skipif(
    second_device.missing() is not None, reason=str(second_device.missing())
)


@pytest.fixture(scope="module", autouse=True)
def device() -> torch.device:
    return second_device.device()


def perturbed(
    name: str, where: str, depths: tuple[int, ...], wide: float | None = None, **kind: str
) -> tuple[Backbone, Exits]:
    """A random model on a device, and exits that are no longer copies of its layers."""
    exits = Exits(Backbone(families.build(name, wide=wide)), depths, **kind)
    families.perturb(exits)
    backbone = Backbone(families.build(name, wide=wide).to(where))
    moved = Exits(backbone, depths, **kind)
    moved.load_state_dict(exits.state_dict())
    return backbone, moved.requires_grad_(False)


@cache
def model_on(where: str, name: str) -> tuple[Adapter, dict[str, Tensor]]:
    """A tiny model with exits on a device, and inputs of three rows on the CPU, with padding."""
    if name == "qwen2-vl":
        backbone, exits = perturbed(name, where, (2, 4))
        policy = ExitPolicy({2: 0.05, 4: 0.05})
        return Adapter(backbone, exits, policy), families.KINDS[name].inputs(3)
    backbone, processor = load_tiny(name.removeprefix("tiny-"), device=where)
    examples = scene_examples()[:2] + scene_examples()[-1:]
    inputs = InputProcessor(backbone, processor).prompts(examples)
    if name == "tiny-opt":
        return Adapter.from_pretrained(backbone, tiny_exits("opt")), dict(inputs)
    adapter = Adapter(backbone, Exits(backbone, (2, 4)), ExitPolicy({2: 0.3, 4: 0.3}))
    return adapter, dict(inputs)


def both(name: str) -> tuple[Adapter, Adapter, dict[str, Tensor]]:
    """A model on the CPU, the same on the device, and inputs on the CPU."""
    adapter, inputs = model_on("cpu", name)
    return adapter, model_on(second_device.NAME, name)[0], inputs


def same(made: Any, wanted: Any) -> bool:
    """Whether two answers have the same tokens at the same depths."""
    return torch.equal(made.sequences.cpu(), wanted.sequences) and torch.equal(
        made.depths.cpu(), wanted.depths
    )


def row_of(name: str, inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return families.one_row(name, inputs, row)


# -- the device ------------------------------------------------------------------------------------


def test_operands_on_two_devices_are_refused_as_by_a_gpu(device: torch.device) -> None:
    here, there = torch.ones(3, device=device), torch.ones(3)
    for wrong in (
        lambda: here + there,
        lambda: torch.cat([here, there]),
        lambda: here.index_select(0, torch.tensor([0])),
        lambda: torch.nn.functional.embedding(torch.tensor([0]), here[None]),
        lambda: torch.nn.functional.linear(there[None], here[None]),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            wrong()
    assert (here + torch.tensor(2.0)).tolist() == [3, 3, 3]
    assert here[torch.tensor([0, 2])].tolist() == [1, 1]
    assert here.copy_(there).device == device == torch.ones(3).to(device).device


def test_waits_are_counted_where_a_gpu_waits(device: torch.device) -> None:
    here = torch.arange(4, device=device)
    for waiting in (here.tolist, here.sum().item, here.nonzero, lambda: here[here > 1], here.cpu):
        with second_device.counted() as counts:
            waiting()
        assert counts.waits == 1
    with second_device.counted() as counts:
        (here + 1) @ here
        here[torch.tensor([0], device=device)].to(torch.float32)
    assert not counts.waits and counts.launches >= 4


# -- answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_at_full_depth_it_says_what_the_models_own_generate_says_on_the_cpu(name: str) -> None:
    cpu, here, inputs = both(name)
    theirs = cpu.backbone.model.generate(**inputs, **GREEDY)
    for mode in ("full", "lossless"):
        made = here.generate(inputs, mode=mode, **GREEDY)
        assert torch.equal(made.sequences.cpu(), theirs), mode
        assert made.sequences.device.type == second_device.NAME


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_tokens_and_depths_are_those_of_the_cpu(name: str, mode: str) -> None:
    cpu, here, inputs = both(name)
    alone = row_of(name, inputs, 0)
    for given in (inputs, alone):
        wanted = cpu.generate(given, mode=mode, **GREEDY)
        assert same(here.generate(given, mode=mode, **GREEDY), wanted)
    if mode == "early_exit":
        assert (wanted.depths < wanted.layers).any()


def test_it_decodes_inside_the_models_own_generate() -> None:
    cpu, here, inputs = both("tiny-opt")
    for mode in MODES:
        wanted = cpu.generate(inputs, mode=mode, **GREEDY).sequences
        moved = {key: value.to(second_device.NAME) for key, value in inputs.items()}
        made = here.backbone.model.generate(**moved, custom_generate=here, mode=mode, **GREEDY)
        assert torch.equal(made.cpu(), wanted)


@pytest.mark.parametrize("mode", MODES)
def test_a_seed_gives_the_same_sample(mode: str) -> None:
    cpu, here, inputs = both("tiny-opt")
    how = {"mode": mode, "max_new_tokens": NEW, "do_sample": True, "temperature": 2.0, "seed": 3}
    assert same(here.generate(inputs, **how), cpu.generate(inputs, **how))


def test_samples_without_a_seed_go_on_from_pytorchs_generator() -> None:
    _, here, inputs = both("tiny-opt")
    made = []
    for _ in range(2):
        torch.manual_seed(5)
        made.append(here.generate(inputs, max_new_tokens=NEW, do_sample=True, temperature=2.0))
    assert torch.equal(made[0].sequences, made[1].sequences)


def test_rules_of_the_caller_hold() -> None:
    cpu, here, inputs = both("tiny-opt")
    tokenizer = load_tiny("opt", device="cpu")[1].tokenizer
    for rules in (
        {"repetition_penalty": 1.3, "min_new_tokens": 4},
        {"stop_strings": ["the", "."], "tokenizer": tokenizer},
    ):
        assert same(
            here.generate(inputs, **rules, **GREEDY), cpu.generate(inputs, **rules, **GREEDY)
        )


def test_the_models_own_stack_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, here, inputs = both("tiny-opt")
    monkeypatch.setattr(here.backbone, "engine", "stack")
    for mode in MODES:
        wanted = cpu.generate(inputs, mode=mode, **GREEDY)
        assert same(here.generate(inputs, mode=mode, **GREEDY), wanted)


def test_an_answer_that_the_model_reads_again_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backbone, "decoding", DecodeOptions())
    backbone, exits = perturbed("llava", second_device.NAME, (2, 4))
    adapter = Adapter(backbone, exits, ExitPolicy({2: 0.05, 4: 0.05}))
    for mode in MODES:
        adapter.generate(families.KINDS["llava"].inputs(1), mode=mode, **GREEDY)
    assert set(backbone.readings.verdicts.values()) == {"slots"}


# -- the engine and the server ---------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_batch_engine_takes_inputs_from_either_side(name: str) -> None:
    cpu, here, inputs = both(name)
    rows = [row_of(name, inputs, row) for row in range(2)]
    with BatchEngine(here, config=EngineConfig(slots=3, limit=64)) as engine:
        asked = [
            (mode, row, engine.submit({k: v.to(side) for k, v in row.items()}, mode=mode, **GREEDY))
            for side, given in (("cpu", rows), (second_device.NAME, rows[:1]))
            for mode in MODES
            for row in given
        ]
        for mode, row, handle in asked:
            assert same(handle.result(60).output, cpu.generate(row, mode=mode, **GREEDY))


def test_the_server_answers_the_same() -> None:
    example, said = scene_examples()[0], []
    for where in ("cpu", second_device.NAME):
        _, processor = load_tiny("opt", device="cpu")
        adapter = model_on(where, "tiny-opt")[0]
        config = ServerConfig(name="tiny-opt")
        with asking(service_of(adapter, processor, config, EngineConfig(2, 256))) as client:
            body = {"model": "tiny-opt", "messages": messages(example), "max_tokens": NEW}
            answer = client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            said.append(answer.json()["choices"])
    assert said[0] == said[1]


# -- how often the host waits ----------------------------------------------------------------------

PROMPT = 9
"""Waits for a prompt of one row, of which four are in Hugging Face's preparation."""
WAITING = 1
"""Waits for a prompt that waits at an exit: whether its positions count up."""
UNSURE, VERIFYING, OPENING = 1, 1, 2
"""Waits of a round for the draft that the exit is not confident of, and for the full model; and of
an answer for its first token, which exit and full model may both be asked for."""


def waits_of(adapter: Adapter, inputs: Any, tokens: int, **how: Any) -> tuple[int, Any]:
    """The waits for an answer, and the answer."""
    how = {"max_new_tokens": tokens, "do_sample": False, **how}
    adapter.generate(inputs, **how)  # what is kept for later answers
    with second_device.counted(places=True) as counts:
        made = adapter.generate(inputs, **how)
    print(f"{counts.waits} waits, {counts.launches} operators, {counts.uploads} uploads")
    print(*(f"{count:3} {place}" for place, count in counts.places.most_common()), sep="\n")
    return counts.waits, made


def further(adapter: Adapter, inputs: Any, **how: Any) -> tuple[int, Any]:
    """The waits for an answer of 12 tokens beyond those for its prompt, and the answer."""
    # With one token to write nothing is drafted: its waits are the prompt's, and one.
    before = waits_of(adapter, inputs, 1, **{**how, "mode": "full", "policy": None})[0]
    waits, made = waits_of(adapter, inputs, 12, **how)
    return waits - (before - 1), made


@pytest.mark.parametrize("threshold", [0.05, 0.999])
@pytest.mark.parametrize("name", ["tiny-opt", "qwen2-vl"])
def test_early_exit_waits_once_for_an_exit_and_once_for_the_full_model(
    name: str, threshold: float
) -> None:
    _, here, inputs = both(name)
    policy = ExitPolicy({2: threshold})
    waits, made = further(here, row_of(name, inputs, 0), policy=policy)
    asked = sum(1 + (depth == made.layers) for depth in made.depths[0].tolist())
    assert waits <= asked + WAITING


@pytest.mark.parametrize("name", ["tiny-opt", "qwen2-vl"])
def test_lossless_waits_once_for_a_draft_and_once_for_a_round(name: str) -> None:
    _, here, inputs = both(name)
    for threshold in (0.05, 0.85):
        policy = ExitPolicy({2: threshold}, lossless=True)
        waits, made = further(here, row_of(name, inputs, 0), policy=policy)
        assert waits <= sum(drafted + UNSURE + VERIFYING for drafted, _ in made.rounds) + OPENING


def test_an_exit_that_drafts_on_by_itself_waits_once_a_draft() -> None:
    inputs = families.KINDS["blip2-opt"].inputs(1)
    backbone, exits = perturbed("blip2-opt", second_device.NAME, (2,), kind="drafting")
    adapter = Adapter(backbone, exits, ExitPolicy(drafts={2: 0.0}, max_draft=3))
    waits, made = further(adapter, inputs, mode="lossless")
    theirs = families.build("blip2-opt").generate(**inputs, max_new_tokens=12, do_sample=False)
    assert torch.equal(made.sequences.cpu(), theirs)
    assert waits <= sum(drafted + UNSURE + VERIFYING for drafted, _ in made.rounds) + OPENING


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_a_batch_wait_together(rows: int) -> None:
    _, here, inputs = both("tiny-opt")
    given = inputs if rows > 1 else row_of("tiny-opt", inputs, 0)
    for how in ({"mode": "full"}, {"policy": ExitPolicy({2: 0.0})}):
        few, many = (waits_of(here, given, tokens, **how)[0] for tokens in (4, 9))
        assert many - few == 5


def test_a_prompt_waits_no_more_for_each_layer() -> None:
    _, here, inputs = both("tiny-opt")
    assert waits_of(here, row_of("tiny-opt", inputs, 0), 1, mode="full")[0] <= PROMPT + 1
    assert waits_of(here, inputs, 1, mode="full")[0] <= PROMPT + 1 + 10 * len(inputs["input_ids"])


# -- training and calibration ----------------------------------------------------------------------


def test_training_learns_the_same(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as apart:
        (wanted, exits), (found, moved) = apart.submit(learnt_beside_the_device, tmp_path).result()
    assert [row["distillation/4"] for row in found] == pytest.approx(
        [row["distillation/4"] for row in wanted], rel=1e-4
    )
    assert list(exits) == list(moved)
    # The softmax ignores a bias of keys: its gradient is rounding, which Adam blows up.
    learnt = [name for name in exits if not name.endswith("k_proj.bias")]
    assert all(np.allclose(exits[name], moved[name], atol=1e-4) for name in learnt)


def test_calibration_finds_the_same() -> None:
    found = []
    for where in ("cpu", second_device.NAME):
        backbone, exits = perturbed("blip2-opt", where, (4,), wide=2.0)
        encoder = InputProcessor(backbone, fakes.Blip2FakeProcessor("blip2-opt"))
        adapter = Adapter(backbone, exits, seen={"train": []})
        grid = (0.07, 0.05, 0.04, 0.03)
        lax = {"target": 0.6, "confidence": 0.8, "thresholds": grid, "max_new_tokens": 4}
        some = fakes.examples(24)
        found.append(calibrate(adapter, encoder, some, ExitPolicy(), do_sample=False, **lax))
    wanted, made = found
    assert made.policy == wanted.policy and made.policy.thresholds
    assert (made.measured, made.bound, made.n) == (wanted.measured, wanted.bound, wanted.n)
