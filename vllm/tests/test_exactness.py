"""Answers inside vLLM are offramp's own early answers, token for token and depth for depth."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import answers, stored
from engine import depths as depths_of

from offramp_vllm.refuse import Refused

FAMILIES = (
    "llama",
    "opt",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "granite",
    "stablelm",
    "cohere",
    "glm4",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "bloom",
    "qwen3_moe",
    "mixtral",
)
FULL = {"offramp_mode": "full"}


def prompts(rows: list[dict[str, list[int]]]) -> list[list[int]]:
    return [row["prompt"] for row in rows]


def expect(got: list[tuple[list[int], list[int]]], rows: list[dict[str, list[int]]]) -> None:
    assert [one[0] for one in got] == [row["tokens"] for row in rows]
    assert [one[1] for one in got] == [row["depths"] for row in rows]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_answers_as_offramp_alone_and_together(
    name: str, made: Any, serve: Any
) -> None:
    folder = made(name)
    early, full = stored(folder), stored(folder, "full")
    llm = serve(folder / "model", folder / "export")
    for at_once in (1, 8, 24):
        expect(answers(llm, prompts(early), at_once=at_once), early)
    expect(answers(llm, prompts(full), extra_args=FULL), full)


@pytest.mark.parametrize("chunk", [16, 40, 64])
def test_chunks_of_a_prompt_change_nothing(chunk: int, made: Any, serve: Any) -> None:
    folder = made("llama")
    early, full = stored(folder), stored(folder, "full")
    llm = serve(folder / "model", folder / "export", max_num_batched_tokens=chunk, max_num_seqs=8)
    expect(answers(llm, prompts(early)), early)
    expect(answers(llm, prompts(full), extra_args=FULL), full)


def test_requests_that_are_preempted_go_on_as_they_were(made: Any, serve: Any) -> None:
    folder = made("llama")
    early = stored(folder)
    llm = serve(
        folder / "model",
        folder / "export",
        num_gpu_blocks_override=14,
        max_model_len=256,
        disable_log_stats=False,
    )
    expect(answers(llm, prompts(early)), early)
    counts = {m.name: m for m in llm.get_metrics()}
    assert counts["vllm:num_preemptions"].value > 0


def test_cached_prefixes_serve_every_mode(made: Any, serve: Any) -> None:
    folder = made("llama")
    early, full = stored(folder), stored(folder, "full")
    llm = serve(folder / "model", folder / "export", enable_prefix_caching=True)
    for _ in range(2):
        expect(answers(llm, prompts(early)), early)
        expect(answers(llm, prompts(full), extra_args=FULL), full)
    # No exit has run over these: its keys are made up for.
    assert llm.reset_prefix_cache()
    expect(answers(llm, prompts(full), extra_args=FULL), full)
    expect(answers(llm, prompts(early)), early)
    # Answers are continued over blocks whose upper keys wait.
    longer = [row["prompt"] + row["tokens"][:10] for row in early]
    warm = answers(llm, longer, new=8)
    assert llm.reset_prefix_cache()
    assert answers(llm, longer, new=8) == warm


def test_full_depth_runs_no_exit(made: Any, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from offramp_vllm.early import Early

    folder = made("llama")
    full = stored(folder, "full")
    llm = serve(folder / "model", folder / "export")
    monkeypatch.delattr(Early, "_exit")
    expect(answers(llm, prompts(full), extra_args=FULL), full)


def test_modes_and_thresholds_of_one_batch_do_not_disturb_each_other(made: Any, serve: Any) -> None:
    from vllm import SamplingParams

    folder = made("llama")
    early, full = stored(folder), stored(folder, "full")
    llm = serve(folder / "model", folder / "export")
    kinds: list[dict[str, Any]] = [{}, FULL, {"offramp_threshold": 1.0}, {"offramp_threshold": 0.0}]
    params = [
        SamplingParams(temperature=0.0, max_tokens=20, detokenize=False, extra_args=kind)
        for _ in early
        for kind in kinds
    ]
    asked = [{"prompt_token_ids": row["prompt"]} for row in early for _ in kinds]
    got = [list(m.outputs[0].token_ids) for m in llm.generate(asked, params, use_tqdm=False)]
    assert got[0::4] == [row["tokens"] for row in early]
    assert got[1::4] == got[2::4] == [row["tokens"] for row in full]
    alone = answers(llm, prompts(early), at_once=1, extra_args=kinds[3])
    assert got[3::4] == [tokens for tokens, _ in alone]
    # First tokens keep their own threshold, which is stricter.
    assert all(set(depths[1:]) == {2} for _, depths in alone)


def test_full_depth_answers_of_low_priority_go_beside_early_ones(made: Any, serve: Any) -> None:
    """As a watch asks for them."""
    from vllm import SamplingParams

    folder = made("llama")
    early, full = stored(folder), stored(folder, "full")
    llm = serve(
        folder / "model",
        folder / "export",
        scheduling_policy="priority",
        max_num_seqs=4,
        num_gpu_blocks_override=14,
        max_model_len=256,
    )
    kinds = [{}, FULL]
    params = [
        SamplingParams(temperature=0.0, max_tokens=20, detokenize=False, extra_args=kind)
        for _ in early
        for kind in kinds
    ]
    asked = [{"prompt_token_ids": row["prompt"]} for row in early for _ in kinds]
    made_ = llm.generate(asked, params, priority=[0, 1] * len(early), use_tqdm=False)
    got = [list(one.outputs[0].token_ids) for one in made_]
    assert got[0::2] == [row["tokens"] for row in early]
    assert got[1::2] == [row["tokens"] for row in full]


def test_a_watch_counts_early_answers_that_the_full_model_gives_too(made: Any, serve: Any) -> None:
    from prometheus_client import REGISTRY

    def count(same: str) -> float:
        name = "offramp:watched_answers_total"
        return REGISTRY.get_sample_value(name, {"same": same}) or 0.0

    folder = made("llama")
    early, full = stored(folder), stored(folder, "full")
    config = {"offramp": {"exits": str(folder / "export"), "watch": 1.0}}
    llm = serve(folder / "model", additional_config=config, scheduling_policy="priority")
    before = count("true"), count("false")
    for row in early:  # one after the other: not more are watched at once than may be
        expect(answers(llm, [row["prompt"]]), [row])
        while llm.llm_engine.engine_core.engine_core.scheduler.has_unfinished_requests():
            llm.llm_engine.step()
    assert answers(llm, prompts(full), extra_args=FULL)  # not early
    same = sum(one["tokens"] == other["tokens"] for one, other in zip(early, full, strict=True))
    assert (count("true") - before[0], count("false") - before[1]) == (same, len(early) - same)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.8, "seed": 7, "top_p": 0.9},
        {"repetition_penalty": 1.3},
        {"logit_bias": {5: 4.0, 9: -2.0}},
        {"min_tokens": 12},
        {"allowed_token_ids": list(range(3, 200))},
    ],
    ids=lambda p: next(reversed(p)),
)
def test_what_changes_logits_is_the_same_alone_and_together(
    params: dict[str, Any], made: Any, serve: Any
) -> None:
    folder = made("llama")
    rows = prompts(stored(folder))[:12]
    llm = serve(folder / "model", folder / "export")
    together = answers(llm, rows, **params)
    assert answers(llm, rows, at_once=1, **params) == together
    assert len({depth for _, depths in together for depth in depths}) > 1


def test_prompts_logprobs_are_the_full_models(made: Any, serve: Any) -> None:
    folder = made("llama")
    rows = prompts(stored(folder))[:4]
    found = []
    for exits in (folder / "export", None):
        from vllm import SamplingParams

        llm = serve(folder / "model", exits)
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        made_ = llm.generate([{"prompt_token_ids": r} for r in rows], params, use_tqdm=False)
        found.append(
            [one.logprob for m in made_ for at in m.prompt_logprobs[1:] for one in at.values()]
        )
    assert found[0] == pytest.approx(found[1], abs=1e-4)


@pytest.mark.parametrize(("quick", "steps"), [(0.0, 20), (1e9, 4)])
def test_tokens_are_the_same_however_many_are_handed_over_at_once(
    quick: float, steps: int, made: Any, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offramp_vllm.v1.QUICK", quick)
    folder = made("llama")
    early = stored(folder)
    llm = serve(folder / "model", folder / "export", enable_prefix_caching=True)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    theirs, taken = scheduler.update_from_output, list[int]()
    scheduler.update_from_output = lambda *args: (taken.append(1), theirs(*args))[1]
    expect(answers(llm, prompts(early)[:1]), early[:1])
    assert len(taken) == steps
    expect(answers(llm, prompts(early), at_once=8), early)
    expect(answers(llm, prompts(early)), early)  # over blocks of these answers


def test_cancelled_requests_leave_the_others_alone(made: Any, serve: Any) -> None:
    from vllm import SamplingParams

    folder = made("llama")
    early = stored(folder)
    llm = serve(folder / "model", folder / "export")
    engine = llm.llm_engine
    params = SamplingParams(temperature=0.0, max_tokens=20, detokenize=False)
    ids = [
        engine.add_request(str(place), {"prompt_token_ids": row["prompt"]}, params)
        for place, row in enumerate(early)
    ]
    got, step = {}, 0
    while engine.has_unfinished_requests():
        for one in engine.step():
            if one.finished:
                got[one.request_id] = list(one.outputs[0].token_ids)
        step += 1
        if step == 5:
            engine.abort_request(ids[::3], internal=True)
    kept = [place for place in range(len(early)) if place % 3]
    assert [got[str(place)] for place in kept] == [early[place]["tokens"] for place in kept]
    expect(answers(llm, prompts(early)), early)


def tampered(folder: Path, change: Any, into: Path) -> Path:
    """An export whose vllm.json is changed."""
    shutil.copytree(folder, into)
    said = json.loads((into / "vllm.json").read_text())
    change(said)
    (into / "vllm.json").write_text(json.dumps(said))
    return into


def other_tokens(said: dict[str, Any]) -> None:
    for one in said["checked"]:
        one["tokens"] = [token + 1 for token in one["tokens"]]


def other_depths(said: dict[str, Any]) -> None:
    for one in said["checked"]:
        one["depths"] = [8 - depth for depth in one["depths"]]


def no_prompts(said: dict[str, Any]) -> None:
    said["checked"] = []


@pytest.mark.parametrize("change", [other_tokens, other_depths, no_prompts])
def test_answers_that_are_not_the_stored_ones_switch_exits_off(
    change: Any, made: Any, serve: Any, tmp_path: Path
) -> None:
    folder = made("llama")
    llm = serve(folder / "model", tampered(folder / "export", change, tmp_path / "export"))
    full = stored(folder, "full")
    got = answers(llm, prompts(full))
    assert [one[0] for one in got] == [row["tokens"] for row in full]
    assert {depth for _, depths in got for depth in depths} == {6}


def test_a_model_that_is_not_itself_at_full_depth_is_refused(
    made: Any, serve: Any, tmp_path: Path
) -> None:
    """As classes are that scale their layers by how many there are."""

    def other_full(said: dict[str, Any]) -> None:
        for one in said["checked"]:
            one["full"] = [token + 1 for token in one["full"]]

    folder = made("llama")
    with pytest.raises(Refused, match="At full depth"):
        serve(folder / "model", tampered(folder / "export", other_full, tmp_path / "export"))


@pytest.mark.parametrize("noise", [0.03, 1.0])
def test_exits_of_another_backbone_are_refused(
    noise: float, made: Any, serve: Any, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = made("llama")
    shutil.copytree(folder / "model", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    torch.manual_seed(1)
    weights = load_file(file)
    for name, weight in weights.items():
        if ".layers." in name:
            weights[name] = weight + noise * weight.std() * torch.randn_like(weight)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(Refused, match="another backbone"):
        serve(tmp_path / "model", folder / "export")


def test_choices_of_one_request_tell_their_own_depths(made: Any, serve: Any) -> None:
    from vllm import SamplingParams

    folder = made("llama")
    llm = serve(folder / "model", folder / "export")
    prompt = {"prompt_token_ids": stored(folder)[0]["prompt"]}
    params = SamplingParams(temperature=1.0, seed=1, n=4, max_tokens=20, detokenize=False)
    [answer] = llm.generate([prompt], params, use_tqdm=False)
    told = [depths_of(answer, place) for place in range(4)]
    assert [len(one) for one in told] == [len(one.token_ids) for one in answer.outputs]
    assert len({tuple(one) for one in told}) > 1


def test_in_half_precision_full_depth_is_vllms_own(made: Any, serve: Any) -> None:
    folder = made("qwen3")
    rows = prompts(stored(folder))
    plain = answers(serve(folder / "model", dtype="bfloat16"), rows, at_once=8)
    beside = serve(folder / "model", folder / "export", dtype="bfloat16")
    got = answers(beside, rows, at_once=8, extra_args=FULL)
    assert [one[0] for one in got] == [one[0] for one in plain]


def test_a_stream_gets_each_token_as_it_is_there(
    made: Any, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.sampling_params import RequestOutputKind

    from vllm import SamplingParams

    monkeypatch.setattr("offramp_vllm.v1.QUICK", 1e9)
    folder = made("llama")
    early = stored(folder)[0]
    engine = serve(folder / "model", folder / "export").llm_engine
    params = SamplingParams(
        temperature=0.0, max_tokens=20, detokenize=False, output_kind=RequestOutputKind.DELTA
    )
    engine.add_request("0", {"prompt_token_ids": early["prompt"]}, params)
    parts, depths = [], []
    while engine.has_unfinished_requests():
        for one in engine.step():
            parts.append(list(one.outputs[0].token_ids))
            depths += depths_of(one)
    assert [token for part in parts for token in part] == early["tokens"]
    assert {len(part) for part in parts} == {1} and depths == early["depths"]


def test_a_ragged_call_leaves_the_steps_attention_metadata_alone(
    made: Any, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some builders keep one plan, and the step's call goes on after a ragged one."""
    folder = made("llama")
    early = stored(folder)
    llm = serve(folder / "model", folder / "export")
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.model_runner
    built, steps, ragged = list[int](), list[int](), list[int]()
    for asked, calls in ((runner.attn_groups, built), *((one, ragged) for one in runner._builders)):
        for groups in asked:
            for group in groups:
                [builder] = group.metadata_builders
                theirs = builder.build
                builder.build = lambda *a, _t=theirs, _c=calls, **k: (_c.append(1), _t(*a, **k))[1]
    forward = runner.execute_model
    monkeypatch.setattr(
        runner,
        "execute_model",
        lambda plan, *a: (
            steps.append(1) if plan.total_num_scheduled_tokens else None,
            forward(plan, *a),
        )[1],
    )
    expect(answers(llm, prompts(early), at_once=8), early)
    assert len(built) == len(steps) and len(ragged) > len(steps) / 2


