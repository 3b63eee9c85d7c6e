"""Laws of cheap looks: what a shortlist leaves out is never said, what a gate shuts out is never
looked at, and neither changes anything else."""

from __future__ import annotations

import json
from dataclasses import replace

import fakes
import families
import made_up_costs
import numpy as np
import pytest
import torch
from reference import of_steps, probe
from scipy.stats import binom

from offramp.adapter import Adapter
from offramp.answers import full_model_answers
from offramp.calibration.calibrate import calibrate
from offramp.calibration.cost_model import gate_gain, token_seconds
from offramp.calibration.gates import learn_shortlist_and_gates
from offramp.calibration.replay import replay
from offramp.engine.generate import generate
from offramp.engine.policy import ExitPolicy
from offramp.errors import AdapterError, DataError, InputError
from offramp.models.exits import Exits, ExitSet
from offramp.models.input_processor import InputProcessor
from offramp.models.shortlist import Gate, fit_gate, gate_level, shortlist_of
from offramp.save_and_load import CHECKS

NEW = 12
NAMES = ("blip2-opt", "blip2-t5", "llava", "gemma3")
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


def middling(whole, inputs, exits, depth):
    """A gate that is open to about half of the tokens, on a direction of its own."""
    seen = probe(whole, inputs, generate(whole, inputs, **GREEDY).sequences, exits)
    states = of_steps(seen.outputs[depth], NEW).flatten(0, 1)
    weight = torch.randn(whole.width, generator=torch.Generator().manual_seed(3))
    return Gate(weight, -(states.float() @ weight).median())


@pytest.fixture
def scene(backbone, exits, batch):
    """`scene(name, rows)`: backbone, exits at one depth with a gate there, depth, inputs."""

    def build(name, rows=1):
        whole, parts, inputs = backbone(name, wide=4.0), exits(name, wide=4.0), batch(name, rows)
        depth = parts.depths[0]
        gate = middling(whole, inputs, parts, depth)
        ids = torch.arange(4, whole.vocabulary, 3)
        return whole, ExitSet(parts, ids, {depth: gate}), depth, inputs

    return build


# -- shortlists -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_shortlist_of_everything_changes_nothing(name, scene):
    whole, exits, depth, inputs = scene(name)
    exits = ExitSet(exits, torch.arange(whole.vocabulary))
    plain = generate(whole, inputs, exits=exits, policy=ExitPolicy({depth: 0.05}), **GREEDY)
    policy = ExitPolicy({depth: 0.05}, shortlist=True)
    ours = generate(whole, inputs, exits=exits, policy=policy, **GREEDY)
    assert torch.equal(ours.sequences, plain.sequences)
    assert torch.equal(ours.depths, plain.depths)
    torch.testing.assert_close(ours.scores, plain.scores, equal_nan=True)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_an_exit_says_the_likeliest_token_of_its_shortlist(name, rows, scene):
    whole, exits, depth, inputs = scene(name, rows)
    policy = ExitPolicy({depth: 0.0}, shortlist=True, exit_in_prefill=True)
    made = generate(whole, inputs, exits=exits, policy=policy, eos_token_id=None, **GREEDY)
    logits = of_steps(probe(whole, inputs, made.sequences, exits).logits[depth], NEW)
    expected = exits.shortlist[logits[..., exits.shortlist].argmax(-1)]
    left = made.depths == depth
    assert left.any()
    assert torch.equal(made.new_tokens[left], expected[left])


def test_constraints_hold_on_a_shortlist(scene):
    whole, exits, depth, inputs = scene("llava")
    allowed = exits.shortlist[::2].tolist()
    banned = [i for i in range(whole.vocabulary) if i not in allowed]
    policy = ExitPolicy({depth: 0.01}, shortlist=True)
    made = generate(whole, inputs, exits=exits, policy=policy, suppress_tokens=banned, **GREEDY)
    assert set(made.new_tokens.flatten().tolist()) <= set(allowed)
    assert (made.depths == depth).any()


