"""Law 10: same seed, same tokens, in every engine; requests at the same time do not disturb
each other."""

from __future__ import annotations

import threading

import families
import numpy as np
import pytest
import torch
from decoding import NEW

from offramp.core.decoding.noise import gumbel
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.engine.pytorch_noise import PyTorchNoise
from offramp.core.engine.sampler import Sampler, SeededNoise
from offramp.core.executors.prefill import prepare
from offramp_llama_cpp.edge.sampling import Sampler as ArraySampler
from offramp_llama_cpp.edge.sampling import Sampling


def sometimes(name="llava", **more):
    first, second = families.depths(name)
    return ExitPolicy({first: 0.1, second: 0.1}, **more)


def test_the_same_seed_gives_the_same_tokens(backbone, exits, batch):
    def sample():
        torch.manual_seed(11)
        return generate(
            backbone("llava"),
            batch("llava", 4),
            exits=exits("llava"),
            policy=sometimes(),
            max_new_tokens=NEW,
            do_sample=True,
        )

    one, two = sample(), sample()
    assert torch.equal(one.sequences, two.sequences) and torch.equal(one.depths, two.depths)
    assert len(set(one.depths.flatten().tolist())) > 1


@pytest.mark.parametrize("lossless", [False, True])
def test_pytorchs_own_noise_goes_on_where_the_models_generate_leaves_it(
    lossless, backbone, exits, batch
):
    """Though drafts drew noise of places that the answer does not have."""
    whole, inputs, options = backbone("llava"), batch("llava", 1), {"do_sample": True}
    torch.manual_seed(11)
    long = whole.model.generate(**inputs, **options, max_new_tokens=NEW)
    length = inputs["input_ids"].shape[1]
    options |= {"max_new_tokens": NEW, "eos_token_id": int(long[0, length + 3])}
    torch.manual_seed(11)
    theirs, after = whole.model.generate(**inputs, **options), torch.rand(3)
    torch.manual_seed(11)
    policy = ExitPolicy({2: 0.0}, lossless=True) if lossless else ExitPolicy()
    ours = generate(whole, inputs, exits=exits("llava"), policy=policy, **options)
    assert torch.equal(ours.sequences, theirs) and theirs.shape[1] < long.shape[1]
    assert torch.equal(torch.rand(3), after)


def test_greedy_depends_on_neither_seed_nor_temperature(backbone, exits, batch):
    def decode(seed, temperature):
        torch.manual_seed(seed)
        return generate(
            backbone("llava"),
            batch("llava", 1),
            exits=exits("llava"),
            policy=sometimes(),
            max_new_tokens=NEW,
            do_sample=False,
            temperature=temperature,
        )

    one, two = decode(1, 0.3), decode(2, 3.0)
    assert torch.equal(one.sequences, two.sequences) and torch.equal(one.depths, two.depths)


class Nested:
    """A streamer that generates something else on the same model after every token."""

    def __init__(self, other):
        self.other, self.results = other, []

    def put(self, value):
        self.results.append(self.other())

    def end(self):
        pass


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "llava", "qwen2.5-vl", "gemma3"])
def test_a_generation_inside_another_disturbs_neither(name, backbone, exits, batch):
    whole, parts, policy = backbone(name), exits(name), sometimes(name)

    def run(rows, streamer=None):
        return generate(
            whole,
            batch(name, rows),
            exits=parts,
            policy=policy,
            max_new_tokens=6,
            do_sample=False,
            streamer=streamer,
        )

    outer, inner = run(1), run(4)
    nested = Nested(lambda: run(4))
    assert torch.equal(run(1, nested).sequences, outer.sequences)
    assert nested.results
    assert all(torch.equal(each.sequences, inner.sequences) for each in nested.results)


