"""Laws of the policies: each equals a slow reference, costs no head it does not read, and keeps
what the decode loop guarantees."""

from __future__ import annotations

import families
import pytest
import torch
from families import WORDLESS
from reference import of_steps, probe

from offramp.engine.confidence import FEATURE_SCORES, SCORES, STREAKS, Patience
from offramp.engine.exit_check import ExitScorer
from offramp.engine.generate import generate
from offramp.engine.policy import ExitPolicy, policy_from_json, policy_to_json, resolved
from offramp.errors import InputError
from offramp.models.backbone import Backbone
from offramp.models.discriminator import build_discriminators
from offramp.models.exits import Exits, ExitSet
from offramp.serving.core import EngineCore

NEW = 12
DEPTHS = (1, 2, 3, 5)
WEIGHTS = {1: 0.2, 2: 0.5, 3: 0.0, 5: 0.9}
KINDS = ("llava", "blip2-t5")
THRESHOLDS = {
    "patience": {"llava": 0.3, "blip2-t5": 0.3},
    "agreement": {"llava": 0.1, "blip2-t5": 0.02},
    "saturation": {"llava": 0.94, "blip2-t5": 0.94},
}
"""At which the tokens of these tiny models leave here and there."""


def by(score, name, **more):
    """A policy under which tokens exit at several depths, and some at none."""
    weights = WEIGHTS if score == "agreement" else {}
    thresholds = dict.fromkeys(DEPTHS, THRESHOLDS[score][name])
    return ExitPolicy(thresholds, score=score, weights=weights, **more)


@pytest.fixture
def decode(backbone, exits, batch):
    """`decode(name, rows, policy)`: backbone, exits, inputs and generation."""

    def run(name, rows, policy, discriminators=None, **options):
        whole, parts, inputs = backbone(name), exits(name, depths=DEPTHS), batch(name, rows)
        parts = ExitSet(parts, discriminators=discriminators)
        made = generate(
            whole,
            inputs,
            exits=parts,
            policy=policy,
            **{"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": WORDLESS, **options},
        )
        return whole, parts, inputs, made

    return run


# -- each equals its slow reference -----------------------------------------------------------


def agreeing(said):
    """The places of the last exit and of those just before it that say the same."""
    places = [len(said) - 1]
    while places[-1] > 0 and said[places[-1] - 1] == said[-1]:
        places.append(places[-1] - 1)
    return places


def slow_patience(seen):
    return (len(agreeing([row.argmax().item() for row in seen.logits])) - 1) / (len(DEPTHS) - 1)


def slow_agreement(seen):
    said = [row.argmax().item() for row in seen.logits]
    weights = list(WEIGHTS.values())
    gathered = [weights[i] * seen.logits[i].softmax(-1).max().item() for i in agreeing(said)]
    return sum(gathered) / sum(weights)


def slow_saturation(seen):
    before, state = (row.double() for row in seen.states[-1])
    return (1 + (before @ state / (before.norm() * state.norm())).item()) / 2


SLOW = {"patience": slow_patience, "agreement": slow_agreement, "saturation": slow_saturation}


class Seen:
    """What the exits at `depths` had before them at one token of one row."""

    def __init__(self, recorded, row, step, depths):
        self.logits = [recorded.logits[d][row, step] for d in depths]
        self.states = [[recorded.outputs[d - k][row, step] for k in (1, 0)] for d in depths]


