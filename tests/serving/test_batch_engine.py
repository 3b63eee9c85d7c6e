"""Laws of the batch engine: a request's troubles are its own, and nothing is lost or kept."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, as_completed, wait
from dataclasses import replace

import pytest
import torch
from fakes import Blip2FakeProcessor, examples
from families import one_row

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import FULL, ExitPolicy
from offramp.core.engine.generate import generate
from offramp.core.errors import BusyError, DataError, InputError, UnsupportedBackboneError
from offramp.core.executors.prompt import PromptReader
from offramp.core.executors.slots.cache import SlotCache
from offramp.core.executors.slots.executor import SlotExecutor
from offramp.features.input_processor import InputProcessor
from offramp.features.prefix_cache import PrefixCache
from offramp.features.vision_cache import VisionCache
from offramp.serving.batch_engine import BatchEngine
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Request

NAME = "blip2-opt"
SMALL = EngineConfig(slots=3, limit=64)


@pytest.fixture
def adapter(backbone, exits):
    return Adapter(backbone(NAME), exits(NAME), ExitPolicy({2: 0.05}))


@pytest.fixture
def rows(batch):
    whole = batch(NAME, 4)
    return [one_row(NAME, whole, row) for row in range(4)]


def alone(adapter, inputs, mode="early_exit", **options):
    policies = {"early_exit": adapter.policy, "full": ExitPolicy(), "lossless": ExitPolicy()}
    policy = policies[mode]
    return adapter.generate(inputs, policy=policy, do_sample=False, **options).sequences


def core(adapter, config=SMALL):
    return EngineCore(adapter.backbone, adapter.exits, adapter.policy, config)


def request(inputs, mode="early_exit", new=8, **more):
    more.setdefault("options", {"max_new_tokens": new, "do_sample": False})
    return Request(inputs, mode, **more)


def test_requests_from_many_threads_get_what_they_get_alone(adapter, rows):
    wanted = [(i, mode, 4 + i) for i in range(4) for mode in ("full", "early_exit", "lossless")]
    handles = {}
    with BatchEngine(adapter, config=SMALL, queue=20) as engine:

        def client(some):
            for i, mode, new in some:
                options = {"max_new_tokens": new, "do_sample": False}
                handles[engine.submit(rows[i], mode=mode, **options)] = (i, mode, new)

        threads = [threading.Thread(target=client, args=(wanted[n::3],)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert engine.drain(timeout=60)
        for handle in as_completed(list(handles)):
            i, mode, new = handles[handle]
            got = handle.result().output.sequences
            assert torch.equal(got, alone(adapter, rows[i], mode, max_new_tokens=new))
        assert engine.core.tokens == sum(new for _, _, new in wanted)


@pytest.mark.parametrize("first", [0.0, 1.0])
def test_prompts_that_come_together_run_together(first, adapter, rows, monkeypatch):
    """In one call below the exit, and in one above it where it says no first token."""
    runs, run = [], SlotExecutor.run

    def noted(self, segment, spans, asked):
        runs.append((segment, len(spans), sum(end - start for _, start, end in spans)))
        return run(self, segment, spans, asked)

    policy = replace(adapter.policy, first={2: first})
    unsure = replace(adapter, policy=policy)
    expected = [alone(unsure, inputs, max_new_tokens=3) for inputs in rows[:3]]
    engine = core(unsure)
    engine.add(request(rows[0], new=2))
    engine.run()  # the model is checked
    monkeypatch.setattr(SlotExecutor, "run", noted)
    handles = [engine.add(request(inputs, new=3)) for inputs in rows[:3]]
    engine.run()
    columns = runs[0][2]
    assert runs[0] == (0, 3, columns) and columns > 3
    assert ((1, 3, columns) in runs) == bool(first)
    for handle, sequences in zip(handles, expected, strict=True):
        assert torch.equal(handle.result().output.sequences, sequences)


def test_a_cancelled_request_frees_its_slot_or_its_place_within_one_round(adapter, rows):
    engine = core(adapter)
    handles = [engine.add(request(rows[i % 4], new=40)) for i in range(6)]
    engine.round()
    assert (engine.running, engine.waiting) == (3, 3)
    for gone in (1, 4, 5):
        handles[gone].cancel()
    engine.round()
    assert (engine.running, engine.waiting) == (3, 0)
    for gone in (1, 4, 5):
        with pytest.raises(CancelledError):
            handles[gone].result(timeout=0)
    engine.run()
    for i in (0, 2, 3):
        expected = alone(adapter, rows[i], max_new_tokens=40)
        assert torch.equal(handles[i].result().output.sequences, expected)
    assert not handles[0].cancel()


class Broken:
    """A streamer, a criterion and a processor that raises at the third token."""

    def __init__(self):
        self.calls = 0

    def put(self, value):
        self.calls += 1
        if self.calls == 4:  # the prompt came first
            raise RuntimeError("the client went away")

    def end(self):
        pass

    def __call__(self, ids, scores):
        self.put(ids)
        return scores if scores is not None else torch.zeros(len(ids), dtype=torch.bool)


@pytest.mark.parametrize("where", ["streamer", "stopping_criteria", "logits_processor"])
@pytest.mark.parametrize("mode", ["full", "early_exit", "lossless"])
def test_what_raises_fails_its_request_alone(where, mode, adapter, rows):
    engine = core(adapter)
    options = {"max_new_tokens": 9, "do_sample": False}
    if where == "streamer":
        bad = request(rows[0], mode, streamer=Broken())
    else:
        bad = request(rows[0], mode, options={**options, where: [Broken()]})
    broken, healthy = engine.add(bad), engine.add(request(rows[1], mode, new=9))
    engine.run()
    with pytest.raises(RuntimeError, match="went away"):
        broken.result(timeout=0)
    expected = alone(adapter, rows[1], mode, max_new_tokens=9)
    assert torch.equal(healthy.result(timeout=0).output.sequences, expected)


def test_a_streamer_that_cannot_end_fails_its_request(adapter, rows):
    class Endless(Puts):
        def end(self):
            raise RuntimeError("the client went away")

    engine = core(adapter)
    handle = engine.add(request(rows[0], streamer=Endless()))
    engine.run()
    with pytest.raises(RuntimeError, match="went away"):
        handle.result(timeout=0)


class Puts:
    """A streamer that notes what it is given."""

    def __init__(self):
        self.puts, self.ended = [], False

    def put(self, value):
        self.puts.append(value.tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("mode", ["full", "early_exit", "lossless"])
def test_streamers_and_callbacks_get_settled_tokens_one_by_one(mode, adapter, rows):
    ours, theirs, choices = Puts(), Puts(), []
    engine = core(adapter)
    handle = engine.add(request(rows[0], mode, streamer=ours, on_token=choices.append))
    engine.run()
    expected = alone(adapter, rows[0], mode, max_new_tokens=8, streamer=theirs)
    assert ours.puts == theirs.puts
    assert ours.ended
    output = handle.result().output
    assert [choice.token for choice in choices] == expected[0, -8:].tolist()
    assert [choice.depth for choice in choices] == output.depths[0].tolist()
    assert len(handle.result().gaps) == 7


class StopsAt:
    """A criterion that ends an answer at a length, and notes what it was asked about."""

    def __init__(self, length):
        self.length, self.asked = length, []

    def __call__(self, ids, scores, **_):
        self.asked.append(ids[0].tolist())
        return torch.tensor([ids.shape[1] >= self.length])


def test_a_callback_waits_for_nothing_that_waits_for_it(adapter, rows):
    """A full queue, the end of all answers, the end of the engine: in the engine's own thread."""
    said = []

    def ask(_):
        if not said:
            engine.submit(rows[1], max_new_tokens=2)
            with pytest.raises(BusyError, match="full"):
                engine.submit(rows[2], wait=True, max_new_tokens=2)
            said.append(engine.drain())
            engine.close(drain=False)

    engine = BatchEngine(adapter, config=replace(SMALL, slots=1), queue=1)
    with pytest.raises(CancelledError):
        engine.submit(rows[0], on_token=ask, max_new_tokens=8).result(timeout=60)
    engine.close()
    assert said == [False] and not engine.alive


