"""What was answered is read again by the model, and what is wrong is never handed out."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import families
import home_made
import pytest
import torch
import zoo
from families import WORDLESS
from hub_files import text_adapter
from torch.utils._pytree import tree_leaves
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.engine import read_again
from offramp.core.engine.generate import generate
from offramp.core.engine.read_again import shape_of
from offramp.core.errors import OfframpError
from offramp.core.models.backbone import Backbone
from offramp.core.models.change import Unchanged
from offramp.core.models.discovery.probe import special_ids
from offramp.core.models.exits import Exits
from offramp.core.models.readings import OWN
from offramp.core.models.stand_in import StandIn
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Request

GREEDY = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": WORDLESS}
DEPTH = 2


def opened(kind: type | None = None, again: float | None = 0.01) -> Backbone:
    model = families.build("llava") if kind is None else home_made.build(kind)
    example = None if kind is None else families.KINDS["llava"].inputs(1)
    return Backbone(model, example=example).with_decoding(again=again)


def inputs_of(rows: int = 1) -> dict[str, Any]:
    return families.KINDS["llava"].inputs(rows)


def by_doors(
    backbone: Backbone, inputs: dict[str, Any] | None = None, custom: bool = True, **options: Any
) -> dict[str, list[list[int]]]:
    """Answers that are the full model's, by the door that wrote them."""
    asked = {**GREEDY, **options}
    exits = Exits(backbone, (DEPTH,)).requires_grad_(False)
    adapter = Adapter(backbone, exits, ExitPolicy({DEPTH: 0.5}))
    inputs, model = inputs_of() if inputs is None else inputs, backbone.model
    core = EngineCore(backbone, exits, adapter.policy, EngineConfig(slots=2, limit=192))
    doors = {
        "full": lambda: adapter.generate(inputs, mode="full", **asked).sequences,
        "lossless": lambda: adapter.generate(inputs, mode="lossless", **asked).sequences,
        "backbone": lambda: generate(backbone, inputs, **asked).sequences,
        "custom": lambda: model.generate(
            **inputs, custom_generate=adapter, mode="lossless", **asked
        ),
    }
    made = {}
    if not custom:
        del doors["custom"]
    for name, door in doors.items():
        try:
            made[name] = door().tolist()
        except OfframpError as error:
            assert len(str(error).splitlines()) == 2
    modes = ("full", "lossless")
    handles = [core.add(Request(inputs, mode=mode, options=asked)) for mode in modes]
    core.run()
    for number, handle in enumerate(handles):
        error = handle.exception(timeout=0)
        if error is None:
            made[f"engine {number}"] = handle.result().output.sequences.tolist()
        else:
            assert isinstance(error, OfframpError), error
    return made


UNLIKE_ITSELF = (home_made.NoiseByCall, home_made.StateBeside)
"""Whose own answers differ from call to call."""
IDIOMS = [*home_made.STACKS, *home_made.LAYERS, *home_made.HEADS]
IDIOMS = [kind for kind in IDIOMS if kind not in UNLIKE_ITSELF]


@pytest.mark.slow
@pytest.mark.parametrize("kind", IDIOMS, ids=lambda kind: kind.__name__)
def test_no_door_answers_a_home_made_model_wrongly(kind: type) -> None:
    """A second time too, where an answer was refuted and what was noted of it is followed."""
    try:
        backbone = opened(kind)
    except OfframpError as error:
        assert len(str(error).splitlines()) == 2
        return
    expected = backbone.model.generate(**inputs_of(), **GREEDY).tolist()
    for _ in range(2):
        made = by_doors(backbone)
        assert made and {name for name, ids in made.items() if ids != expected} == set()
        if not backbone.readings.failed:
            break


@pytest.mark.parametrize("name", home_made.PATCHES)
def test_no_door_answers_a_patched_model_wrongly(name: str) -> None:
    model = families.build("llava")
    home_made.PATCHES[name](model)
    try:
        backbone = Backbone(model).with_decoding(again=0.01)
    except OfframpError as error:
        assert len(str(error).splitlines()) == 2
        return
    expected = model.generate(**inputs_of(), **GREEDY).tolist()
    made = by_doors(backbone)
    assert made and {name for name, ids in made.items() if ids != expected} == set()