def record(whole, inputs, made, parts):
    """A plain forward over the whole answer: states and logits of the steps that wrote it.

    Logits are of what may be said, as `decode` has it.
    """
    entered = []
    handle = whole.layers[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    try:
        seen = probe(whole, inputs, made.sequences, parts)
    finally:
        handle.remove()
    seen.outputs[0] = entered[-1]
    for by_depth in (seen.logits, seen.outputs):
        by_depth.update({d: of_steps(x, NEW).clone() for d, x in by_depth.items()})
    for logits in seen.logits.values():
        logits[..., WORDLESS] = float("-inf")
    return seen


def walk(score, name, recorded, row, step):
    """Depth and score at which a token exits, exit by exit."""
    for place, depth in enumerate(DEPTHS):
        found = SLOW[score](Seen(recorded, row, step, DEPTHS[: place + 1]))
        if found >= THRESHOLDS[score][name]:
            return depth, found
    return families.LAYERS, found


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("score", SLOW)
def test_depths_and_scores_are_those_of_a_slow_walk_over_the_exits(score, name, rows, decode):
    whole, parts, inputs, made = decode(name, rows, by(score, name, exit_in_prefill=True))
    recorded = record(whole, inputs, made, parts)
    walks = [[walk(score, name, recorded, row, step) for step in range(NEW)] for row in range(rows)]
    assert made.depths.tolist() == [[depth for depth, _ in steps] for steps in walks]
    expected = torch.tensor([[found for _, found in steps] for steps in walks])
    assert torch.allclose(made.scores, expected, atol=1e-4)
    assert len(made.depths.unique()) >= 3


@pytest.mark.parametrize("score", STREAKS)
def test_a_streak_belongs_to_its_row_and_its_token(score):
    """Rows scored together, and token after token, score as each would alone."""
    logits = 3 * torch.randn(5, len(DEPTHS), 4, 3)  # tokens, exits, rows, words

    def fresh():
        return STREAKS[score](DEPTHS, WEIGHTS)

    one = fresh()
    together = [[one(d, x) for d, x in zip(DEPTHS, token, strict=True)] for token in logits]
    for token, found in zip(logits, together, strict=True):
        for row in range(4):
            alone = fresh()
            for depth, x, scores in zip(DEPTHS, token, found, strict=True):
                assert torch.equal(alone(depth, x[row : row + 1])[0], scores[row])


@pytest.mark.parametrize("exits", range(2, 40))
def test_a_patience_has_its_threshold(exits):
    """After n agreeing pairs in a row the score reaches n / (E - 1), and not n + 1 of them."""
    rule, logits = Patience(range(1, exits + 1), {}), torch.tensor([[0.0, 1.0]])
    for pairs in range(exits):
        score = rule(pairs + 1, logits)
        assert score >= pairs / (exits - 1) and not score >= (pairs + 1) / (exits - 1)


def test_one_exit_alone_never_has_patience(decode):
    *_, made = decode("blip2-t5", 1, ExitPolicy({3: 0.001}, score="patience"))
    assert (made.depths == families.LAYERS).all() and (made.scores == 0).all()


def test_equal_exits_that_are_certain_agree_fully():
    rules = {name: STREAKS[name](DEPTHS, WEIGHTS) for name in STREAKS}
    logits = torch.tensor([[0.0, 200.0]])
    for depth in DEPTHS:
        found = {name: rule(depth, logits).item() for name, rule in rules.items()}
    assert found == {"patience": 1.0, "agreement": pytest.approx(1.0)}


def test_without_weights_all_exits_count_alike():
    logits = torch.randn(len(DEPTHS), 1, 3)
    plain, alike = (STREAKS["agreement"](DEPTHS, w) for w in ({}, dict.fromkeys(DEPTHS, 0.3)))
    for depth, x in zip(DEPTHS, logits, strict=True):
        assert torch.allclose(plain(depth, x), alike(depth, x))


# -- what a score does not read is not computed -----------------------------------------------


def counted(whole, call):
    """What `call` returns, and how often the LM head ran."""
    runs = []
    handle = whole.head.register_forward_hook(lambda *_: runs.append(1))
    try:
        return call(), len(runs)
    finally:
        handle.remove()


def of_features(score, whole, threshold):
    judges = build_discriminators(whole.width, DEPTHS, conditional=True)
    return {
        "exits": ExitSet(Exits(whole, DEPTHS), discriminators=judges),
        "policy": ExitPolicy(dict.fromkeys(DEPTHS, threshold), score=score),
        "max_new_tokens": NEW,
    }


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("score", "threshold"),
    [("saturation", 0.94), ("saturation", 1.0), ("discriminator", 0.51), ("discriminator", 1.0)],
)
def test_a_score_of_features_runs_the_head_only_where_a_row_leaves(
    score, threshold, name, rows, batch
):
    whole, inputs = Backbone(families.build(name)), batch(name, rows)
    given = of_features(score, whole, threshold)
    made, heads = counted(whole, lambda: generate(whole, inputs, **given))
    # The model's own forward over the prompt runs it too, if every row has left by then.
    unread = int(whole.depth not in made.depths[:, 0])
    assert heads == sum(len(step.unique()) for step in made.depths.T) + unread
    assert (len(made.depths.unique()) > 1) == (threshold < 1)


def test_a_score_of_logits_runs_the_head_at_each_exit(batch):
    whole, inputs = Backbone(families.build("blip2-t5")), batch("blip2-t5", 1)
    _, heads = counted(whole, lambda: generate(whole, inputs, **of_features("margin", whole, 1.0)))
    assert heads == NEW * (len(DEPTHS) + 1)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", KINDS)
def test_where_all_leave_in_any_case_no_score_is_computed(name, rows, decode, monkeypatch):
    monkeypatch.setitem(SCORES, "max_probability", lambda _: pytest.fail("a score was computed"))
    whole, parts, inputs, made = decode(name, rows, ExitPolicy({3: 0.0}))
    free = slice(0 if whole.is_encoder_decoder else 1, None)
    assert (made.depths[:, free] == 3).all() and made.scores.isnan().all()
    said = record(whole, inputs, made, parts).logits[3].argmax(-1)
    assert torch.equal(said[:, free], made.new_tokens[:, free])


@pytest.mark.parametrize("rows", [1, 4])
def test_a_token_that_leaves_unseen_has_no_score_of_an_earlier_exit(rows, decode):
    *_, made = decode("blip2-t5", rows, ExitPolicy({2: 0.03, 3: 0.0}))
    assert set(made.depths.flatten().tolist()) == {2, 3}
    assert torch.equal(made.scores.isnan(), made.depths == 3)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", KINDS)
