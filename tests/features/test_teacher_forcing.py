"""Training sees the states that inference sees: the same tokens, the same depth, answers only."""

from __future__ import annotations

import gc
import inspect
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fakes
import families
import pytest
import reference
import torch
from torch import Tensor

from offramp.adapter.answers import full_model_answers
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.errors import DataError, InputError
from offramp.core.executors.prefill import Prefill, prepare
from offramp.core.models.exits import Exits
from offramp.core.models.intercept import InterceptedModel
from offramp.features.input_processor import InputProcessor
from offramp.features.teacher_forcing import (
    Answered,
    Batch,
    StateRecorder,
    exit_features,
    record,
    without_inputs,
)
from offramp.training.feature_store import FeatureStore

FAMILIES = families.NAMES
# The fake pads InstructBLIP's question on the left, which its Q-Former reads as another one.
BATCHABLE = tuple(name for name in FAMILIES if not name.startswith("instructblip"))
DEPTHS = (2, 4)

Build = Callable[..., Any]


def input_processor_of(backbone: Any, name: str) -> InputProcessor:
    return InputProcessor(backbone, fakes.Blip2FakeProcessor(name))


def answered(encoder: InputProcessor, n: int = 4) -> list[Answered]:
    """Answers of different lengths, after prompts of different lengths."""
    return [
        Answered(e, tuple(encoder.answer_ids(e.prompt, e.answers[0])), labelled=True)
        for e in fakes.examples(n)
    ]


