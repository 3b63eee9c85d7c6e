"""Laws of the llama.cpp runtime: it writes what PyTorch writes, and lossless is lossless."""

from __future__ import annotations

import copy
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from gguf_cases import (
    DEPTHS,
    EXACT,
    FURTHER,
    GREEDY,
    KINDS,
    NEW,
    SHORT,
    adapter_of,
    inputs_of,
    refused,
    same,
    two_images,
)
from reference import Dice
from transformers import StoppingCriteria, StoppingCriteriaList

from offramp.core.decoding.policy import FULL, ExitPolicy
from offramp.core.decoding.scores import SCORES
from offramp.core.errors import AdapterError, InputError, UnsupportedBackboneError
from offramp.core.models.as_loaded import as_loaded, note_loaded
from offramp.core.models.exits import Exits, ExitSet
from offramp_llama_cpp import LlamaCppRuntime, export_gguf, segment
from offramp_llama_cpp.gguf_files import DIGESTS
from offramp_llama_cpp.native.drafts import FeedLoop

pytestmark = pytest.mark.llama_cpp

USUAL = segment.EngineOptions(context=256)


@pytest.fixture(scope="session")
def loaded(exported: Callable[..., Path]) -> Iterator[Callable[..., LlamaCppRuntime]]:
    """`loaded(name, formats)`: a runtime, loaded once; in float32 as exact as it can be."""
    made: list[LlamaCppRuntime] = []

    @cache
    def load(name: str, formats: str = "f32") -> LlamaCppRuntime:
        engine = EXACT if formats == "f32" else USUAL
        made.append(LlamaCppRuntime(adapter_of(name), exported(name, formats), engine=engine))
        return made[-1]

    yield load
    for each in made:
        each.close()


@pytest.mark.parametrize("name", [*KINDS, *FURTHER])
def test_without_exits_it_writes_what_the_model_does(name: str, loaded: Any) -> None:
    ours = loaded(name).generate(inputs_of(name), policy=FULL, **GREEDY)
    stock = adapter_of(name).backbone.model.generate(**inputs_of(name), **GREEDY)
    assert torch.equal(ours.sequences, stock)
    assert len(set(ours.new_tokens[0].tolist())) > 1


SEVERAL = [name for name in FURTHER if name not in ("blip2-opt", "internvl-experts", "granite")]


@pytest.mark.parametrize("name", SEVERAL)
def test_several_images_stand_where_they_stand_in_the_model(name: str, loaded: Any) -> None:
    inputs = two_images(name)
    ours = loaded(name).generate(inputs, policy=FULL, **GREEDY)
    stock = adapter_of(name).backbone.model.generate(**inputs, **GREEDY)
    assert torch.equal(ours.sequences, stock)
    assert not torch.equal(
        ours.new_tokens, loaded(name).generate(inputs_of(name), policy=FULL, **GREEDY).new_tokens
    )


