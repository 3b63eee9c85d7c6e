"""Law 10: same seed, same tokens; requests that run at the same time do not disturb each other."""

from __future__ import annotations

import threading

import families
import pytest
import torch
from decoding import NEW

from offramp.engine.decoding.sampler import Noise
from offramp.engine.generate import generate
from offramp.engine.policy import ExitPolicy


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
    noise = Noise.seeded(0, torch.device("cpu"))
    noise.rows, even = 2, torch.full((1, 100), 0.01)
    for place in range(5):
        for row in range(2):
            noise.choose(row, place, even)
        assert len(noise._drawn) == 1
        noise.settled(0, place)
        assert len(noise._drawn) == 1
        noise.settled(1, place)
    assert not noise._drawn and not noise._left