def noisy_exits(backbone: Any, depths: tuple[int, ...] = DEPTHS) -> Exits:
    """Exits that are no longer copies of a layer."""
    exits = Exits(backbone, depths)
    with torch.no_grad():
        for parameter in exits.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return exits


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def uncached(
    backbone: Any, inputs: dict[str, Tensor], ids: Tensor
) -> tuple[dict[int, Tensor], Any]:
    """The HF model itself over prompt and answer at once: states entering layers, and logits."""
    states: dict[int, Tensor] = {}

    def note(depth: int) -> Callable[..., None]:
        return lambda _layer, args: states.__setitem__(depth, args[0].detach())

    given = dict(inputs)
    if backbone.is_encoder_decoder or backbone.model.config.is_encoder_decoder:
        start = torch.full((len(ids), 1), int(backbone.text_config.decoder_start_token_id))
        given["decoder_input_ids"] = torch.cat([start, ids], 1)
    else:
        given = reference._continued(backbone, given, torch.cat([given["input_ids"], ids], 1))
        takes = inspect.signature(backbone.model.forward).parameters
        if "position_ids" in takes and "image_grid_thw" not in given:
            given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    hooks = [backbone.layers[d].register_forward_pre_hook(note(d)) for d in DEPTHS]
    try:
        with torch.no_grad():
            logits = backbone.model(**given, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return states, logits


@pytest.mark.parametrize("name", FAMILIES)
def test_recorded_states_are_those_of_an_uncached_forward_of_the_model(
    name: str, backbone: Build
) -> None:
    encoder = input_processor_of(backbone(name), name)
    rows = answered(encoder)
    batch = record(encoder, rows, DEPTHS)
    inputs = encoder.prompts([row.example for row in rows])
    states, logits = uncached(encoder.backbone, inputs, batch.targets)
    tokens = batch.targets.shape[1]
    for depth in DEPTHS:
        wanted = states[depth][:, -tokens - 1 : -1]
        close(batch.entries(depth)[batch.mask], wanted[batch.mask])
        prompt = batch.prompt[depth].shape[1]
        real = torch.ones(len(rows), prompt, dtype=torch.bool)
        if not encoder.backbone.is_encoder_decoder:
            real = inputs["attention_mask"].bool()
        close(batch.prompt[depth][real], states[depth][:, :prompt][real])
    read = encoder.backbone.logits(batch.teacher)
    wanted = logits[:, -tokens - 1 : -1][batch.mask]
    close(read[batch.mask], wanted)


@pytest.mark.parametrize("name", BATCHABLE)
def test_the_final_layer_predicts_the_answers_that_the_model_wrote_itself(
    name: str, backbone: Build
) -> None:
    encoder = input_processor_of(backbone(name), name)
    rows = full_model_answers(encoder, fakes.examples(5), batch_size=3, max_new_tokens=6)
    batch = record(encoder, rows, DEPTHS)
    said = encoder.backbone.logits(batch.teacher).argmax(-1)
    assert torch.equal(said[batch.mask], batch.targets[batch.mask])
    assert len({tuple(row.ids) for row in rows}) > 1


@pytest.mark.parametrize("name", FAMILIES)
def test_an_exit_computes_in_training_what_it_computes_in_decoding(
    name: str, backbone: Build
) -> None:
    encoder = input_processor_of(backbone(name), name)
    exits = noisy_exits(encoder.backbone)
    some = fakes.examples(4)
    new, decoded = [], []
    for example in some:
        seen: dict[int, list[Tensor]] = {d: [] for d in DEPTHS}
        hooks = [
            exits.at(d).register_forward_hook(
                lambda _m, _a, out, d=d, seen=seen: seen[d].append(
                    out[0] if isinstance(out, tuple) else out
                )
            )
            for d in DEPTHS
        ]
        result = generate(
            encoder.backbone,
            encoder.prompts([example]),
            exits=exits,
            policy=ExitPolicy({d: 1.0 for d in DEPTHS}, score="margin"),
            max_new_tokens=5,
            do_sample=False,
        )
        for hook in hooks:
            hook.remove()
        assert (result.depths == encoder.backbone.depth).all()
        new.append(tuple(result.new_tokens[0].tolist()))
        decoded.append(seen)
    rows = [Answered(e, ids, labelled=False) for e, ids in zip(some, new, strict=True)]
    for row, seen in zip(rows, decoded, strict=True):
        with torch.no_grad():
            features = exit_features(encoder.backbone, exits, record(encoder, [row], DEPTHS))
        compare(encoder, features, seen)


def compare(encoder: Any, features: Any, seen: Any) -> None:
    """What training makes of one row beside what decoding made of it."""
    for depth in DEPTHS:
        steps = torch.cat([state[:, -1:] for state in seen[depth]], 1)
        # Where nobody may exit at the prompt, its exit states are not computed.
        looked = encoder.backbone.is_encoder_decoder or encoder.backbone.family.causal_prompt
        assert steps.shape[1] == (5 if looked else 4)
        wanted = encoder.backbone.final_norm(steps)
        found = features[depth][:, -steps.shape[1] :]
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_copied_exit_before_the_last_layer_has_the_teachers_features(
    name: str, backbone: Build
) -> None:
    encoder = input_processor_of(backbone(name), name)
    depth = encoder.backbone.depth - 1
    batch = record(encoder, answered(encoder), (depth,))
    with torch.no_grad():
        features = exit_features(encoder.backbone, Exits(encoder.backbone, (depth,)), batch)[depth]
    torch.testing.assert_close(
        features[batch.mask], batch.teacher[batch.mask], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", BATCHABLE)
def test_the_company_in_a_batch_changes_no_feature(name: str, backbone: Build) -> None:
    encoder = input_processor_of(backbone(name), name)
    exits = noisy_exits(encoder.backbone)
    rows = answered(encoder)
    together = record(encoder, rows, DEPTHS)
    with torch.no_grad():
        crowd = exit_features(encoder.backbone, exits, together)
        for i, row in enumerate(rows):
            alone = record(encoder, [row], DEPTHS)
            length = len(row.ids)
            torch.testing.assert_close(
                together.teacher[i, :length], alone.teacher[0], rtol=1e-4, atol=1e-4
            )
            single = exit_features(encoder.backbone, exits, alone)
            for depth in DEPTHS:
                torch.testing.assert_close(
                    crowd[depth][i, :length], single[depth][0], rtol=1e-4, atol=1e-4
                )


def test_answers_count_and_nothing_else_does(backbone: Build) -> None:
    encoder = input_processor_of(backbone("blip2-opt"), "blip2-opt")
    rows = answered(encoder)
    batch = record(encoder, rows, DEPTHS)
    assert batch.mask.sum(1).tolist() == [len(row.ids) for row in rows]
    for i, row in enumerate(rows):
        assert batch.targets[i][batch.mask[i]].tolist() == list(row.ids)


def test_an_answer_of_one_token_has_features(backbone: Build) -> None:
    encoder = input_processor_of(backbone("llava"), "llava")
    rows = [Answered(e, (9,), labelled=False) for e in fakes.examples(2)]
    batch = record(encoder, rows, DEPTHS)
    features = exit_features(encoder.backbone, Exits(encoder.backbone, DEPTHS), batch)
    assert {d: tuple(f.shape) for d, f in features.items()} == {d: (2, 1, 32) for d in DEPTHS}


def test_a_gradient_reaches_the_keys_that_an_exit_laid_down_over_the_prompt(
    backbone: Build,
) -> None:
    encoder = input_processor_of(backbone("llava"), "llava")
    exits = Exits(encoder.backbone, (2,))
    batch = record(encoder, answered(encoder), (2,))
    batch.prompt[2].requires_grad_(True)
    exit_features(encoder.backbone, exits, batch)[2][:, 1:].sum().backward()
    assert batch.prompt[2].grad is not None and batch.prompt[2].grad[:, :-1].abs().sum() > 0


def test_recording_leaves_the_users_model_without_hooks_and_gradients(backbone: Build) -> None:
    one = backbone("blip2-opt")
    encoder = input_processor_of(one, "blip2-opt")
    record(encoder, answered(encoder), DEPTHS)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in one.model.modules())
    assert all(p.grad is None for p in one.model.parameters())


# -- the cache of batches ---------------------------------------------------------------------


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value.values() for t in tensors(v)] if isinstance(value, dict) else []