@pytest.mark.parametrize("name", FURTHER)
def test_drafts_behind_images_are_taken_back(
    name: str, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lossless is the full model, by the same files, and drafts were refused."""
    drafted = accepted = 0
    inputs = two_images(name) if name in SEVERAL else inputs_of(name)
    full = loaded(name).generate(inputs, policy=FULL, **GREEDY)
    for seed in range(2):
        monkeypatch.setitem(SCORES, "max_probability", Dice(seed))
        policy = replace(adapter_of(name).policy, lossless=True, max_draft=3)
        ours = loaded(name).generate(inputs, policy=policy, **GREEDY)
        assert torch.equal(ours.sequences, full.sequences)
        drafted += sum(count for count, _ in ours.rounds)
        accepted += sum(count for _, count in ours.rounds)
    assert drafted > accepted


@pytest.mark.parametrize("name", ["gemma3", "paligemma2-wide"])
def test_answers_go_on_past_the_window(name: str, loaded: Any) -> None:
    longer = {"max_new_tokens": 50, "do_sample": False}
    ours = loaded(name).generate(inputs_of(name), policy=FULL, **longer)
    stock = adapter_of(name).backbone.model.generate(**inputs_of(name), **longer)
    assert torch.equal(ours.sequences, stock)


def test_an_answer_may_be_much_longer_than_its_prompt(loaded: Any) -> None:
    longer = {"max_new_tokens": 100, "do_sample": False}
    ours = loaded("llava").generate(inputs_of("llava"), policy=FULL, **longer)
    stock = adapter_of("llava").backbone.model.generate(**inputs_of("llava"), **longer)
    assert torch.equal(ours.sequences, stock)


@pytest.mark.parametrize("more", [{}, {"first": {}}, {"first": {2: 0.1}}], ids=str)
@pytest.mark.parametrize("name", [*KINDS, *FURTHER])
def test_early_exits_are_those_of_pytorch(
    name: str, more: Any, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = replace(adapter_of(name).policy, **more)
    found = []
    for each in (loaded(name), adapter_of(name)):
        monkeypatch.setitem(SCORES, "max_probability", Dice(5))
        found.append(each.generate(inputs_of(name), policy=policy, **GREEDY))
    assert same(*found)
    assert len(set(found[0].depths[0].tolist())) > 1
    assert torch.equal(found[0].scores.isnan(), found[1].scores.isnan())


def test_scores_are_those_of_pytorch(loaded: Any) -> None:
    for score in ("max_probability", "margin", "entropy"):
        policy = ExitPolicy(dict.fromkeys(DEPTHS, 0.3), score=score, shortlist=True)
        ours, theirs = (
            each.generate(inputs_of("llava"), policy=policy, **GREEDY)
            for each in (loaded("llava"), adapter_of("llava"))
        )
        assert same(ours, theirs)
        torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-4, rtol=1e-3, equal_nan=True)


@pytest.mark.parametrize("formats", ["f16", "q8_0", "q4_1", "iq4_nl"])
@pytest.mark.parametrize("name", ["llava", "internvl", "qwen3-vl", "gemma3", "blip2-opt"])
def test_lossless_is_the_full_model_in_each_format(
    name: str, formats: str, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafted = 0
    for seed in range(3):
        monkeypatch.setitem(SCORES, "max_probability", Dice(seed))
        each, inputs = loaded(name, formats), inputs_of(name, seed)
        policy = replace(adapter_of(name).policy, lossless=True, max_draft=3)
        ours = each.generate(inputs, policy=policy, **GREEDY)
        full = each.generate(inputs, policy=FULL, **GREEDY)
        assert torch.equal(ours.sequences, full.sequences)
        drafted += sum(count for count, _ in ours.rounds)
    assert drafted > 10


def test_lossless_rounds_are_those_of_pytorch(loaded: Any, monkeypatch: Any) -> None:
    policy = replace(adapter_of("llava").policy, lossless=True, max_draft=4)
    found = []
    for each in (loaded("llava"), adapter_of("llava")):
        monkeypatch.setitem(SCORES, "max_probability", Dice(2))
        found.append(each.generate(inputs_of("llava"), policy=policy, **GREEDY))
    assert same(*found)
    assert found[0].rounds == found[1].rounds


@pytest.mark.parametrize("depths", [(2,), DEPTHS], ids=str)
def test_the_full_model_is_called_where_no_exit_was_confident(
    depths: Any, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held against PyTorch; some tokens exit at each depth, and some at none."""
    adapter, inputs = adapter_of("internvl"), inputs_of("internvl")
    longer = {**GREEDY, "max_new_tokens": 40}
    at = {}
    for depth in depths:
        policy = ExitPolicy({**at, depth: 1.0}, shortlist=True)
        looked = adapter.generate(inputs, policy=policy, **longer)
        at[depth] = float(looked.scores[looked.depths == looked.layers].quantile(0.6))
    policy = ExitPolicy(at, shortlist=True)
    theirs = adapter.generate(inputs, policy=policy, **longer)
    assert len(theirs.depths.unique()) == len(depths) + 1
    each, calls = loaded("internvl"), []
    through, last = each._chain._through, len(each._chain.segments) - 1

    def counted(place: int, outputs: int, slot: int) -> Any:
        calls.extend([outputs] if place == last else [])
        return through(place, outputs, slot)

    monkeypatch.setattr(each._chain, "_through", counted)
    ours = each.generate(inputs, policy=policy, **longer)
    assert same(ours, theirs)
    torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-4, rtol=1e-3, equal_nan=True)
    assert calls == [1] * int((ours.depths == ours.layers).sum())