def test_a_criterion_is_asked_about_settled_tokens_alone(adapter, rows):
    length = rows[0]["input_ids"].shape[1] + 6
    ours, theirs = StopsAt(length), StopsAt(length)
    engine = core(adapter)
    options = {"max_new_tokens": 20, "do_sample": False}
    with_ours = {**options, "stopping_criteria": [ours]}
    handle = engine.add(request(rows[0], "lossless", options=with_ours))
    engine.run()
    expected = alone(adapter, rows[0], "full", max_new_tokens=20, stopping_criteria=[theirs])
    assert torch.equal(handle.result().output.sequences, expected)
    assert ours.asked == theirs.asked


def test_a_full_queue_and_a_closed_engine_refuse(adapter, rows):
    started, go = threading.Event(), threading.Event()

    def hold(_):
        started.set()
        go.wait(60)

    engine = BatchEngine(adapter, config=EngineConfig(slots=1, limit=64), queue=2)
    first = engine.submit(rows[0], on_token=hold, max_new_tokens=3, do_sample=False)
    assert started.wait(60)
    more = [engine.submit(rows[1], max_new_tokens=3, do_sample=False) for _ in range(2)]
    with pytest.raises(BusyError, match="full"):
        engine.submit(rows[2], max_new_tokens=3)
    go.set()
    engine.close()
    assert all(handle.done() for handle in (first, *more))
    with pytest.raises(BusyError, match="closed"):
        engine.submit(rows[2], max_new_tokens=3)