def test_each_token_is_looked_at_once_by_each_exit_up_to_its_own(name, rows, decode, monkeypatch):
    looks = []

    class Noted(Patience):
        def __call__(self, depth, logits):
            looks.append(depth)
            return super().__call__(depth, logits)

    monkeypatch.setitem(STREAKS, "patience", Noted)
    *_, made = decode(name, rows, by("patience", name, exit_in_prefill=True))
    reached = made.depths.flatten().tolist()
    expected = [depth for each in reached for depth in DEPTHS if depth <= each]
    assert sorted(looks) == sorted(expected)
    if rows == 1:
        assert looks == expected


# -- what the decode loop guarantees --------------------------------------------------------------


@pytest.mark.parametrize("score", SLOW)
def test_a_finished_row_keeps_no_score(score, decode):
    _, _, _, free = decode("llava", 4, by(score, "llava"))
    end = int(free.new_tokens[0, 3])
    *_, made = decode("llava", 4, by(score, "llava"), eos_token_id=end)
    done = made.depths == 0
    assert done.any() and made.scores[done].isnan().all()
    assert torch.equal(made.scores[:, 1:].isnan(), done[:, 1:])


# -- what makes no sense is refused ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("patiense", "patience"), ("agrement", "agreement"), ("saturate", "saturation")],
)
def test_an_unknown_score_is_refused_with_the_closest(typed, meant):
    with pytest.raises(InputError, match=f"Did you mean '{meant}'"):
        ExitPolicy(score=typed)


@pytest.mark.parametrize("score", [*SCORES, *STREAKS, *FEATURE_SCORES])
def test_every_known_score_has_a_judge(score, backbone, exits):
    judges = build_discriminators(families.WIDTH, DEPTHS, conditional=True)
    attached = ExitSet(exits("llava"), discriminators=judges)
    scorer = ExitScorer(backbone("llava"), ExitPolicy({2: 0.5}, score=score), (2,), attached)
    state, entry, previous = torch.randn(3, 1, families.WIDTH)
    token = {"position": torch.tensor([0]), "previous_token": torch.tensor([1])}
    with torch.inference_mode():
        found = scorer(2, state, entry, previous, **token).score
    assert found.shape == (1,) and 0.0 <= float(found) <= 1.0


def test_a_policy_checks_its_weights():
    with pytest.raises(InputError, match="finite"):
        ExitPolicy(weights={2: -1.0})


@pytest.mark.parametrize(
    ("weights", "problem"),
    [({2: 1.0, 3: 1.0}, "no exit stands"), ({4: 1.0}, "not for"), ({2: 0.0, 4: 1.0}, "all 0")],
    ids=str,
)
def test_weights_must_fit_the_exits_with_thresholds(weights, problem, backbone, exits):
    policy = ExitPolicy({2: 0.5}, score="agreement", weights=weights)
    with pytest.raises(InputError, match=problem):
        ExitScorer(backbone("llava"), policy, policy.depths, ExitSet(exits("llava")))


def test_an_engine_refuses_thresholds_where_no_exit_stands(backbone, exits):
    with pytest.raises(InputError, match="no exit stands"):
        EngineCore(backbone("llava"), exits("llava"), ExitPolicy({3: 0.5}))


def test_weights_of_exits_that_are_off_are_kept(backbone, exits):
    policy = ExitPolicy({2: 0.5, 4: None}, score="agreement", weights={2: 0.5, 4: 1})
    ExitScorer(backbone("llava"), policy, policy.depths, ExitSet(exits("llava")))
    assert policy.weights == {2: 0.5, 4: 1.0}


# -- the first token --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "blip2-opt", "blip2-t5", "gemma3", "qwen3-vl"])
def test_a_first_token_may_exit_by_default_where_the_prompt_is_causal(
    backbone, exits, batch, name
) -> None:
    whole, parts = backbone(name), exits(name)
    rule = ExitPolicy({parts.depths[0]: 0.0})
    made = generate(whole, batch(name, 1), exits=parts, policy=rule, max_new_tokens=2,
                    do_sample=False, suppress_tokens=WORDLESS)  # fmt: skip
    early = whole.is_encoder_decoder or whole.family.causal_prompt
    assert made.depths.tolist() == [[parts.depths[0] if early else whole.depth, parts.depths[0]]]
    assert resolved(rule, whole).exit_in_prefill == whole.family.causal_prompt


def test_a_stored_policy_keeps_what_it_said_of_the_first_token() -> None:
    told = policy_to_json(ExitPolicy({2: 0.5}, exit_in_prefill=False))
    assert not policy_from_json(told).exit_in_prefill
    del told["exit_in_prefill"]  # as adapters were written before there was a choice
    assert not policy_from_json(told).exit_in_prefill