SAMPLED = {"max_new_tokens": NEW, "do_sample": True, "temperature": 1.3, "top_p": 0.9, "top_k": 20}


@pytest.mark.parametrize("lossless", [False, True])
def test_the_same_seed_draws_the_same_tokens_as_pytorch(lossless: bool, loaded: Any) -> None:
    policy = ExitPolicy(dict.fromkeys(DEPTHS, 0.25), shortlist=True, lossless=lossless)
    before = torch.get_rng_state()
    found = [
        each.generate(inputs_of("llava"), policy=policy, seed=seed, **SAMPLED)
        for each, seed in ((loaded("llava"), 3), (adapter_of("llava"), 3), (loaded("llava"), 4))
    ]
    assert torch.equal(torch.get_rng_state(), before), "the global generator is nobody's"
    assert same(*found[:2])
    assert not torch.equal(found[2].sequences, found[0].sequences)
    unseeded = []
    for each in (loaded("llava"), adapter_of("llava")):
        torch.manual_seed(3)
        unseeded.append(each.generate(inputs_of("llava"), policy=policy, **SAMPLED))
    assert same(*unseeded)
    assert not torch.equal(torch.get_rng_state(), before)


def test_a_lossless_sample_is_the_full_models_of_that_seed(loaded: Any) -> None:
    policy = ExitPolicy(dict.fromkeys(DEPTHS, 0.0), shortlist=True, lossless=True)
    right = 0
    for seed in range(4):
        how = {**SAMPLED, "seed": seed}
        full = loaded("llava").generate(inputs_of("llava"), policy=FULL, **how)
        ours = loaded("llava").generate(inputs_of("llava"), policy=policy, **how)
        assert torch.equal(ours.sequences, full.sequences)
        right += sum(accepted for _, accepted in ours.rounds)
    assert right