def test_a_shortlist_that_says_nothing_that_may_be_said_lets_nobody_leave(scene):
    whole, exits, depth, inputs = scene("llava")
    banned = exits.shortlist.tolist()
    policy = ExitPolicy({depth: 1e-6}, shortlist=True)
    made = generate(whole, inputs, exits=exits, policy=policy, suppress_tokens=banned, **GREEDY)
    assert (made.depths == whole.depth).all()


def test_a_shortlist_holds_the_most_frequent_tokens_and_counts_what_it_misses():
    answers = [[5, 5, 5, 9, 9, 7], [5, 3]]
    ids, found = shortlist_of(answers, [[5, 9, 7], [9, 3]], 2)
    assert ids.tolist() == [5, 9]
    assert (found["tokens"], found["missed"], found["miss_rate"]) == (5, 2, 0.4)
    # Clopper and Pearson: at the bound, so few misses or fewer have a chance of 1 - confidence.
    assert binom.cdf(2, 5, found["miss_bound"]) == pytest.approx(0.05)


def test_nothing_missed_is_still_bounded_above_zero():
    _, found = shortlist_of([[1, 2]], [[1] * 59], 4)
    assert found["missed"] == 0
    assert found["miss_bound"] == pytest.approx(1 - 0.05 ** (1 / 59))


@pytest.mark.parametrize("answers, held, size", [([], [[1]], 2), ([[1]], [], 2), ([[1]], [[1]], 1)])
def test_a_shortlist_of_nothing_is_refused(answers, held, size):
    with pytest.raises(InputError, match="shortlist"):
        shortlist_of(answers, held, size)


# -- gates ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_an_open_gate_changes_nothing(name, rows, scene):
    whole, exits, depth, inputs = scene(name, rows)
    plain = generate(whole, inputs, exits=exits, policy=ExitPolicy({depth: 0.05}), **GREEDY)
    policy = ExitPolicy({depth: 0.05}, gates={depth: 0.0})
    ours = generate(whole, inputs, exits=exits, policy=policy, **GREEDY)
    assert torch.equal(ours.sequences, plain.sequences)
    assert torch.equal(ours.depths, plain.depths)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_those_leave_whom_the_gate_lets_in_and_their_exit_has_seen_all(name, rows, scene):
    """With threshold 0, exactly the tokens behind an open gate leave, with logits as if the exit
    had run over every token before."""
    whole, exits, depth, inputs = scene(name, rows)
    policy = ExitPolicy({depth: 0.0}, gates={depth: 0.5}, exit_in_prefill=True)
    options = {"suppress_tokens": families.WORDLESS, **GREEDY}
    made = generate(whole, inputs, exits=exits, policy=policy, **options)
    seen = probe(whole, inputs, made.sequences, exits)
    guesses = exits.gates[depth](of_steps(seen.outputs[depth], NEW))
    sure = (guesses - 0.5).abs() > 1e-4
    may = torch.ones_like(sure)
    if not (whole.family.causal_prompt or whole.is_encoder_decoder):
        may[:, 0] = False  # read off a prompt that is not causal
    left = made.depths == depth
    assert torch.equal(left[sure & may], (guesses >= 0.5)[sure & may])
    assert left.any() and not left.all()
    logits = of_steps(seen.logits[depth], NEW).clone()
    logits[..., families.WORDLESS] = float("-inf")
    said = logits.argmax(-1)
    assert torch.equal(made.new_tokens[left], said[left])