def test_generations_in_two_threads_do_not_disturb_each_other(backbone, exits, batch):
    whole, parts, policy = backbone("llava"), exits("llava"), sometimes()

    def run(rows):
        return generate(
            whole,
            batch("llava", rows),
            exits=parts,
            policy=policy,
            max_new_tokens=NEW,
            do_sample=False,
        ).sequences

    alone = {rows: run(rows) for rows in (1, 4)}
    found = {1: [], 4: []}
    threads = [
        threading.Thread(target=lambda r=rows: found[r].extend(run(r) for _ in range(5)))
        for rows in found
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rows, results in found.items():
        assert len(results) == 5
        assert all(torch.equal(each, alone[rows]) for each in results)


def test_noise_of_what_is_settled_is_let_go():
    """It is as wide as the vocabulary, for each token of an answer."""
    noise, even = PyTorchNoise(2, torch.device("cpu")), torch.zeros(1, 100)
    for place in range(5):
        for row in range(2):
            noise.choose(row, place, even)
        assert len(noise._drawn) == 1
        noise.settled(0, place)
        assert len(noise._drawn) == 1
        noise.settled(1, place)
    assert not noise._drawn and not noise._left


def test_noise_is_a_function_of_seed_and_place_alone():
    kept = [1.26697576, 3.72452331, -0.69626248, 5.27681637]  # of seed 7, place 3: as ever since
    assert gumbel(7, 3, 4) == pytest.approx(kept, rel=1e-6)
    assert np.array_equal(gumbel(7, 3, 50), gumbel(7, 3, 1000)[:50])
    assert np.array_equal(gumbel(-1, 0, 9), gumbel(2**64 - 1, 0, 9))
    drawn = {gumbel(seed, place, 1).item() for seed in range(40) for place in range(40)}
    assert len(drawn) == 1600, "no two places share noise, of one seed or of two"


OPTIONS = [
    {},
    {"temperature": 0.3},
    {"temperature": 1.7, "top_k": 12},
    {"temperature": 0.9, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 30, "top_p": 0.95, "repetition_penalty": 1.4},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pytorch_and_numpy_choose_the_same_token(options, backbone, batch):
    """Of the same logits, at each place, by each seed: the noise has the same bits."""
    inputs = batch("llava", 1)
    given = {"do_sample": True, "top_k": 0, "max_new_tokens": 9, **options}
    prepared = prepare(backbone("llava").model, inputs, **given)
    prompt, before, found = prepared.ids[0].tolist(), [], set()
    for seed in range(30):
        draw = np.random.default_rng(seed)
        logits = draw.normal(0, 3, 400 + seed).astype(np.float32)
        sampling = Sampling(**{"temperature": 1.0, **options}, seed=seed)
        ours = Sampler(prepared, noise=SeededNoise(seed))
        theirs = ArraySampler(sampling, 1000, prompt)
        before = [int(token) for token in draw.integers(400, size=seed % 5)]
        token = ours.choose(torch.from_numpy(logits)[None], before)
        assert token == theirs.choose(theirs.allowed(logits, None, before), None, before)
        found.add(token)
    assert len(found) > 10


def test_seeded_tokens_are_drawn_as_likely_as_they_are():
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5, float("-inf")]])
    shares, draws = scores.softmax(-1)[0], 4000
    for seeds, places in ((draws, 1), (1, draws)):
        counts = torch.zeros(6)
        for seed in range(seeds):
            for place in range(places):
                counts[SeededNoise(seed).choose(0, place, scores)] += 1
        assert counts[5] == 0
        expected = draws * shares[:5]
        assert ((counts[:5] - expected) ** 2 / expected).sum() < 18.5  # 0.1% of chi-square, 4


@pytest.mark.parametrize("bad", [[float("nan"), 0.0], [float("inf"), 0.0], [float("-inf")] * 2])
def test_logits_that_nothing_can_be_drawn_from_are_refused(bad):
    for noise in (SeededNoise(1), PyTorchNoise(1, torch.device("cpu"))):
        with pytest.raises(RuntimeError, match="inf or nan"):
            noise.choose(0, 0, torch.tensor([bad]))
    sampler = ArraySampler(Sampling(1.0), 2)
    with pytest.raises(RuntimeError, match="inf or nan"):
        sampler.choose(np.array(bad, dtype=np.float32), None, [])