def test_closing_without_draining_drops_what_is_left(adapter, rows):
    engine = BatchEngine(adapter, config=SMALL)
    handles = [engine.submit(rows[i % 4], max_new_tokens=40) for i in range(8)]
    engine.close(drain=False)
    assert all(handle.done() for handle in handles)
    assert handles[-1].cancelled()


def test_examples_are_prepared_beside_the_model_and_a_broken_one_fails_alone(adapter, tmp_path):
    processor = InputProcessor(adapter.backbone, Blip2FakeProcessor(NAME))
    good, other = examples(2)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    broken = type(good)(tmp_path / "broken.jpg", good.prompt, (), "broken")
    with BatchEngine(adapter, processor, SMALL) as engine:
        handles = [engine.submit(e, max_new_tokens=6) for e in (good, broken, other)]
        wait(handles, timeout=60)
    with pytest.raises(DataError, match=r"broken\.jpg"):
        handles[1].result()
    for handle, example in ((handles[0], good), (handles[2], other)):
        expected = alone(adapter, processor.prompts([example]), max_new_tokens=6)
        assert torch.equal(handle.result().output.sequences, expected)


def test_slots_that_memory_does_not_hold_are_refused_with_their_size(adapter):
    with pytest.raises(InputError, match=r"need .* GB"):
        core(adapter, EngineConfig(slots=10**9, limit=10**6))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_new_tokens": 60}, "slot of 64"),
        ({"num_beams": 2}, "num_beams"),
        ({"num_return_sequences": 2, "do_sample": True}, "2 answers"),
    ],
)
def test_what_cannot_be_batched_fails_its_request_in_two_lines(options, said, adapter, rows):
    engine = core(adapter)
    bad, good = engine.add(request(rows[0], options=options)), engine.add(request(rows[1]))
    engine.run()
    with pytest.raises(InputError, match=said) as error:
        bad.result(timeout=0)
    assert len(str(error.value).splitlines()) == 2
    assert good.result(timeout=0)


def test_a_slot_has_no_more_tokens_than_the_backbone_has_positions(backbone, exits, batch):
    whole, inputs = backbone("blip2-opt"), one_row("blip2-opt", batch("blip2-opt", 1), 0)
    config = EngineConfig(slots=2, limit=400)
    engine = EngineCore(whole, exits("blip2-opt"), ExitPolicy({2: 0.05}), config)
    words = torch.full((1, whole.positions), 10)
    long = {
        n: torch.cat([v, words], 1) if n in ("input_ids", "attention_mask") else v
        for n, v in inputs.items()
    }
    handles = [engine.add(request(inputs, new=200)), engine.add(request(long, new=1))]
    engine.run()
    for handle in handles:
        with pytest.raises(InputError, match=f"of {whole.positions}"):
            handle.result(timeout=0)


@pytest.mark.parametrize("name", ["blip2-t5", "florence2"])
def test_an_answer_longer_than_a_slot_is_refused_behind_an_encoder_too(
    name, backbone, exits, batch
):
    """A long prompt is the encoder's, and takes no columns of the slot."""
    policy = ExitPolicy({2: 0.05})
    engine = EngineCore(backbone(name), exits(name), policy, EngineConfig(slots=2, limit=12))
    inputs = one_row(name, batch(name, 1), 0)
    fits, too_long = (engine.add(request(inputs, new=new)) for new in (11, 12))
    engine.run()
    assert fits.result(timeout=0)
    with pytest.raises(InputError, match="slot of 12"):
        too_long.result(timeout=0)