@pytest.mark.parametrize("name", NAMES)
def test_a_shut_exit_runs_no_further_than_its_keys(name, scene):
    whole, exits, depth, inputs = scene(name)
    shut = Gate(torch.zeros(whole.width), torch.tensor(-5.0))
    exits = ExitSet(exits, gates={depth: shut})
    ended = []
    handle = exits.at(depth).register_forward_hook(lambda *_: ended.append(1))
    try:
        policy = ExitPolicy({depth: 0.0}, gates={depth: 0.5})
        made = generate(whole, inputs, exits=exits, policy=policy, **GREEDY)
    finally:
        handle.remove()
    # An encoder's keys are made behind an exit's own, once, with the prompt.
    assert len(ended) == whole.is_encoder_decoder
    assert torch.equal(made.sequences, generate(whole, inputs, **GREEDY).sequences)


@pytest.mark.parametrize("name", NAMES)
def test_rows_decoded_together_leave_as_they_would_alone(name, scene):
    whole, exits, depth, inputs = scene(name, 3)
    policy = ExitPolicy({depth: 0.05}, gates={depth: 0.5}, shortlist=True)
    both = {"exits": exits, "policy": policy, "eos_token_id": None}
    together = generate(whole, inputs, **both, **GREEDY)
    for row in range(3):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        alone = generate(whole, one, **both, **GREEDY)
        assert torch.equal(alone.new_tokens[0], together.new_tokens[row])
        assert torch.equal(alone.depths[0], together.depths[row])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_lossless_output_is_the_full_models_whatever_is_shut_or_missed(name, rows, scene):
    whole, exits, depth, inputs = scene(name, rows)
    policy = ExitPolicy({depth: 0.02}, gates={depth: 0.5}, shortlist=True, lossless=True)
    ours = generate(whole, inputs, exits=exits, policy=policy, **GREEDY)
    assert torch.equal(ours.sequences, generate(whole, inputs, **GREEDY).sequences)
    if rows == 1:  # three rows seldom draft together
        assert sum(made for made, _ in ours.rounds) > 0


def test_a_gate_is_fitted_to_soft_labels():
    torch.manual_seed(1)
    states = torch.randn(4000, 6) * torch.tensor([1.0, 100.0, 0.01, 1.0, 5.0, 1.0]) + 3
    true = torch.tensor([0.5, 0.01, 40.0, -1.0, 0.0, 0.3])
    scores = (states @ true - 1.0 - (states @ true).mean()).sigmoid()
    gate = fit_gate(states, scores, decay=0.0)
    torch.testing.assert_close(gate(states), scores, atol=1e-3, rtol=0)
    again = fit_gate(states, scores, decay=0.0)
    assert torch.equal(gate.weight, again.weight)


