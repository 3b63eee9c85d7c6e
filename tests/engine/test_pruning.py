"""Visual tokens that stay behind, at an exit or before the decoder: answers are those of a model in
which they are hidden from the layers above, whatever exits, waits or shares a batch with them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from adapters import trained
from decoding import CALM, EXACT, NEW, greedy, never, tokens_by_layer
from families import FIRST_WORD, IMAGE, WORDLESS, one_row
from reference import Dice, Noted, Probe, _continued, of_steps
from torch import Tensor

from offramp.adapter import Adapter
from offramp.calibration.replay import can_replay
from offramp.engine.generate import generate
from offramp.engine.policy import (
    RANKINGS,
    ExitPolicy,
    Pruning,
    PruningStage,
    check_all_go_on,
    policy_from_json,
    policy_to_json,
)
from offramp.engine.prefix_cache import PrefixCache
from offramp.engine.pruning import CHOOSERS, Pruner
from offramp.errors import InputError
from offramp.evaluation.loglikelihood import candidate_scores, follows_policy
from offramp.models.backbone import Backbone
from offramp.models.exits import Exits, ExitSet
from offramp.models.intercept import InterceptedModel
from offramp.models.opened import LayerCall
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Request
from offramp.verification import Verification

FAMILIES = [
    "llava", "llava-next", "idefics3", "smolvlm", "qwen2-vl", "qwen2.5-vl", "internvl", "blip2-opt",
    "instructblip-llama",
]  # fmt: skip


class Hidden(Probe):
    """Runs every layer over whole sequences; those from `depth` on, and exits behind it, do not see
    the columns `behind` [B, T]."""

    def __init__(self, *more: Any, depth: int, behind: Tensor, real: Tensor) -> None:
        super().__init__(*more)
        length = behind.shape[1]
        seen = torch.ones(length, length).tril().bool()[None] & (real & ~behind)[:, None]
        self._mask, self._depth = (seen | torch.eye(length).bool())[:, None], depth

    def layer(self, call: LayerCall) -> Any:
        at_exit = self.exits is not None and call.index in self.exits.depths
        if call.index == self._depth and at_exit:  # it has read all of them
            self.estimates[call.index] = state = self.exits.run(call.index, call)
            exits, self.exits = self.exits, None
            try:
                out = super().layer(self._less(call))
            finally:
                self.exits = exits
            self.logits[call.index] = self.backbone.logits(self.backbone.final_norm(state))
            return out
        return super().layer(self._less(call) if call.index >= self._depth else call)

    def _less(self, call: LayerCall) -> LayerCall:
        return replace(call, kw={**call.kw, "attention_mask": self._mask})


@pytest.fixture
def kept(monkeypatch):
    """Which columns [B, T] went on, of each prompt that was read."""
    found: list[Tensor] = []
    plain = Pruner.goes_on

    def note(self: Pruner, *more: Any) -> Tensor:
        found.append(plain(self, *more))
        return found[-1]

    monkeypatch.setattr(Pruner, "goes_on", note)
    return found


def hidden_logits(
    whole: Backbone,
    exits: Exits,
    inputs: dict[str, Tensor],
    sequences: Tensor,
    on: Tensor,
    depth: int,
) -> dict[int, Tensor]:
    given = _continued(whole, dict(inputs), sequences)
    new = sequences.shape[1] - on.shape[1]
    behind = torch.cat([~on, torch.zeros(len(on), new, dtype=torch.bool)], 1)
    real = given["attention_mask"].bool()
    seen = Hidden(whole, exits, depth=depth, behind=behind & real, real=real)
    model = InterceptedModel(whole, seen).model
    if "image_grid_thw" not in given:
        given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        seen.logits[whole.depth] = model(**given, use_cache=False).logits
    return seen.logits


def written(whole: Backbone, exits: Exits, inputs: Any, policy: ExitPolicy) -> Any:
    """A generation, and the logits that each token was chosen from."""
    noted = Noted()
    made = generate(
        whole, inputs, exits=exits, policy=policy, observer=noted,
        max_new_tokens=NEW, do_sample=False, suppress_tokens=WORDLESS,
    )  # fmt: skip
    return made, noted.of(len(made.sequences), NEW)


POLICIES = {
    "no token exits": ({}, False),
    "tokens exit here and there": ({2: 0.4, 4: 0.5}, False),
    "first tokens too": ({2: 0.4, 4: 0.5}, True),
    "all exit": ({2: 0.0}, True),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("case", POLICIES)
@pytest.mark.parametrize("ranking", RANKINGS)
def test_what_stays_behind_is_hidden_from_the_layers_above(
    name, case, ranking, backbone, exits, batch, scored, kept
):
    whole, parts = backbone(name, wide=CALM), exits(name, wide=CALM)
    thresholds, opens = POLICIES[case]
    for rows in (1, 4):
        if thresholds:
            scored(Dice(5))
        policy = ExitPolicy(
            thresholds or never(name).thresholds, first=None if opens else {},
            pruning=Pruning(0.5, ranking),
        )  # fmt: skip
        inputs = batch(name, rows)
        made, logits = written(whole, parts, inputs, policy)
        on = kept.pop()
        images = (inputs["input_ids"] == IMAGE).sum(1)
        left = (inputs["attention_mask"].bool() & ~on).sum(1)
        assert torch.equal(left, images - (images / 2).round().long())
        true = hidden_logits(whole, parts, inputs, made.sequences, on, policy.stages[0].depth)
        for depth in set(made.depths.flatten().tolist()):
            theirs = of_steps(true[depth], NEW)
            off = (logits - theirs)[..., FIRST_WORD:][made.depths == depth]
            assert (off.abs().max() / theirs.abs().max()).item() <= EXACT, (rows, depth)


def test_before_the_decoder_no_layer_runs_over_what_stays(backbone, exits, batch):
    whole, parts, inputs = backbone("llava"), exits("llava"), batch("llava", 1)
    prompt = inputs["input_ids"].shape[1]
    for threshold, deep in ((1.0, prompt + NEW - 1), (0.0, 2)):
        policy = ExitPolicy({2: threshold}, pruning=Pruning(0.5, "divprune"))
        _, counts = tokens_by_layer(
            whole,
            lambda policy=policy: generate(
                whole, inputs, exits=parts, policy=policy, max_new_tokens=NEW
            ),
        )
        assert counts[:2] == [prompt + NEW - 1 - 2] * 2
        assert counts[2:] == [deep - 2] * (whole.depth - 2)


def test_those_go_on_that_are_least_alike():
    """Against a slow loop: always the one whose nearest of those taken is farthest."""
    states = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
    unit = (states / states.norm(dim=-1, keepdim=True)).tolist()

    def far(a: int, b: int) -> float:
        return 1 - sum(x * y for x, y in zip(unit[a], unit[b], strict=True))

    taken = [max(range(24), key=lambda a: min(far(a, b) for b in range(24) if b != a))]
    while len(taken) < 24:
        left = [a for a in range(24) if a not in taken]
        taken.append(max(left, key=lambda a: min(far(a, b) for b in taken)))
    for count in (1, 2, 12, 24):
        assert CHOOSERS["divprune"](states, count).tolist() == taken[:count]
    twins = torch.cat([states[:3], states[:3]])
    assert {i % 3 for i in CHOOSERS["divprune"](twins, 3).tolist()} == {0, 1, 2}


def test_the_layers_above_run_over_what_goes_on_and_no_more(backbone, exits, batch):
    whole, parts, inputs = backbone("llava"), exits("llava"), batch("llava", 1)
    prompt = inputs["input_ids"].shape[1]
    for keep, left in ((1.0, 0), (0.5, 2), (0.25, 3), (0.01, 3)):
        policy = ExitPolicy({2: 1.0}, pruning=Pruning(keep))
        _, counts = tokens_by_layer(
            whole,
            lambda policy=policy: generate(
                whole, inputs, exits=parts, policy=policy, max_new_tokens=NEW
            ),
        )
        assert counts[:2] == [prompt + NEW - 1] * 2
        assert counts[2:] == [prompt + NEW - 1 - left] * (whole.depth - 2)
    _, counts = tokens_by_layer(
        whole,
        lambda: generate(
            whole, inputs, exits=parts, policy=ExitPolicy({2: 0.0}, pruning=Pruning(0.5)),
            max_new_tokens=NEW,
        ),
    )  # fmt: skip
    assert not any(counts[2:])  # it waits, as every prompt whose tokens exit


def test_those_go_on_that_the_last_token_attends_to_most(backbone, exits, batch, kept):
    whole, parts, inputs = backbone("llava"), exits("llava"), batch("llava", 4)
    seen = Probe(whole)
    with torch.inference_mode():
        InterceptedModel(whole, seen).model(
            **inputs, position_ids=(inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        )
    generate(whole, inputs, exits=parts, policy=ExitPolicy({2: 0.5}, pruning=Pruning(0.5)))
    [on] = kept
    module = parts.at(2)
    attention = module.self_attn
    with torch.inference_mode():
        states = module.input_layernorm(seen.outputs[2])
        q, k = (
            proj(states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for proj in (attention.q_proj, attention.k_proj)
        )
        places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        angles = places[..., None] / 10000 ** (
            torch.arange(0, attention.head_dim, 2) / attention.head_dim
        )
        angles = torch.cat([angles, angles], -1)[:, None]

        def turned(x: Tensor) -> Tensor:
            one, other = x.chunk(2, -1)
            return x * angles.cos() + torch.cat([-other, one], -1) * angles.sin()

        q, k = turned(q), turned(k).repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = (q[:, :, -1:] @ k.transpose(2, 3) * attention.scaling)[:, :, 0]
        scores = scores.masked_fill(inputs["attention_mask"][:, None] == 0, float("-inf"))
        shares = scores.softmax(-1).mean(1)
    for row, ids in enumerate(inputs["input_ids"]):
        visual = (ids == IMAGE).nonzero().flatten()
        best = visual[shares[row, visual].topk(len(visual) // 2).indices]
        assert sorted(best.tolist()) == visual[on[row, visual]].tolist()


def test_lossless_answers_are_the_full_models_whatever_stays_behind(backbone, exits, batch):
    whole, parts, inputs = backbone("llava"), exits("llava"), batch("llava", 4)
    policy = ExitPolicy({2: 0.02}, lossless=True, pruning=Pruning(0.25, "divprune"))
    made = generate(whole, inputs, exits=parts, policy=policy, max_new_tokens=NEW)
    assert torch.equal(made.sequences, greedy(whole.model, inputs))
    assert policy.in_mode("lossless").stages == policy.in_mode("full").stages == ()


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
@pytest.mark.parametrize("config", [{}, {"budget": 3}], ids=str)
@pytest.mark.parametrize("ranking", ["attention", "divprune"])
def test_a_row_beside_others_keeps_and_says_what_it_does_alone(
    ranking, name, config, backbone, exits, batch
):
    """Of which some leave visual tokens behind, some do not, and places change hands."""
    whole, parts, rows = backbone(name), exits(name), batch(name, 4)
    policy = ExitPolicy(
        {2: 0.02, 4: 0.03}, first={2: 0.05, 4: 0.04}, pruning=Pruning(0.5, ranking)
    )
    core = EngineCore(whole, parts, policy, EngineConfig(slots=3, limit=64, **config))
    wanted = []
    for turn in range(9):
        inputs, mode = one_row(name, rows, turn % 4), ("early_exit", "early_exit", "full")[turn % 3]
        options = {"max_new_tokens": 4 + turn, "do_sample": False}
        alone = generate(whole, inputs, exits=parts, policy=policy.in_mode(mode), **options)
        wanted.append((core.add(Request(inputs, mode, options=options)), alone))
    core.run()
    for handle, alone in wanted:
        got = handle.result().output
        assert torch.equal(got.sequences, alone.sequences)
        assert torch.equal(got.depths, alone.depths)


@pytest.mark.parametrize("ranking", ["attention", "divprune"])
def test_a_prompt_that_leaves_tokens_behind_takes_no_keys_and_gives_none(
    ranking, backbone, exits, batch
):
    whole, parts, inputs = backbone("llava"), exits("llava"), batch("llava", 1)
    cache = PrefixCache()
    plain = ExitPolicy({2: 0.02})
    pruned = replace(plain, pruning=Pruning(0.25, ranking))
    for policy in (plain, pruned, plain, pruned):
        ours, alone = (
            generate(whole, inputs, exits=parts, policy=policy, prefix_cache=kept, max_new_tokens=9)
            for kept in (cache, None)
        )
        assert torch.equal(ours.sequences, alone.sequences)


@pytest.mark.parametrize(
    ("name", "why"),
    [("paligemma", "read as a whole"), ("blip2-t5", "read as a whole"), ("gemma3", "as a whole")],
)
def test_where_it_would_not_be_exact_it_is_refused(name, why, backbone, exits, batch):
    policy = replace(never(name), pruning=Pruning(0.5))
    with pytest.raises(InputError, match=why):
        generate(backbone(name), batch(name, 1), exits=exits(name), policy=policy)


@pytest.mark.parametrize(
    "what",
    [
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"layer_types": None, "sliding_window": 64},
        {"alibi": True},
    ],
    ids=str,
)
def test_layers_that_attend_by_distance_leave_nothing_behind(what, backbone, exits):
    whole = copy.copy(backbone("llava"))
    whole.text_config = copy.copy(whole.text_config)
    for name, value in what.items():
        setattr(whole.text_config, name, value)
    with pytest.raises(InputError, match="by distance"):
        Pruner(whole, ExitSet.of(exits("llava")), PruningStage(2, 0.5, "attention"))


def test_a_decoder_that_is_given_more_than_states_leaves_nothing_behind(backbone, exits):
    whole = backbone("llava")
    ids, embeds = torch.tensor([[IMAGE, 3]]), torch.randn(1, 2, whole.width)
    pruner = Pruner(whole, ExitSet.of(exits("llava")), PruningStage(0, 0.5, "divprune"))
    for more in ({"attention_mask": torch.zeros(1, 1, 2, 2)}, {"deep_features": embeds}):
        with pytest.raises(InputError, match="given more than their states"):
            pruner.shorter(ids, {"inputs_embeds": embeds, **more})


def test_an_exit_that_attends_to_nothing_cannot_say_what_stays(backbone, batch):
    whole = backbone("llava")
    lens = Exits(whole, (2,), kind="lens")
    with pytest.raises(InputError, match="attends to nothing"):
        generate(
            whole, batch("llava", 1), exits=lens, policy=ExitPolicy({2: 0.1}, pruning=Pruning(0.5))
        )
    policy = ExitPolicy({2: 0.1}, pruning=Pruning(0.5, "divprune"))
    generate(whole, batch("llava", 1), exits=lens, policy=policy, max_new_tokens=3)


@pytest.mark.parametrize("ranking", ["attention", "divprune"])
def test_what_cannot_leave_tokens_behind_refuses_to(ranking, backbone, exits, batch):
    whole, parts = backbone("llava"), exits("llava")
    policy = ExitPolicy({2: 0.1}, pruning=Pruning(0.5, ranking))
    stack = copy.copy(whole)
    stack.engine = "stack"
    with pytest.raises(InputError, match="cannot leave any behind"):
        generate(stack, batch("llava", 1), exits=parts, policy=policy)
    with pytest.raises(InputError, match=r"llama\.cpp runs all visual tokens"):
        check_all_go_on(policy, "llama.cpp")
    check_all_go_on(replace(policy, lossless=True), "llama.cpp")


def test_what_follows_answers_in_one_pass_refuses_what_a_pass_does_not_show():
    policy: Any = ExitPolicy({2: 0.1}, pruning=Pruning(0.5))
    assert not follows_policy(policy) and not can_replay(policy)
    nothing: Any = None
    with pytest.raises(InputError, match="runs all visual tokens"):
        candidate_scores(nothing, nothing, [], policy=policy)
    with pytest.raises(InputError, match="runs all visual tokens"):
        Verification(nothing, nothing, [nothing], policy=policy)


@pytest.mark.parametrize("share", [0, 0.0, -1, 1.5, "half", True])
def test_a_share_is_above_0_and_up_to_1(share):
    with pytest.raises(InputError, match="share of"):
        ExitPolicy(pruning=Pruning(share))


@pytest.mark.parametrize("wrong", [0.5, ("divprune", 0.5), None])
def test_what_is_no_pruning_says_what_is(wrong):
    with pytest.raises(InputError, match=r"cannot be pruned by.*\n.*Pruning\(0\.5"):
        ExitPolicy(pruning=wrong)


def test_a_policy_says_what_stays_behind_where_something_does(opt, tmp_path):
    policy = ExitPolicy({2: 0.1}, pruning=Pruning(0.5, "random"))
    assert policy_from_json(policy_to_json(policy)) == policy
    told = policy_to_json(replace(policy, pruning=Pruning(1)))
    assert not {"visual_keep", "visual_ranking"} & told.keys()
    trained(opt, policy=policy).save(tmp_path / "adapter")
    assert Adapter.load(tmp_path / "adapter", opt).policy == policy