def test_tokens_left_early_leave_no_trace(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits after catching up are, bit by bit, those of the full model over the same tokens."""
    each = loaded("llava", "q8_0")
    chain = each._chain
    states = np.random.default_rng(0).normal(size=(12, 32)).astype(np.float32)
    chain.reset()
    plain = np.concatenate([(chain.run(row[None]), chain.finish(1))[1] for row in states])
    chain.reset()
    leaves = iter([False, True, True, False, True, False, False] * 4)
    for row in states:
        chain.run(row[None], lambda *_: next(leaves))
    assert chain.waits()
    assert np.array_equal(chain.finish(1), plain[-1:])
    chain.reset()
    for row in states[::-1]:  # other states before the last would show
        chain.run(row[None])
    assert not np.array_equal(chain.finish(1), plain[-1:])


def test_tokens_stream_as_they_are_written(loaded: Any) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    found = loaded("llava").generate(inputs_of("llava"), streamer=streamer, **GREEDY)
    assert streamer.tokens == found.sequences[0].tolist() and streamer.ended


@pytest.mark.parametrize("lossless", [False, True])
def test_it_stops_where_it_is_told(lossless: bool, loaded: Any) -> None:
    policy = replace(adapter_of("llava").policy, lossless=lossless, thresholds={2: 0.0})
    whole = loaded("llava").generate(inputs_of("llava"), policy=policy, **GREEDY)
    end = whole.new_tokens[0, 6].item()
    first = whole.new_tokens[0].tolist().index(end)

    class Stop(StoppingCriteria):
        def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return ids[:, -1] == end

    for option in ({"eos_token_id": end}, {"stopping_criteria": StoppingCriteriaList([Stop()])}):
        found = loaded("llava").generate(inputs_of("llava"), policy=policy, **option, **GREEDY)
        assert found.new_tokens[0].tolist() == whole.new_tokens[0, : first + 1].tolist()


def test_constraints_count_at_the_exits_too(loaded: Any) -> None:
    policy = ExitPolicy({2: 0.2}, shortlist=True)
    found = [
        each.generate(inputs_of("llava"), policy=policy, repetition_penalty=3.0, **GREEDY)
        for each in (loaded("llava"), adapter_of("llava"))
    ]
    assert same(*found)


class Alternating:
    """A constraint: even tokens at even places, odd ones at odd places."""

    def of_row(self, prompt: int, ends: Any) -> Any:
        def row(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            wrong = (torch.arange(scores.shape[-1]) + ids.shape[1] - prompt) % 2 == 1
            return scores.masked_fill(wrong, float("-inf"))

        return row


def test_a_constraint_of_each_row_counts_at_the_exits_too(loaded: Any) -> None:
    drafts = ExitPolicy({2: 0.0}, lossless=True, shortlist=True)
    for policy in (ExitPolicy({2: 0.2}, shortlist=True), drafts):
        found = [
            each.generate(
                inputs_of("llava"), policy=policy, logits_processor=[Alternating()], **GREEDY
            )
            for each in (loaded("llava"), adapter_of("llava"))
        ]
        assert same(*found)
        tokens = found[0].new_tokens[0]
        assert ((tokens + torch.arange(len(tokens))) % 2 == 0).all()


def test_padding_before_a_prompt_changes_nothing(loaded: Any) -> None:
    plain = inputs_of("llava")
    padded = dict(plain)
    gap = torch.full((1, 3), families.PAD)
    padded["input_ids"] = torch.cat([gap, plain["input_ids"]], 1)
    padded["attention_mask"] = torch.cat([torch.zeros_like(gap), plain["attention_mask"]], 1)
    ours = [loaded("llava").generate(each, **GREEDY).new_tokens for each in (plain, padded)]
    assert torch.equal(*ours)


def test_a_callback_in_python_reads_the_same_states(exported: Any, loaded: Any) -> None:
    slow = replace(EXACT, compiled_tap=False)
    policy = adapter_of("llava").policy
    with LlamaCppRuntime(adapter_of("llava"), exported("llava"), engine=slow) as each:
        assert not each._segments[0].tap.compiled  # type: ignore[union-attr]
        ours = each.generate(inputs_of("llava"), policy=policy, **GREEDY)
    theirs = loaded("llava").generate(inputs_of("llava"), policy=policy, **GREEDY)
    assert same(ours, theirs)
    # No nodes are taken over there, and norms add in another order.
    torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("sure", [None, 0.0, 2.0], ids=["as asked", "never stops", "always stops"])
@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_a_loop_feeds_what_is_fed_one_by_one(
    name: str, sure: float | None, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, wherever the loop stops; the exit's verdicts decide."""
    each, runs, run = loaded(name), list[int](), FeedLoop.run

    def counted(self: FeedLoop, *given: Any) -> Any:
        *rest, asked = given
        made = run(self, *rest, asked if sure is None else sure)
        assert made is not None
        runs.append(len(made[0]))
        return made

    monkeypatch.setattr(FeedLoop, "run", counted)
    for new, threshold, seed in product((1, 2, 40), (0.0, 0.3), (0, 1)):
        policy = replace(adapter_of(name).policy, thresholds=dict.fromkeys(DEPTHS, threshold))
        options = {**GREEDY, "max_new_tokens": new}
        ours = each.generate(inputs_of(name, seed), policy=policy, **options)
        criteria = StoppingCriteriaList([_Never()])  # it is asked about each token
        theirs = each.generate(
            inputs_of(name, seed), policy=policy, stopping_criteria=criteria, **options
        )
        assert same(ours, theirs)
        assert torch.equal(ours.scores.nan_to_num(-1), theirs.scores.nan_to_num(-1))
        assert (max(runs, default=0) > 1) is (new > 2 and sure != 2.0)
        runs.clear()


class _Never(StoppingCriteria):
    def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
        return torch.zeros(len(ids), dtype=torch.bool)


@pytest.mark.parametrize("name", ["llava", "smolvlm"])  # the latter's head is its embeddings
def test_it_decodes_without_the_weights_in_pytorch(name: str, exported: Any, loaded: Any) -> None:
    adapter = copy.deepcopy(adapter_of(name))
    policy, inputs = adapter.policy, inputs_of(name)
    held = sum(p.nbytes for p in adapter.backbone.layers.parameters())
    with LlamaCppRuntime(adapter, exported(name), engine=EXACT) as each:
        assert each.release_decoder() >= held
        assert not any(p.nbytes for p in adapter.backbone.layers.parameters())
        assert each.release_decoder() == 0
        for how in (policy, replace(policy, lossless=True), FULL):
            ours = each.generate(inputs, policy=how, **GREEDY)
            assert same(ours, loaded(name).generate(inputs, policy=how, **GREEDY))


def test_weights_that_were_freed_count_as_loaded_and_changed_ones_do_not(exported: Any) -> None:
    """A guarantee needs the loaded weights; llama.cpp's files hold those that were freed."""
    for changed in (False, True):
        adapter = copy.deepcopy(adapter_of("llava"))
        note_loaded(adapter.backbone)
        norm = adapter.backbone.norm.weight
        with LlamaCppRuntime(adapter, exported("llava"), engine=EXACT) as each:
            if changed:
                norm.data = norm.data * 2
            each.release_decoder()
            assert as_loaded(adapter.backbone) is not changed
            assert each.release_decoder() == 0
            norm.data = norm.data * 2
            assert not as_loaded(adapter.backbone)


def test_scales_that_llama_cpp_fits_lie_nearer_to_the_weights(exported: Any) -> None:
    import gguf

    weights = adapter_of("llava").backbone.layers[DEPTHS[-1]].mlp.down_proj.weight.numpy()
    away = {}
    for kind in ("q4_0", "iq4_nl"):
        reader = gguf.GGUFReader(exported("llava", kind) / "segment-2.gguf")
        down = next(t for t in reader.tensors if t.name == "blk.0.ffn_down.weight")
        assert down.tensor_type.name == kind.upper()
        away[kind] = np.abs(gguf.quants.dequantize(down.data, down.tensor_type) - weights).mean()
    assert away["iq4_nl"] < 0.95 * away["q4_0"]


# -- how it is called ---------------------------------------------------------------------------


def test_it_takes_and_returns_what_the_adapter_does(loaded: Any) -> None:
    inputs, adapter = inputs_of("llava"), adapter_of("llava")
    for options in ({"mode": "full"}, {"mode": "lossless"}, {"policy": adapter.policy}):
        ours, theirs = (
            each.generate(**inputs, **options, **GREEDY) for each in (loaded("llava"), adapter)
        )
        assert torch.equal(ours.sequences, theirs.sequences)
    made = loaded("llava").generate(**inputs, return_dict_in_generate=True, **GREEDY)
    assert same(made, loaded("llava").generate(inputs, **GREEDY))


def test_it_waits_for_the_answer_before_it_closes(exported: Any) -> None:
    each = LlamaCppRuntime(adapter_of("llava"), exported("llava"), engine=EXACT)
    begun, found = threading.Event(), []

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            begun.set()
            time.sleep(0.01)

        def end(self) -> None: ...

    def answer() -> None:
        found.append(each.generate(inputs_of("llava"), streamer=Streamer(), **GREEDY))

    thread = threading.Thread(target=answer)
    thread.start()
    assert begun.wait(30)
    each.close()
    thread.join()
    assert len(found[0].new_tokens[0]) == NEW
    each.close()
    refused(lambda: each.generate(inputs_of("llava"), **GREEDY), InputError, "is closed")


def test_logits_are_read_where_they_are_now(exported: Any) -> None:
    """llama.cpp moves them when it makes more room, also in a call whose logits nobody read."""
    file = sorted(exported("llava").glob("segment-*.gguf"))[-1]
    each = segment.Segment(file, EXACT, tap_layer=None)
    kept = [np.full((4, each.vocabulary), value, dtype=np.float32) for value in (1, 2)]
    for place in (*kept, kept[0]):
        each._logits_address = lambda _, place=place: place.ctypes.data  # type: ignore[assignment]
        assert np.array_equal(each.logits(1), place[:1])
        assert np.array_equal(each.logits(4), place)
    each.close()


def test_a_callback_does_not_wait_for_its_own_answer(exported: Any) -> None:
    inputs, said = inputs_of("llava"), []

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            for ask in (each.close, lambda: each.generate(inputs, **GREEDY)):
                refused(ask, InputError, "callback")
            said.append(value)

        def end(self) -> None: ...

    with LlamaCppRuntime(adapter_of("llava"), exported("llava"), engine=EXACT) as each:
        made = each.generate(inputs, streamer=Streamer(), **GREEDY)
        assert len(said) > NEW and same(made, each.generate(inputs, **GREEDY))


@pytest.mark.parametrize("formats", ["f32", "f16"])
def test_the_last_token_of_a_context_is_written(formats: str, exported: Any) -> None:
    """Also where calls take two rows, of which one is forgotten again."""
    inputs = inputs_of("llava")
    room = inputs["input_ids"].shape[1] + 20 - 1
    engine = segment.EngineOptions(context=room, kernels=False)
    with LlamaCppRuntime(adapter_of("llava"), exported("llava", formats), engine=engine) as each:
        for mode in ("full", "lossless", "early_exit"):
            made = each.generate(inputs, mode=mode, max_new_tokens=20, do_sample=False)
            assert made.new_tokens.shape[1] == 20
        over = {"max_new_tokens": 21, "do_sample": False}
        refused(lambda: each.generate(inputs, **over), InputError, f"context of {room}")


@pytest.mark.parametrize(
    "options",
    [{"context": 0}, {"context": 2.5}, {"threads": 0}, {"threads": 10**6}, {"cache": "q8_0"}],
    ids=str,
)
def test_numbers_that_end_the_process_are_refused(options: Any) -> None:
    [value] = options.values()
    refused(lambda: segment.EngineOptions(**options), InputError, str(value))


def test_the_shortest_context_loads(exported: Any) -> None:
    engine = segment.EngineOptions(context=1)
    with LlamaCppRuntime(adapter_of("llava"), exported("llava"), engine=engine) as each:
        refused(lambda: each.generate(inputs_of("llava"), **GREEDY), InputError, "context of 1")


# -- what is refused ---------------------------------------------------------------------------


def test_a_damaged_export_is_refused(exported: Any, tmp_path: Path) -> None:
    def load(folder: Path) -> Any:
        return lambda: LlamaCppRuntime(adapter_of("llava"), folder, engine=EXACT)

    refused(load(tmp_path), AdapterError, "holds no exported segments")
    folder = tmp_path / "gguf"
    shutil.copytree(exported("llava"), folder)
    file = folder / "segment-1.gguf"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    refused(load(folder), AdapterError, "segment-1.gguf is damaged")
    file.write_bytes(whole[:-4] + b"\0\0\1\0")
    refused(load(folder), AdapterError, "segment-1.gguf is damaged")
    file.unlink()
    refused(load(folder), AdapterError, "segment-1.gguf is damaged or missing")
    file.write_bytes(whole)
    (folder / DIGESTS).write_text("[1]")
    refused(load(folder), AdapterError, "is damaged")


def test_a_truncated_file_is_refused_without_its_digest(exported: Any, tmp_path: Path) -> None:
    folder = tmp_path / "gguf"
    shutil.copytree(exported("llava"), folder)
    whole = (folder / "segment-0.gguf").read_bytes()
    for left in (10, 200, len(whole) - 100):
        (folder / "segment-0.gguf").write_bytes(whole[:left])
        refused(
            lambda: LlamaCppRuntime(adapter_of("llava"), folder, engine=EXACT, check_digests=False),
            AdapterError,
            "segment-0.gguf",
        )


def test_files_of_another_adapter_or_backbone_are_refused(exported: Any) -> None:
    adapter = adapter_of("llava")
    other = replace(adapter, exits=ExitSet(Exits(adapter.backbone, DEPTHS), SHORT))
    refused(lambda: LlamaCppRuntime(other, exported("llava")), AdapterError, "other than this")
    smol = adapter_of("smolvlm")
    refused(lambda: LlamaCppRuntime(smol, exported("llava")), AdapterError, "this backbone")


def test_files_that_compute_something_else_are_refused(
    exported: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_of("llava")
    read = type(adapter.backbone).logits
    monkeypatch.setattr(type(adapter.backbone), "logits", lambda *a: read(*a).flip(-1))
    refused(lambda: LlamaCppRuntime(adapter, exported("llava")), AdapterError, "correlate")


def test_a_tensor_that_is_not_there_is_refused(
    exported: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = segment.Tap
    monkeypatch.setattr(
        segment, "Tap", lambda lib, name, *a, **k: made(lib, name and "x" + name, *a, **k)
    )
    refused(
        lambda: LlamaCppRuntime(adapter_of("llava"), exported("llava")),
        UnsupportedBackboneError,
        "0 rows",
    )


@pytest.mark.parametrize(
    "policy, word",
    [(ExitPolicy({3: 0.5}, shortlist=True), "[3]"), (ExitPolicy({2: 0.5}), "shortlist")],
    ids=str,
)
def test_policies_that_cannot_be_followed_are_refused(
    policy: ExitPolicy, word: str, loaded: Any
) -> None:
    refused(lambda: loaded("llava").generate(inputs_of("llava"), policy=policy), InputError, word)


@pytest.mark.parametrize("name", ["llava", "blip2-opt"])
def test_a_registered_drafter_drafts_lossless_answers(name: str, loaded: Any, ngram: str) -> None:
    ours, inputs = loaded(name), inputs_of(name)
    policy = ExitPolicy(lossless=True, drafts={ngram: 0.0})
    made = ours.generate(inputs, policy=policy, **GREEDY)
    assert torch.equal(made.sequences, ours.generate(inputs, policy=FULL, **GREEDY).sequences)
    assert made.rounds and {*made.depths.flatten().tolist()} == {ours.backbone.depth}


def test_a_score_that_reads_more_than_logits_is_refused(loaded: Any, idle: str) -> None:
    policy, asked = ExitPolicy({2: 0.5}, shortlist=True, score=idle), loaded("llava").generate
    refused(lambda: asked(inputs_of("llava"), policy=policy), InputError, idle)


def test_inputs_that_do_not_fit_are_refused(loaded: Any) -> None:
    each = loaded("llava")
    two = families.KINDS["llava"].inputs(2)
    refused(lambda: each.generate(two, **GREEDY), InputError, "writes 1 at a time")
    one = inputs_of("llava")
    refused(lambda: each.generate(one, max_new_tokens=300), InputError, "context of 256")
    refused(lambda: each.generate(one, num_beams=2), InputError, "num_beams")
    del one["pixel_values"]
    refused(lambda: each.generate(one, **GREEDY), InputError, "without its image")


def test_a_missing_package_is_named(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from offramp_llama_cpp import packages

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    adapter, folder = adapter_of("llava"), exported("llava")  # which import late
    monkeypatch.setattr(packages.importlib, "import_module", missing)
    segment.library.cache_clear()
    refused(lambda: export_gguf(adapter, folder), InputError, "[llama-cpp]")
    refused(packages.import_llama_cpp, InputError, "llama_cpp")