def test_a_gate_of_constant_columns_is_finite():
    gate = fit_gate(torch.ones(50, 4), torch.full((50,), 0.9))
    torch.testing.assert_close(gate(torch.ones(1, 4)), torch.tensor([0.9]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("lost", [0.0, 0.01, 0.2])
def test_a_level_shuts_out_no_more_of_the_sure_than_it_may(lost):
    guesses, scores = torch.rand(1000), torch.rand(1000)
    level = gate_level(guesses, scores, sure=0.7, lost=lost)
    sure = scores >= 0.7
    assert (guesses[sure] < level).float().mean() <= lost
    higher = guesses[sure].sort().values[int(lost * sure.sum()) + 1]
    assert (guesses[sure] < higher).float().mean() > lost
    assert gate_level(guesses, scores, sure=2.0, lost=lost) == 0.0


# -- what they cost ---------------------------------------------------------------------------

COSTS = replace(made_up_costs.COSTS, gate=0.05)


def test_a_token_that_is_shut_out_pays_gate_and_keys_and_no_look():
    depths = np.array([8, 8, 3])
    open_ = token_seconds(COSTS, depths, [3])
    shut = token_seconds(COSTS, depths, [3], shut={3: np.array([True, False, False])})
    assert shut == pytest.approx(open_ + 3 * 0.05 + 0.2 - 3.5)


def test_a_gate_pays_by_what_it_shuts_out_less_what_it_loses():
    assert gate_gain(COSTS, 3, shut=0.0, lost=0.0) == pytest.approx(-0.05)
    assert gate_gain(COSTS, 3, shut=0.5, lost=0.0) == pytest.approx(0.5 * 3.3 - 0.05)
    assert gate_gain(COSTS, 3, shut=0.5, lost=0.01) == pytest.approx(0.5 * 3.3 - 0.05 - 0.01 * 7)


# -- learnt, saved, calibrated ----------------------------------------------------------------


def adapted(backbone, exits, name="blip2-opt"):
    whole = backbone(name, wide=4.0)
    encoder = InputProcessor(whole, fakes.Blip2FakeProcessor(name))
    return Adapter(whole, exits(name, wide=4.0)), encoder


CHEAP = replace(COSTS, layers=families.LAYERS)


def test_what_is_learnt_is_used_and_survives_the_disk(backbone, exits, tmp_path):
    adapter, encoder = adapted(backbone, exits)
    ours = learn_shortlist_and_gates(
        adapter, encoder, fakes.examples(20), shortlist=8, gates=True, costs=CHEAP, max_new_tokens=6
    )
    assert adapter.exits.shortlist is None  # the one given is left as it was
    assert ours.policy.shortlist and len(ours.exits.shortlist) <= 8
    found = ours.exits.measured
    assert set(ours.policy.gates) == {int(d) for d, one in found["gates"].items() if one["used"]}
    ours = ours.with_policy(replace(ours.policy, thresholds={ours.exits.depths[0]: 0.1}))
    ours.save(tmp_path / "adapter")
    again = Adapter.load(tmp_path / "adapter", adapter.backbone)
    assert again.policy == ours.policy and again.exits.measured == found
    inputs = encoder.prompts(fakes.examples(1))
    results = [a.generate(inputs, max_new_tokens=6, do_sample=False) for a in (ours, again)]
    assert torch.equal(results[0].sequences, results[1].sequences)
    adapter.save(tmp_path / "adapter")  # one without takes the file away
    assert not (tmp_path / "adapter" / CHECKS).exists()


def test_gates_are_added_to_a_shortlist_and_a_new_shortlist_takes_them_off(backbone, exits):
    adapter, encoder = adapted(backbone, exits)
    options = {"costs": CHEAP, "max_new_tokens": 6}
    first = learn_shortlist_and_gates(adapter, encoder, fakes.examples(20), shortlist=8, **options)
    both = learn_shortlist_and_gates(first, encoder, fakes.examples(20), gates=True, **options)
    assert torch.equal(both.exits.shortlist, first.exits.shortlist) and both.policy.shortlist
    assert both.exits.gates and set(both.exits.measured) == {"shortlist", "gates"}
    other = learn_shortlist_and_gates(both, encoder, fakes.examples(20), shortlist=6, **options)
    assert not other.exits.gates and not other.policy.gates
    assert set(other.exits.measured) == {"shortlist"}


def test_learning_neither_shortlist_nor_gates_survives_the_disk(backbone, exits, tmp_path):
    adapter, encoder = adapted(backbone, exits)
    ours = learn_shortlist_and_gates(adapter, encoder, fakes.examples(20), max_new_tokens=6)
    ours.save(tmp_path / "adapter")
    again = Adapter.load(tmp_path / "adapter", adapter.backbone)
    assert again.policy == ours.policy
    assert again.exits.shortlist is None and not again.exits.gates


def test_checks_of_another_size_or_half_a_file_are_refused(backbone, exits, tmp_path):
    adapter, _ = adapted(backbone, exits)
    wrong = torch.tensor([1, 10_000])
    replace(
        adapter, exits=replace(adapter.exits, shortlist=wrong, measured={"shortlist": {}})
    ).save(tmp_path)
    with pytest.raises(AdapterError, match="shortlist does not fit this backbone"):
        Adapter.load(tmp_path, adapter.backbone)
    (tmp_path / CHECKS).write_bytes(b"half")
    with pytest.raises(AdapterError, match=f"{CHECKS} is not the file"):
        Adapter.load(tmp_path, adapter.backbone)


def test_adapters_from_before_there_were_checks_load(backbone, exits, tmp_path):
    adapter, _ = adapted(backbone, exits)
    adapter.save(tmp_path)
    config = json.loads((tmp_path / "adapter.json").read_text())
    for name in ("checks", "digest", "files"):
        del config[name]
    for name in ("gates", "shortlist"):
        del config["policy"][name]
    (tmp_path / "adapter.json").write_text(json.dumps(config))
    assert Adapter.load(tmp_path, adapter.backbone).policy == adapter.policy


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5"])
def test_a_replay_sees_shortlist_and_gates_as_decoding_does(name, backbone, exits):
    adapter, encoder = adapted(backbone, exits, name)
    ours = learn_shortlist_and_gates(
        adapter, encoder, fakes.examples(20), shortlist=12, gates=True, costs=CHEAP
    )
    examples = fakes.examples(10, seed=4)
    rows = full_model_answers(encoder, examples, batch_size=1, max_new_tokens=8)
    seen = replay(encoder, ours.exits, rows, shortlist=True)
    depth = ours.exits.depths[0]
    # Beside the median, which may be a score: a step rounds otherwise than a pass over all of them.
    thresholds = {depth: float(np.nanmedian(seen.scores[depth])) + 1e-4}
    gates = {depth: float(np.nanmedian(seen.guesses[depth])) + 1e-4}
    depths = seen.depths(thresholds, gates=gates)
    differs = seen.differs(depths)
    policy = ExitPolicy(thresholds, shortlist=True, gates=gates, exit_in_prefill=True)
    for i, example in enumerate(examples):
        made = ours.generate(
            encoder.prompts([example]), policy=policy, max_new_tokens=8, do_sample=False
        )
        assert differs[i] == (tuple(made.new_tokens[0].tolist()) != rows[i].ids)
        if not differs[i]:
            assert depths[i, : len(rows[i].ids)].tolist() == made.depths[0].tolist()
    assert seen.shut(gates)[depth].any()


def test_what_a_shortlist_misses_counts_as_risk(backbone, exits):
    """Exits that always leave and can say two tokens only: nothing can be guaranteed."""
    adapter, encoder = adapted(backbone, exits)
    few = replace(adapter, exits=replace(adapter.exits, shortlist=torch.tensor([4, 5])))
    found = calibrate(
        few, encoder, fakes.examples(60), ExitPolicy(shortlist=True), target=0.05,
        thresholds=(1e-6,), costs=CHEAP, max_new_tokens=6,
    )  # fmt: skip
    assert not found.policy.thresholds
    assert found.path[0].risk > 0.5


@pytest.mark.parametrize(
    "policy, text",
    [
        (ExitPolicy({3: 0.5}, shortlist=True), "asks for a shortlist"),
        (ExitPolicy({3: 0.5}, gates={3: 0.5}), r"gates at depths \[3\]"),
    ],
)
def test_a_policy_that_needs_checks_says_so_where_there_are_none(policy, text, backbone, batch):
    whole = backbone("blip2-opt")
    with pytest.raises(InputError, match=text):
        generate(whole, batch("blip2-opt", 1), exits=Exits(whole, (3,)), policy=policy, **GREEDY)


def test_gates_outside_their_range_are_refused():
    with pytest.raises(InputError, match=r"\{2: 1\.5\} are not in \[0, 1\]"):
        ExitPolicy({2: 0.5}, gates={2: 1.5})


def test_one_picture_cannot_be_held_out(backbone, exits):
    adapter, encoder = adapted(backbone, exits)
    with pytest.raises(DataError, match="too few"):
        learn_shortlist_and_gates(adapter, encoder, fakes.examples(1), shortlist=4)
