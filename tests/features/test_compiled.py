"""Laws of compiled decoding: the same tokens at the same depths, by little code, or by none.

Families run the graphs as they were traced, which takes no compiler; what inductor makes of them is
tried on one.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import families
import pytest
import torch
from reference import Dice
from torch._inductor.cpp_builder import get_cpp_compiler

from offramp.core.decoding.policy import FULL, ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.executors.slots import cache, tables
from offramp.core.models.backbone import Backbone
from offramp.features.compiled import compiled
from offramp.features.compiled.code import CannotCompileError, Code

GREEDY = {"max_new_tokens": 10, "do_sample": False}


@pytest.fixture
def codes(monkeypatch):
    """Code made since, by model; of graphs as they were traced."""
    made = WeakKeyDictionary()
    monkeypatch.setattr(compiled, "_CODES", made)
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    return lambda whole: [
        code
        for kind in made[whole.model]._kinds
        for code in kind.codes.values()
        if code is not None
    ]


@pytest.fixture
def both(scored):
    """What the modules make of a request, and what their code makes."""

    def run(whole, inputs, *, dice=None, **given):
        made: list[Any] = []
        for by_code in (False, True):
            decoded = whole.with_decoding(instead=compiled.COMPILED if by_code else None)
            if dice is not None:
                scored(Dice(dice))
            torch.manual_seed(3)
            made.append(generate(decoded, inputs, **{**GREEDY, **given}))
        theirs, ours = made
        assert torch.equal(ours.sequences, theirs.sequences)
        assert torch.equal(ours.depths, theirs.depths)
        torch.testing.assert_close(ours.scores, theirs.scores, equal_nan=True, atol=1e-4, rtol=0.01)
        return ours

    return run


@pytest.fixture
def warned(caplog):
    """What decoding warned of."""
    return lambda: [
        record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "florence2", "qwen2.5-vl"])
def test_code_writes_the_modules_tokens(name, backbone, exits, batch, both, codes, warned):
    whole, inputs, given = backbone(name), batch(name, 1), {"exits": exits(name), "dice": 5}
    first, second = exits(name).depths
    mixed = both(whole, inputs, policy=ExitPolicy({first: 0.4, second: 0.5}), **given)
    assert len(mixed.depths.unique()) == 3
    assert both(whole, inputs, policy=ExitPolicy({first: 0.4}, lossless=True), **given).rounds
    assert 3 < len(codes(whole)) < 20 and not warned()


class Counted(compiled.CompiledHead):
    """Heads by code; how many rows each call read."""

    rows: ClassVar[list[int]] = []

    def __call__(self, rows):
        self.rows.append(len(rows))
        return super().__call__(rows)


class Beside:
    """A streamer that behind every token has something else done on the same backbone."""

    def __init__(self, other):
        self.other, self.came = other, []

    def put(self, value):
        self.came.append(self.other())

    def end(self):
        pass


@pytest.mark.slow
def test_what_is_decoded_by_other_options_on_one_backbone_is_not_touched(
    backbone, exits, batch, codes, scored, monkeypatch
):
    """One by code, one by modules and one by the stack, a token of each after the other."""
    monkeypatch.setattr(compiled, "CompiledHead", Counted)
    whole, inputs, first = backbone("llava"), batch("llava", 1), exits("llava").depths[0]
    given = {**GREEDY, "exits": exits("llava"), "policy": ExitPolicy({first: 0.5})}
    scored(lambda logits: (logits.argmax(-1) % 2).float())
    plain = whole.with_decoding()
    by_code = whole.with_decoding(instead=compiled.COMPILED)
    by_stack = whole.with_decoding(lean=False)
    assert plain.decoding == whole.decoding and plain.layers is whole.layers
    Counted.rows.clear()
    alone = generate(by_code, inputs, **given)
    calls = len(Counted.rows)
    for streamer in (None, Beside(lambda: generate(by_stack, inputs, **given).sequences)):
        Counted.rows.clear()
        made = generate(plain, inputs, streamer=streamer, **given)
        assert torch.equal(made.sequences, alone.sequences) and not Counted.rows
    asked = Beside(lambda: generate(plain, inputs, **given).sequences)
    made = generate(by_code, inputs, streamer=asked, **given)
    assert len(Counted.rows) == calls > len(made.depths[0])
    assert all(torch.equal(other, alone.sequences) for other in asked.came)
    asked = Beside(lambda: generate(by_code, inputs, **given).sequences)
    Counted.rows.clear()
    generate(plain, inputs, streamer=asked, **given)
    assert len(Counted.rows) == calls * len(asked.came)


def test_exits_samples_and_the_full_model_are_the_modules(backbone, exits, batch, both, codes):
    whole, inputs, first = backbone("llava"), batch("llava", 1), exits("llava").depths[0]
    both(whole, inputs, policy=FULL, do_sample=True, temperature=0.7, top_k=5)
    early = ExitPolicy({first: 0.6})
    both(whole, inputs, exits=exits("llava"), policy=early, dice=5)


def test_a_longer_text_is_no_other_code(backbone, batch, both, codes, monkeypatch):
    monkeypatch.setattr(cache, "BUCKET", 8)
    whole, inputs = backbone("gemma3"), batch("gemma3", 1)
    both(whole, inputs)
    assert len(codes(whole)) == 3  # layers with a window and without, and the head
    both(whole, inputs, max_new_tokens=30)  # past the room of the buffers
    assert len(codes(whole)) == 3


class Kept(torch.nn.Module):
    """A function that a layer keeps beside its own parts, as those that kernels may replace."""

    def forward(self, rows):
        return rows


class OtherKept(Kept):
    def forward(self, rows):
        return rows + 0


@pytest.mark.parametrize(("kept", "of_layers"), [((Kept, Kept), 1), ((Kept, OtherKept), 2)])
def test_what_layers_keep_beside_their_parts_is_compared_by_what_it_does(
    batch, both, codes, kept, of_layers
):
    whole = Backbone(families.build("llava"))
    for index, layer in enumerate(whole.layers):
        layer.__dict__["kept"] = {"function": kept[index % 2]()}
    both(whole, batch("llava", 1))
    assert len(codes(whole)) == of_layers + 1  # and the head


def test_where_there_is_no_code_modules_run_and_it_is_said_once(
    backbone, batch, both, codes, warned, caplog, monkeypatch
):
    with monkeypatch.context() as patched:
        patched.setattr(tables, "_of_tables", lambda pair, _: pair[::-1])
        both(Backbone(families.build("llava")), batch("llava", 1))
    assert len(warned()) == 1 and "its own stack" in warned()[0]
    caplog.clear()

    def none(*_):
        raise CannotCompileError("no compiler")

    with monkeypatch.context() as patched:
        patched.setattr(compiled, "Code", none)
        both(backbone("llava"), batch("llava", 1))
    assert len(warned()) == 1 and "no compiler" in warned()[0]


def test_code_that_comes_to_something_else_is_not_called_again(
    batch, both, codes, warned, monkeypatch
):
    right, whole = Code.__call__, Backbone(families.build("llava"))

    def wrong(code, first, second, *others):
        made = right(code, first, second, *others) + 1
        if others:
            second.zero_()  # the keys so far
        return made

    monkeypatch.setattr(Code, "__call__", wrong)
    both(whole, batch("llava", 1))
    assert len(warned()) == 1 and "something else" in warned()[0]
    assert not codes(whole)


def test_hooks_are_called_and_weights_of_another_precision_get_other_code(
    batch, both, codes, warned
):
    whole, inputs, calls = Backbone(families.build("llava")), batch("llava", 1), []
    both(whole, inputs)
    few = len(codes(whole))
    handle = whole.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    both(whole, inputs)
    handle.remove()
    assert len(calls) == 2 * GREEDY["max_new_tokens"] and "hooks" in warned()[0]
    whole.model.to(torch.float64)
    both(whole, {**inputs, "pixel_values": inputs["pixel_values"].double()})
    assert len(codes(whole)) == 2 * few


def test_code_by_inductor(backbone, exits, batch, both, codes, warned, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    whole, inputs = backbone("llava"), batch("llava", 1)
    try:
        get_cpp_compiler()
    except RuntimeError:
        pytest.skip("no C++ compiler here")
    both(whole, inputs, max_new_tokens=4)
    assert len(codes(whole)) == 2 and not warned()