def same(a: Batch, b: Batch) -> bool:
    pairs = zip(tensors(a.__dict__), tensors(b.__dict__), strict=True)
    return a.keys == b.keys and all(torch.equal(x, y) for x, y in pairs)


def filled(encoder: InputProcessor, cache: str, folder: Path, rows: Any = None) -> FeatureStore:
    store = FeatureStore(
        encoder, rows or answered(encoder, 7), DEPTHS, batch_size=3, cache=cache, folder=folder
    )
    store.fill()
    return store


@pytest.mark.parametrize("name", ["blip2-t5", "gemma3"])
def test_every_cache_gives_the_same_batches(name: str, backbone: Build, tmp_path: Path) -> None:
    encoder = input_processor_of(backbone(name), name)
    stores = [filled(encoder, kind, tmp_path) for kind in ("memory", "disk", "stream")]
    assert [store.kind for store in stores] == ["memory", "disk", "stream"]
    for index in range(len(stores[0])):
        first, *others = (store[index] for store in stores)
        assert all(same(first, other) for other in others)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "gemma3"])
def test_the_stated_size_is_what_is_held_and_it_is_held_once(name: str, backbone: Build) -> None:
    encoder = input_processor_of(backbone(name), name)
    rows = answered(encoder, 12)
    record(encoder, rows[:2], DEPTHS)  # what the model itself keeps from its first call

    def held() -> int:
        gc.collect()
        found = [o for o in gc.get_objects() if type(o) is Tensor]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
        return sum(storages.values())

    before = held()
    store = FeatureStore(encoder, rows, DEPTHS, batch_size=4, cache="memory")
    store.fill()
    assert abs(held() - before - store.nbytes) < 0.2 * store.nbytes


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_an_epoch_runs_no_backbone_layer(cache: str, backbone: Build, tmp_path: Path) -> None:
    one = backbone("blip2-opt")
    encoder = input_processor_of(one, "blip2-opt")
    store = filled(encoder, cache, tmp_path)
    exits, calls = Exits(one, DEPTHS), list[int]()
    hooks = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in one.layers]
    for index in range(len(store)):
        exit_features(one, exits, store[index])
    for hook in hooks:
        hook.remove()
    assert not calls


def test_a_disk_cache_of_other_answers_is_not_taken_up(backbone: Build, tmp_path: Path) -> None:
    encoder = input_processor_of(backbone("blip2-opt"), "blip2-opt")
    old = filled(encoder, "disk", tmp_path)
    rows = [Answered(r.example, (*r.ids[:-1], 50, 2), r.labelled) for r in answered(encoder, 7)]
    new = filled(encoder, "disk", tmp_path, rows)
    assert new[0].targets.shape != old[0].targets.shape


def test_a_disk_cache_is_recorded_once(
    backbone: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = input_processor_of(backbone("blip2-opt"), "blip2-opt")
    filled(encoder, "disk", tmp_path)
    monkeypatch.setattr("offramp.training.feature_store._save", None)  # would fail if called
    filled(encoder, "disk", tmp_path)


def small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))