def test_the_idioms_are_many() -> None:
    kinds = [*IDIOMS, *home_made.KEEPING, *home_made.TOPS]
    assert len(kinds) + len(home_made.PATCHES) >= 60


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*home_made.KEEPING, *home_made.TOPS], ids=lambda k: k.__name__)
def test_answers_to_one_image_after_another_are_the_models_own(kind: type) -> None:
    """In company of themselves, and the last at length."""
    try:
        backbone = opened(kind)
    except OfframpError as error:
        assert len(str(error).splitlines()) == 2
        return
    for number, longest in enumerate((6, 6, 13)):
        inputs = inputs_of()
        torch.manual_seed(number % 2)
        inputs["pixel_values"] = torch.randn_like(inputs["pixel_values"])
        options = {"max_new_tokens": longest, "min_new_tokens": longest}
        expected = backbone.model.generate(**inputs, **{**GREEDY, **options}).tolist()
        made = by_doors(backbone, inputs, **options)
        assert made and {name for name, ids in made.items() if ids != expected} == set()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*home_made.KEEPING, *home_made.TOPS], ids=lambda k: k.__name__)
def test_requests_about_two_images_at_once_get_the_models_own_answers(kind: type) -> None:
    """What a request leaves on modules is not the next one's."""
    try:
        backbone = opened(kind)
        core = EngineCore(backbone, config=EngineConfig(slots=3, limit=192))
    except OfframpError as error:
        assert len(str(error).splitlines()) == 2
        return
    asked = []
    for number in (0, 1, 0, 1):
        inputs = inputs_of()
        torch.manual_seed(number)
        inputs["pixel_values"] = (2 * number - 1) * torch.rand_like(inputs["pixel_values"])
        asked.append((inputs, backbone.model.generate(**inputs, **GREEDY).tolist()))
    for _ in range(2):
        handles = [core.add(Request(inputs, mode="full", options=GREEDY)) for inputs, _ in asked]
        core.run()
        for handle, (_, expected) in zip(handles, asked, strict=True):
            error = handle.exception(timeout=0)
            assert isinstance(error, OfframpError | None), error
            assert error or handle.result().output.sequences.tolist() == expected


def spoil(backbone: Backbone) -> None:
    """What no detector of change sees: the weights of a bare twin are written past the model."""
    for layer in backbone.layers[1:2]:
        own = LlamaDecoderLayer.forward

        def forward(*args: Any, layer: Any = layer, own: Any = own, **kw: Any) -> Any:
            out = own(layer, *args, **kw)
            single = args[0].shape[1] == 1 and "offramp" in str(type(kw.get("cache")))
            return out * -1.5 if single else out

        layer.forward = forward


def test_a_wrong_answer_is_told_once_and_answered_again(caplog: pytest.LogCaptureFixture) -> None:
    backbone = opened()
    spoil(backbone)
    expected = backbone.model.generate(**inputs_of(), **GREEDY)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            made = generate(backbone, inputs_of(), **GREEDY)
            assert torch.equal(made.sequences, expected)
    assert backbone.readings.read >= 1
    assert len([r for r in caplog.records if "own forward pass" in r.message]) <= 1


def test_right_answers_are_read_once_a_shape_and_by_their_share() -> None:
    backbone = opened(again=0.5)
    exits = Exits(backbone, (DEPTH,)).requires_grad_(False)
    adapter = Adapter(backbone, exits, ExitPolicy({DEPTH: 0.5}))
    for _ in range(5):
        adapter.generate(inputs_of(), **GREEDY)
    assert (backbone.readings.read, backbone.readings.failed) == (3, 0)  # the first, two of four
    adapter.generate(inputs_of(3), **GREEDY)
    assert backbone.readings.read == 4