def test_states_that_are_no_keys_and_values_are_refused():
    from transformers.cache_utils import DynamicCache, LinearAttentionLayer

    cache = DynamicCache()
    cache.layers = [LinearAttentionLayer()]
    with pytest.raises(UnsupportedBackboneError, match="one by one"):
        SlotCache(slots=2, entries=1, limit=8).load(0, cache, 0, None, None)


def test_rows_are_written_on_while_a_long_prompt_is_read(adapter, rows):
    """And the prompt that is read in chunks gets the answer that it gets alone."""
    engine = core(adapter, replace(SMALL, budget=2))
    order = []
    first = engine.add(request(rows[0], "full", new=20, on_token=lambda _: order.append("first")))
    engine.round()
    second = engine.add(request(rows[1], new=4, on_token=lambda _: order.append("second")))
    engine.round()
    chunks = -(-length_of(adapter, rows[1]) // 2)
    assert order.count("first") > chunks and order.index("second") >= chunks
    engine.run()
    for handle, row, mode, new in ((first, 0, "full", 20), (second, 1, "early_exit", 4)):
        expected = alone(adapter, rows[row], mode, max_new_tokens=new)
        assert torch.equal(handle.result().output.sequences, expected)


def test_a_prompt_that_is_not_wanted_any_more_is_not_read_on(adapter, rows):
    engine = core(adapter, replace(SMALL, budget=2))
    asked = []
    written = request(rows[0], new=9, on_token=lambda _: asked[1].cancel())
    asked += [engine.add(written), engine.add(request(rows[1]))]
    engine.run()
    with pytest.raises(CancelledError):
        asked[1].result(timeout=0)
    assert asked[0].result(timeout=0) and engine.idle


def test_an_answer_goes_on_after_its_pending_columns_ran_beside_another(adapter, rows):
    """By the usual sizes: 64 columns of the first are pending while the second is written on."""
    engine = core(adapter, EngineConfig(limit=100))
    always = {"thresholds": {2: 0.0}, "mode": "early_exit", "new": 80}
    handles = [engine.add(request(rows[0], **always))]
    for _ in range(9):
        engine.round()
    handles.append(engine.add(request(rows[1], **always)))
    for _ in range(200):
        engine.round()
    assert all(handle.done() for handle in handles)


def length_of(adapter, inputs):
    """Tokens of a prompt, its image's included."""
    reader = PromptReader(adapter.backbone, None, ())
    options = {"max_new_tokens": 2, "do_sample": False}
    prepared = reader.prepare(inputs, options)
    return reader.read(prepared, use_exits=False).cache.get_seq_length()


def test_images_and_prompts_that_were_read_before_are_reused(backbone, exits, batch):
    name = "llava"
    vision, prefix = VisionCache(), PrefixCache()
    policy = ExitPolicy({2: 0.05})
    some = {"vision_cache": vision, "prefix_cache": prefix}
    config = replace(SMALL, budget=5)  # chunks behind what is reused
    engine = EngineCore(backbone(name), exits(name), policy, config, **some)
    inputs = one_row(name, batch(name, 1), 0)
    handles = [engine.add(request(inputs)) for _ in range(3)]
    engine.run()
    assert (vision.misses, vision.hits) == (1, 2)
    assert prefix.reused > 0
    options = {"max_new_tokens": 8, "do_sample": False}
    alone = generate(backbone(name), inputs, exits=exits(name), policy=policy, **options)
    for handle in handles:
        assert torch.equal(handle.result().output.sequences, alone.sequences)


@pytest.mark.parametrize("mode", ["full", "early_exit", "lossless"])
def test_a_row_that_moves_to_another_slot_takes_its_positions_along(mode, backbone, exits, batch):
    """Behind an image positions are fewer than tokens: how many fewer, each row has for itself."""
    name = "qwen2.5-vl"
    whole, some, policy = backbone(name), exits(name), ExitPolicy({2: 0.05})
    shown = one_row(name, batch(name, 1), 0)
    ids = torch.arange(10, 22)[None]
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in shown:
        text["mm_token_type_ids"] = torch.zeros_like(ids).int()
    asked = [(shown, 2), (text, 12), (shown, 9), (text, 3), (text, 14), (shown, 11)]
    engine = EngineCore(whole, some, policy, SMALL)
    handles = [engine.add(request(inputs, mode, new)) for inputs, new in asked]
    engine.run()
    rule = {"full": FULL, "early_exit": policy, "lossless": replace(policy, lossless=True)}[mode]
    for (inputs, new), handle in zip(asked, handles, strict=True):
        alone = generate(
            whole, inputs, exits=some, policy=rule, max_new_tokens=new, do_sample=False
        )
        assert torch.equal(handle.result().output.sequences, alone.sequences)


@pytest.mark.parametrize("budget", [3, 256])
@pytest.mark.parametrize("name", [NAME, "paligemma"])
def test_a_first_token_may_exit_where_it_may_alone(name, budget, backbone, exits, batch):
    """Not where the prompt looks ahead; where it is read in chunks, out of the last."""
    whole, some = backbone(name), exits(name)
    policy = ExitPolicy({2: 0.0})
    engine = EngineCore(whole, some, policy, replace(SMALL, budget=budget))
    inputs = one_row(name, batch(name, 1), 0)
    handle = engine.add(request(inputs))
    engine.run()
    options = {"max_new_tokens": 8, "do_sample": False}
    alone = generate(whole, inputs, exits=some, policy=policy, **options)
    ours = handle.result().output
    assert torch.equal(ours.sequences, alone.sequences)
    assert torch.equal(ours.depths, alone.depths)
    assert (ours.depths[0, 0] == 2) == (name == NAME)


@pytest.mark.parametrize("own", [0.0, 1.0])
def test_a_first_token_has_its_own_threshold_in_company_too(own, backbone, exits, batch):
    whole, some = backbone(NAME), exits(NAME)
    policy = ExitPolicy({2: 0.05}, first={2: own})
    engine = EngineCore(whole, some, policy, SMALL)
    inputs = [one_row(NAME, batch(NAME, 4), row) for row in range(4)]
    handles = [engine.add(request(each)) for each in inputs]
    strict = engine.add(replace(request(inputs[0]), thresholds={2: 1.0}))
    engine.run()
    options = {"max_new_tokens": 8, "do_sample": False}
    for handle, each in zip(handles, inputs, strict=True):
        ours = handle.result().output
        alone = generate(whole, each, exits=some, policy=policy, **options)
        assert torch.equal(ours.sequences, alone.sequences)
        assert torch.equal(ours.depths, alone.depths)
        assert ours.depths[0, 0] == (2 if own == 0.0 else whole.depth)
    assert strict.result().output.depths[0, 0] == whole.depth


def test_a_token_that_leaves_unseen_has_no_score_in_company_either(adapter, rows):
    engine = core(adapter)
    unseen, seen = (engine.add(replace(request(rows[0]), thresholds={2: at})) for at in (0.0, 0.5))
    engine.run()
    assert unseen.result().output.scores[0, 1:].isnan().all()
    assert not seen.result().output.scores.isnan().any()


def test_no_more_columns_wait_for_the_deep_layers_than_may(adapter, rows):
    engine, most = core(adapter, replace(SMALL, longest=3)), 0
    handles = [engine.add(replace(request(each), thresholds={2: 0.0})) for each in rows]
    while not engine.idle:
        engine.round()
        most = max(most, *(row.pending(1) for row in engine.decoder.sequences), 0)
    assert most == 3
    assert all((handle.result().output.depths[0, 1:] == 2).all() for handle in handles)


@pytest.mark.parametrize("ids", [[[5, 6]], torch.tensor([5, 6]), torch.tensor([[0.5]])], ids=str)
def test_what_is_no_tensor_of_ids_is_refused(ids, adapter):
    with (
        BatchEngine(adapter, config=SMALL) as engine,
        pytest.raises(InputError, match="whole numbers in a tensor") as caught,
    ):
        engine.submit({"input_ids": ids})
    assert len(str(caught.value).splitlines()) == 2


def test_a_batch_of_rows_is_not_a_request(adapter, batch):
    engine = core(adapter)
    handle = engine.add(request(batch(NAME, 2)))
    engine.run()
    with pytest.raises(InputError, match="2 rows"):
        handle.result(timeout=0)


def test_an_engine_is_driven_by_one_thread(adapter, rows):
    engine, raised = core(adapter), []
    engine.add(request(rows[0]))
    engine.round()

    def other():
        with pytest.raises(InputError, match="two threads"):
            engine.round()
        raised.append(True)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert raised


def test_without_exits_every_row_runs_at_full_depth(backbone, rows):
    engine = EngineCore(backbone(NAME), config=SMALL)
    handles = [engine.add(request(row, None)) for row in rows]
    engine.run()
    assert engine.calls["feed"] == engine.calls["deep"] == 0
    for handle, row in zip(handles, rows, strict=True):
        expected = generate(backbone(NAME), row, max_new_tokens=8, do_sample=False)
        assert torch.equal(handle.result().output.sequences, expected.sequences)


def test_in_half_precision_rows_differ_only_where_logits_tie(backbone, exits, batch):
    """A layer over eight rows and over one may round differently: that is all that may show."""
    whole = backbone(NAME, torch.bfloat16)
    many = batch(NAME, 4, torch.bfloat16)
    rows = [one_row(NAME, many, row) for row in range(4)]
    engine = EngineCore(whole, exits(NAME, torch.bfloat16), ExitPolicy({2: 0.05}), SMALL)
    handles = [engine.add(request(row, "lossless", new=12)) for row in rows]
    engine.run()
    for handle, row in zip(handles, rows, strict=True):
        ours = handle.result().output.sequences
        full = generate(whole, row, max_new_tokens=12, do_sample=False).sequences
        differing = (ours != full)[0].nonzero()
        if len(differing) == 0:
            continue
        place = int(differing[0])  # before it the two read the same tokens
        written = full[:, :place]
        longer = {**row, "input_ids": written, "attention_mask": torch.ones_like(written)}
        with torch.inference_mode():
            logits = whole.model(**longer).logits[0, -1].float()
        apart = (logits[full[0, place]] - logits[ours[0, place]]).abs()
        assert apart <= 2**-6 * logits.abs().max()  # bfloat16 keeps 8 bits


def test_rows_are_written_on_while_another_image_is_seen(adapter, rows):
    """The tower of the second request waits for five more tokens of the first."""
    tokens, told, waited = [], threading.Condition(), []

    def on_token(*_):
        with told:
            tokens.append(1)
            told.notify_all()

    def slow(*_):
        if waited or not tokens:  # the first request's image
            return
        waited.append(len(tokens))
        with told:
            waited.append(told.wait_for(lambda: len(tokens) >= waited[0] + 5, timeout=20))

    hook = adapter.backbone.vision.register_forward_pre_hook(slow)
    try:
        with BatchEngine(adapter, config=SMALL) as engine:
            long = engine.submit(rows[0], on_token=on_token, max_new_tokens=40, min_new_tokens=40)
            with told:
                assert told.wait_for(lambda: tokens, timeout=20)
            other = engine.submit(rows[1], max_new_tokens=6, do_sample=False)
            wait([long, other], timeout=60)
    finally:
        hook.remove()
    assert waited[1:] == [True]
    assert torch.equal(other.result().output.sequences, alone(adapter, rows[1], max_new_tokens=6))


@pytest.mark.parametrize("mode", ["early_exit", "full", "lossless"])
def test_an_answer_that_is_over_gets_no_token_while_a_prompt_is_read_beside_it(mode, adapter, rows):
    """An answer of one token, and a prompt that is read in chunks."""
    longer = {name: value for name, value in rows[1].items()}
    ids = torch.cat([rows[1]["input_ids"], torch.randint(8, 90, (1, 30))], 1)
    longer |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    heard = []
    core = EngineCore(
        adapter.backbone, adapter.exits, adapter.policy, EngineConfig(slots=3, limit=64, budget=12)
    )
    one = core.add(request(rows[0], mode, 1, on_token=heard.append))
    other = core.add(request(longer, mode))
    core.run()
    assert len(heard) == one.result().output.depths.numel() == 1
    assert core.tokens == 1 + 8
    assert torch.equal(
        other.result().output.sequences, alone(adapter, longer, mode, max_new_tokens=8)
    )


def test_an_error_of_a_shared_call_is_not_that_of_the_prompt_that_is_read(
    adapter, rows, monkeypatch
):
    ids = torch.cat([rows[1]["input_ids"], torch.randint(8, 90, (1, 30))], 1)
    longer = {**rows[1], "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    core = EngineCore(
        adapter.backbone, adapter.exits, adapter.policy, EngineConfig(slots=3, limit=64, budget=12)
    )
    shared = core.add(request(rows[0], new=20))
    core.round()
    late = core.add(request(longer))
    make, failed = core.decoder.make, []

    def fails_once(call):
        if core._reading is not None and not failed:
            failed.append(call)
            raise RuntimeError("out of memory")
        return make(call)

    monkeypatch.setattr(core.decoder, "make", fails_once)
    core.run()
    with pytest.raises(RuntimeError, match="out of memory"):
        shared.result()
    assert torch.equal(late.result().output.sequences, alone(adapter, longer, max_new_tokens=8))
