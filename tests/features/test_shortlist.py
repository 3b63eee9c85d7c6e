"""Laws of the shortlist: an exit never says what it leaves out, and nothing else changes."""

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

from offramp.adapter.adapter import Adapter
from offramp.adapter.answers import full_model_answers
from offramp.calibration.calibrate import calibrate
from offramp.calibration.replay import replay
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.errors import AdapterError, InputError
from offramp.core.models.exits import Exits, ExitSet
from offramp.core.save_and_load import CHECKS
from offramp.features.input_processor import InputProcessor
from offramp.features.shortlist import shortlist_of

NEW = 12
NAMES = ("blip2-opt", "blip2-t5", "llava", "gemma3")
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


@pytest.fixture
def scene(backbone, exits, batch):
    """`scene(name, rows)`: backbone, exits with a shortlist, depth of the first, inputs."""

    def build(name, rows=1):
        whole, parts, inputs = backbone(name, wide=4.0), exits(name, wide=4.0), batch(name, rows)
        depth = parts.depths[0]
        ids = torch.arange(4, whole.vocabulary, 3)
        return whole, ExitSet(parts, ids), depth, inputs

    return build


# -- shortlists -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_shortlist_of_everything_changes_nothing(name, scene):
    whole, exits, depth, inputs = scene(name)
    exits = ExitSet(exits.modules, torch.arange(whole.vocabulary))
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
    policy = ExitPolicy({depth: 0.0}, shortlist=True)
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


@pytest.mark.parametrize("name", NAMES)
def test_rows_decoded_together_leave_as_they_would_alone(name, scene):
    whole, exits, depth, inputs = scene(name, 3)
    policy = ExitPolicy({depth: 0.05}, shortlist=True)
    both = {"exits": exits, "policy": policy, "eos_token_id": None}
    together = generate(whole, inputs, **both, **GREEDY)
    for row in range(3):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        alone = generate(whole, one, **both, **GREEDY)
        assert torch.equal(alone.new_tokens[0], together.new_tokens[row])
        assert torch.equal(alone.depths[0], together.depths[row])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_lossless_output_is_the_full_models_whatever_is_missed(name, rows, scene):
    whole, exits, depth, inputs = scene(name, rows)
    policy = ExitPolicy({depth: 0.02}, shortlist=True, lossless=True)
    ours = generate(whole, inputs, exits=exits, policy=policy, **GREEDY)
    assert torch.equal(ours.sequences, generate(whole, inputs, **GREEDY).sequences)
    if rows == 1:  # three rows seldom draft together
        assert sum(made for made, _ in ours.rounds) > 0


# -- saved, calibrated ------------------------------------------------------------------------


def adapted(backbone, exits, name="blip2-opt"):
    whole = backbone(name, wide=4.0)
    encoder = InputProcessor(whole, fakes.Blip2FakeProcessor(name))
    return Adapter(whole, exits(name, wide=4.0)), encoder


CHEAP = replace(made_up_costs.COSTS, layers=families.LAYERS)


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
def test_a_replay_sees_the_shortlist_as_decoding_does(name, backbone, exits):
    adapter, encoder = adapted(backbone, exits, name)
    ours = replace(adapter, exits=ExitSet(adapter.exits.modules, torch.arange(4, 60, 3)))
    examples = fakes.examples(10, seed=4)
    rows = full_model_answers(encoder, examples, batch_size=1, max_new_tokens=8)
    seen = replay(encoder, ours.exits, rows, shortlist=True)
    depth = ours.exits.depths[0]
    # Beside the median, which may be a score: a step rounds otherwise than a pass over all of them.
    thresholds = {depth: float(np.nanmedian(seen.scores[depth])) + 1e-4}
    depths = seen.depths(thresholds)
    differs = seen.differs(depths)
    policy = ExitPolicy(thresholds, shortlist=True)
    for i, example in enumerate(examples):
        made = ours.generate(
            encoder.prompts([example]), policy=policy, max_new_tokens=8, do_sample=False
        )
        assert differs[i] == (tuple(made.new_tokens[0].tolist()) != rows[i].ids)
        if not differs[i]:
            assert depths[i, : len(rows[i].ids)].tolist() == made.depths[0].tolist()


def test_what_a_shortlist_misses_counts_as_risk(backbone, exits):
    """Exits that always leave and can say two tokens only: nothing can be guaranteed."""
    adapter, encoder = adapted(backbone, exits)
    few = replace(adapter, exits=replace(adapter.exits, shortlist=torch.tensor([4, 5])))
    found = calibrate(
        few,
        encoder,
        fakes.examples(60),
        ExitPolicy(shortlist=True),
        target=0.1,
        thresholds=(1e-6,),
        costs=CHEAP,
        max_new_tokens=6,
    )
    assert not found.policy.thresholds
    assert found.path[0].risk > 0.5


@pytest.mark.parametrize(
    "policy, text", [(ExitPolicy({3: 0.5}, shortlist=True), "asks for a shortlist")]
)
def test_a_policy_that_needs_checks_says_so_where_there_are_none(policy, text, backbone, batch):
    whole = backbone("blip2-opt")
    with pytest.raises(InputError, match=text):
        generate(whole, batch("blip2-opt", 1), exits=Exits(whole, (3,)), policy=policy, **GREEDY)