@pytest.mark.parametrize(("kind", "steps"), [(None, [8]), (home_made.Window, [1, 1])])
def test_only_a_tested_model_reads_an_answer_in_one_call(
    kind: type | None, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another reads token by token, which decides whatever one call would give."""
    backbone, asked, own = opened(kind), [], read_again.read

    def read(prepared: Any, answers: torch.Tensor, step: int) -> torch.Tensor:
        asked.append(step)
        return own(prepared, answers, step)

    monkeypatch.setattr(read_again, "read", read)
    generate(backbone, inputs_of(), **{**GREEDY, "max_new_tokens": 8})
    assert asked == steps  # an untested model's first answer is written twice


class Compared(StandIn):
    """Runs the model's tower, and notes whether it is the one of the beginning."""

    def __init__(self, tower: Any) -> None:
        super().__init__("compared", tower)
        self.__dict__["unchanged"], self.seen = Unchanged(lambda: (tower,)), []

    def forward(self, *args: Any, **kw: Any) -> Any:
        self.seen.append(self.unchanged())
        return self.tower(*args, **kw)


def test_what_stands_in_for_a_tower_finds_it_unchanged_while_the_model_reads() -> None:
    whole = opened()
    made = Compared(whole.model.model.vision_tower)
    backbone = whole.with_tower(made)
    generate(backbone, inputs_of(), **GREEDY)
    assert backbone.readings.read == 1 and len(made.seen) >= 2 and all(made.seen)


def test_reading_again_can_be_switched_off() -> None:
    backbone = opened(again=None)
    generate(backbone, inputs_of(), **GREEDY)
    assert backbone.readings.read == 0


def test_an_answer_without_a_token_of_full_depth_is_tried_with_one() -> None:
    """And is not changed by it: the first answer is that of later ones."""
    backbone = opened()
    exits = Exits(backbone, (DEPTH,)).requires_grad_(False)
    policy = ExitPolicy({DEPTH: 0.0}, first={DEPTH: 0.0})
    made = [generate(backbone, inputs_of(), exits=exits, policy=policy, **GREEDY) for _ in range(2)]
    assert set(made[0].depths.flatten().tolist()) == {DEPTH}
    assert torch.equal(made[0].sequences, made[1].sequences)
    assert backbone.readings.read == 1


@pytest.mark.parametrize("name", families.NAMES)
def test_no_family_is_found_wrong_that_is_right(name: str) -> None:
    backbone = Backbone(families.build(name)).with_decoding(again=0.01)
    given = families.KINDS[name].inputs
    exits = Exits(backbone, (DEPTH,)).requires_grad_(False)
    adapter = Adapter(backbone, exits, ExitPolicy({DEPTH: 0.04}))
    for rows in (1, 3):
        for mode in ("full", "early_exit", "lossless"):
            adapter.generate(given(rows), mode=mode, **GREEDY)
    assert backbone.readings.failed == 0, backbone.readings.why
    assert backbone.readings.read >= 6


class Told:
    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_of_custom_generate_gets_the_answer_and_its_end() -> None:
    for kind in (None, home_made.CountsSteps):
        backbone, told = opened(kind), Told()
        adapter = Adapter(backbone, Exits(backbone, (DEPTH,)), ExitPolicy({DEPTH: 0.5}))
        asked = {"custom_generate": adapter, "streamer": told, **GREEDY}
        made = backbone.model.generate(**inputs_of(), **asked)
        assert told.ids == made.flatten().tolist() and told.ended == 1


def test_a_streamer_is_told_of_the_answer_that_stands() -> None:
    for kind in (None, home_made.TokenBefore, home_made.Skips):
        backbone, told = opened(kind), Told()
        made = generate(backbone, inputs_of(), streamer=told, **GREEDY)
        assert told.ids == made.sequences.flatten().tolist() and told.ended == 1
        assert set(made.depths.flatten().tolist()) == {backbone.depth}


@pytest.mark.parametrize("first", ["custom", "engine", "adapter"])
@pytest.mark.parametrize(
    "name", families.known("gemma4", "mllama", "gemma4_unified", "granite4_vision")
)
def test_whichever_door_is_asked_first_gives_the_models_own_answer(name: str, first: str) -> None:
    model = zoo.build(name)
    inputs = zoo.inputs(name, model, 1)
    asked = {**GREEDY, "suppress_tokens": special_ids(model)}
    expected = model.generate(**inputs, **asked).tolist()
    backbone = Backbone(model, example=inputs).with_decoding(again=0.01)
    exits, policy = Exits(backbone, (1,)).requires_grad_(False), ExitPolicy({1: 0.5})
    if first == "engine":
        core = EngineCore(backbone, exits, policy, EngineConfig(slots=2, limit=256))
        handles = [core.add(Request(inputs, mode=m, options=asked)) for m in ("full", "lossless")]
        core.run()
        made = [handle.result(timeout=0).output.sequences.tolist() for handle in handles]
    else:
        adapter = Adapter(backbone, exits, policy)
        more = {"custom_generate": adapter} if first == "custom" else {}
        answer = model.generate if more else adapter.generate
        out = answer(**inputs, mode="lossless", **more, **asked)
        made = [getattr(out, "sequences", out).tolist()]
    assert all(ids == expected for ids in made)


@pytest.mark.parametrize("what", ["embeds", "right padded"])
def test_prompts_that_are_no_plain_rows_of_ids_are_answered_as_by_the_model(what: str) -> None:
    backbone, inputs = opened(), inputs_of(2)
    if what == "embeds":
        ids = inputs.pop("input_ids")
        inputs = {"inputs_embeds": backbone.model.get_input_embeddings()(ids)}
    else:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][0, -2:] = 0
    expected = backbone.model.generate(**inputs, **GREEDY)
    adapter = Adapter(backbone, Exits(backbone, (DEPTH,)), ExitPolicy({DEPTH: 0.5}))
    for mode in ("full", "lossless", "full"):
        assert torch.equal(adapter.generate(inputs, mode=mode, **GREEDY).sequences, expected)