def test_a_disk_cache_refuses_a_disk_that_is_too_small(
    backbone: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = input_processor_of(backbone("blip2-opt"), "blip2-opt")
    small_disk(monkeypatch)
    with pytest.raises(InputError, match="free at"):
        filled(encoder, "disk", tmp_path)


def test_auto_prefers_memory_then_disk_then_streaming(
    backbone: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = input_processor_of(backbone("blip2-opt"), "blip2-opt")
    rows = answered(encoder, 7)

    def kind(memory: int) -> str:
        return FeatureStore(
            encoder, rows, DEPTHS, batch_size=3, folder=tmp_path, memory_bytes=memory
        ).kind

    assert (kind(1 << 30), kind(10)) == ("memory", "disk")
    small_disk(monkeypatch)
    assert kind(10) == "stream"


# -- answers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5"])
def test_a_full_model_answers_answer_is_the_models_own_greedy_one(
    name: str, backbone: Build
) -> None:
    encoder = input_processor_of(backbone(name), name)
    some = fakes.examples(3)
    rows = full_model_answers(encoder, some, batch_size=3, max_new_tokens=6)
    for example, row in zip(some, rows, strict=True):
        stock = encoder.backbone.model.generate(
            **encoder.prompts([example]), max_new_tokens=6, do_sample=False
        )
        assert stock[0, -len(row.ids) :].tolist() == list(row.ids)


def test_the_confidence_filter_keeps_the_answers_above_it(backbone: Build) -> None:
    encoder = input_processor_of(backbone("blip2-opt"), "blip2-opt")
    some = fakes.examples(8)

    def kept(bound: float) -> set[str]:
        rows = full_model_answers(
            encoder, some, batch_size=4, max_new_tokens=4, min_confidence=bound
        )
        return {row.example.key for row in rows}

    sizes = [len(kept(bound)) for bound in (0.0, 0.04, 0.045, 1.0)]
    assert sizes == sorted(set(sizes), reverse=True) and sizes[0] == 8 and sizes[-1] == 0
    assert kept(0.045) < kept(0.04)


def test_the_confidence_filter_tells_how_sure_the_answers_are(
    backbone: Build, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = input_processor_of(backbone("blip2-opt"), "blip2-opt")
    some = fakes.examples(8)

    def told(bound: float) -> str:
        caplog.clear()
        with caplog.at_level("INFO", logger="offramp"):
            full_model_answers(encoder, some, batch_size=4, max_new_tokens=4, min_confidence=bound)
        return caplog.text

    assert told(0.0) == ""  # nothing is asked
    words = told(1.0)
    assert "0 of 8 answers reach the confidence 1.0" in words
    median, surest = (float(x) for x in re.findall(r"(?:reach|highest is) ([\d.]+)", words))
    assert "0 of 8 answers" in told(surest + 0.0001)
    assert "0 of 8 answers" not in told(surest - 0.0001)
    assert re.search("[45] of 8 answers", told(median))


def test_confidence_is_the_geometric_mean_of_the_token_probabilities(backbone: Build) -> None:
    encoder = input_processor_of(backbone("llava"), "llava")
    (row,) = full_model_answers(encoder, fakes.examples(1), batch_size=1, max_new_tokens=5)
    batch = record(encoder, [row], DEPTHS)
    log_p = encoder.backbone.logits(batch.teacher[0]).log_softmax(-1)
    exact = float(log_p.gather(1, batch.targets[0][:, None]).mean().exp())
    for bound, n in ((exact * 0.999, 1), (exact * 1.001, 0)):
        some = full_model_answers(
            encoder, [row.example], batch_size=1, max_new_tokens=5, min_confidence=bound
        )
        assert len(some) == n


@pytest.mark.parametrize("name", ["blip2-opt", "florence2"])
def test_an_answer_longer_than_the_positions_is_an_error_that_names_it(
    name: str, backbone: Build
) -> None:
    encoder = input_processor_of(backbone(name), name)
    example = fakes.examples(1)[0]
    row = Answered(example, tuple([9] * 130), labelled=True)
    with pytest.raises(DataError, match=r"'e0'.*128 positions"):
        record(encoder, [row], DEPTHS)
    with pytest.raises(DataError, match="128 positions"):
        full_model_answers(encoder, [example], batch_size=1, max_new_tokens=130)


@pytest.mark.parametrize("name", ["blip2-opt", "florence2"])
def test_the_longest_answer_that_the_positions_allow_is_recorded(
    name: str, backbone: Build
) -> None:
    encoder = input_processor_of(backbone(name), name)
    example = fakes.examples(1)[0]
    start = 1
    if not encoder.backbone.is_encoder_decoder:
        start = int(encoder.prompts([example])["attention_mask"].sum())
    row = Answered(example, tuple([9] * (129 - start)), labelled=True)
    assert record(encoder, [row], DEPTHS).targets.shape == (1, 129 - start)
    with pytest.raises(DataError):
        record(encoder, [Answered(example, (*row.ids, 9), labelled=True)], DEPTHS)


def test_a_long_prompt_and_a_long_answer_may_share_a_batch(backbone: Build) -> None:
    encoder = input_processor_of(backbone("blip2-opt"), "blip2-opt")
    short, long = fakes.examples(2)
    long = replace(long, prompt=" ".join(["w9"] * 100))
    rows = [
        Answered(short, tuple([9] * 100), labelled=True),
        Answered(long, (9, 10, 11), labelled=True),
    ]
    together, alone = record(encoder, rows, DEPTHS), record(encoder, rows[1:], DEPTHS)
    close(together.teacher[1, :3], alone.teacher[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_reading_that_retreats_goes_on_as_if_it_had_not_advanced(
    name: str, backbone: Build
) -> None:
    encoder = input_processor_of(backbone(name), name)
    intercepted = InterceptedModel(encoder.backbone, StateRecorder(encoder.backbone, ()))
    prepared = prepare(intercepted.model, encoder.prompts(fakes.examples(3)), max_new_tokens=1)
    straight, back = (Prefill(intercepted, prepared) for _ in range(2))
    straight.extend(1)
    back.extend(4)
    back.rollback(3)
    found = [[straight.extend(2), back.extend(2)]]
    first, second = (tensors(without_inputs(kw)) for kw in found[0])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