@pytest.mark.parametrize("at_once", [1, 8])
def test_a_step_waits_for_the_device_once_for_each_exit_that_is_asked(
    at_once: int, made: Any, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What else a host waits for: a number of the device's, or a size that values decide."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from offramp_vllm import early as ours

    aten = torch.ops.aten
    waits = {
        aten._local_scalar_dense,
        aten.nonzero,
        aten.equal,
        aten.masked_select,
        aten.repeat_interleave,
    }
    seen, told, steps = list[str](), list[int](), list[tuple[int, int]]()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kw: Any = None) -> Any:
            flags = op.overloadpacket is aten.index and any(
                one is not None and one.dtype == torch.bool for one in args[1]
            )
            if op.overloadpacket in waits or flags:
                seen.append(str(op))
            return op(*args, **(kw or {}))

    monkeypatch.setattr(ours, "fetched", lambda one: (told.append(1), one.numpy())[1])
    folder = made("llama")
    early = stored(folder)
    llm = serve(folder / "model", folder / "export")
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.model_runner

    def counted(theirs: Any) -> Any:
        def run(*args: Any, **kw: Any) -> Any:
            before = len(told)
            with Counting():
                made_ = theirs(*args, **kw)
            steps.append((len(told) - before, len(runner.early.exported.depths)))
            return made_

        return run

    runner.early.decoder.forward = counted(runner.early.forward)
    runner.early.forward = runner.early.decoder.forward  # of tokens that are written ahead
    expect(answers(llm, prompts(early), at_once=at_once), early)
    assert not seen and told and all(waited <= exits for waited, exits in steps)