class Elsewhere(torch.Tensor):
    """On a device of its own: nothing but a copy brings it together with others."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def, override]
        held = [it for it in tree_leaves((args, kwargs)) if isinstance(it, torch.Tensor)]
        if any(type(it) is not cls and it.dim() for it in held):
            raise RuntimeError("Expected all tensors to be on the same device.")
        out = super().__torch_function__(func, types, args, kwargs or {})
        if func is torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return torch.device("meta")
        return out.as_subclass(torch.Tensor) if func is torch.Tensor.to else out


def test_inputs_are_taken_to_where_the_model_is() -> None:
    backbone = opened()
    expected = backbone.model.generate(**inputs_of(), **GREEDY).tolist()
    far = {name: value.as_subclass(Elsewhere) for name, value in inputs_of().items()}
    made = by_doors(backbone, far, custom=False)
    assert len(made) == 5 and all(ids == expected for ids in made.values())


def test_exits_of_another_precision_than_the_model_was_moved_to_are_told() -> None:
    backbone = opened()
    adapter = Adapter(backbone, Exits(backbone, (DEPTH,)), ExitPolicy({DEPTH: 0.5}))
    adapter.generate(inputs_of(), mode="lossless", **GREEDY)
    backbone.model.double()
    inputs = inputs_of()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with pytest.raises(OfframpError) as caught:
        adapter.generate(inputs, mode="lossless", **GREEDY)
    assert len(str(caught.value).splitlines()) == 2


def test_shapes_tell_apart_what_takes_another_way() -> None:
    model = opened()
    ids = torch.full((1, 20), families.FIRST_WORD)
    base = {"input_ids": ids, "pixel_values": torch.zeros(1, 3, 8, 8)}
    image = model.model.config.image_token_id
    marked = ids.clone()
    marked[0, 3] = image
    apart = marked.clone()
    apart[0, 9] = image
    shown = [
        base,
        {"input_ids": ids},
        {**base, "input_ids": marked},
        {**base, "input_ids": apart},
        {**base, "pixel_values": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)},
        {**base, "pixel_values": torch.zeros(1, 3, 32, 32)},
        {**base, "mode": 1},
        {**base, "mode": 2},
        {**base, "token_type_ids": torch.zeros(1, 20, dtype=torch.long)},
        {**base, "flag": torch.tensor([1])},
        {**base, "flag": torch.tensor([0])},
        {"input_ids": ids, "pixel_values_videos": torch.zeros(1, 3, 8, 8)},
        {**base, "input_ids": torch.full((1, 200), families.FIRST_WORD)},
    ]
    assert len({shape_of(model, each, "full") for each in shown}) == len(shown)
    longer = {**base, "input_ids": torch.full((1, 21), families.FIRST_WORD)}
    assert shape_of(model, longer, "full") == shape_of(model, base, "full")
    assert OWN not in ("slots", "stack")


def test_a_copy_of_a_model_reads_for_itself() -> None:
    whole = Backbone(families.build("llava"))
    whole.readings.fail("a shape", "it was off")
    for made in (copy.deepcopy(whole).readings, pickle.loads(pickle.dumps(whole.readings))):
        assert (made.read, made.failed, made.verdicts) == (0, 0, {})
        assert made.due(1.0)


def test_a_copy_of_an_adapter_that_answered_answers_alike() -> None:
    adapter = text_adapter()
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    for mode in ("early_exit", "lossless", "full"):
        wanted = adapter.generate(inputs, mode=mode, max_new_tokens=8, do_sample=False)
        made = copy.deepcopy(adapter).generate(inputs, mode=mode, max_new_tokens=8, do_sample=False)
        assert torch.equal(made.sequences, wanted.sequences)
        assert torch.equal(made.depths, wanted.depths)


def test_what_decoding_shows_after_a_first_answer_is_taken_over_and_what_it_refutes_stays() -> None:
    whole = text_adapter().backbone
    generate(whole, {"input_ids": torch.tensor([[5, 6, 7]])}, max_new_tokens=2, do_sample=False)
    assert not whole.family.causal_prompt
    for found, able in ((True, True), (False, False), (True, False)):
        whole.learn(causal_prompt=found, lossless=True)
        assert whole.family.causal_prompt is able
