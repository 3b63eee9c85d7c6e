"""What lossless decoding runs, writes and refuses; that its output is the full model's is law 5."""

import pytest
import torch
from decoding import agreeing, lossless, tokens_by_layer

from offramp.core.decoding.policy import ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.errors import InputError

NEW = 16
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


def test_no_layer_is_run_twice_on_a_kept_token(backbone, batch):
    whole, inputs = backbone("blip2-opt"), batch("blip2-opt", 1)
    agreed = agreeing(whole)  # before the hooks, which a copied layer would keep
    policy = lossless("blip2-opt", 0.0, depths=(whole.depth - 1,), max_draft=4)
    _, counts = tokens_by_layer(
        whole, lambda: generate(whole, inputs, exits=agreed, policy=policy, **GREEDY)
    )
    prompt = inputs["input_ids"].shape[1]
    assert counts == [prompt + NEW - 1] * whole.depth  # the last token is never fed back


@pytest.mark.parametrize("rows", [1, 4])
def test_nothing_is_written_past_the_end_token(rows, backbone, exits, batch):
    whole, inputs = backbone("blip2-opt"), batch("blip2-opt", rows)
    free = generate(whole, inputs, **GREEDY)
    options = {**GREEDY, "eos_token_id": int(free.new_tokens[0, 5])}
    full = generate(whole, inputs, **options)
    policy = lossless("blip2-opt", 0.0)
    ours = generate(whole, inputs, exits=exits("blip2-opt"), policy=policy, **options)
    assert torch.equal(ours.sequences, full.sequences)
    assert torch.equal(ours.depths > 0, full.depths > 0)


class Puts:
    """A streamer that notes what it is given."""

    def __init__(self):
        self.puts, self.ended = [], False

    def put(self, value):
        self.puts.append(value.tolist())

    def end(self):
        self.ended = True


def test_a_streamer_gets_confirmed_tokens_only_one_by_one(backbone, exits, batch):
    whole, inputs = backbone("blip2-opt"), batch("blip2-opt", 1)
    full, ours = Puts(), Puts()
    generate(whole, inputs, streamer=full, **GREEDY)
    policy = lossless("blip2-opt", 0.0)
    generate(whole, inputs, exits=exits("blip2-opt"), policy=policy, streamer=ours, **GREEDY)
    assert ours.puts == full.puts
    assert ours.ended


@pytest.mark.parametrize("longest", [0, -1, 1.5, True])
def test_a_draft_length_out_of_range_is_refused(longest):
    with pytest.raises(InputError, match="draft"):
        ExitPolicy({2: 0.5}, lossless=True, max_draft=longest)
