"""Laws of the engine's queue and thread: first come, first served; when it ends, nobody waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from typing import Any

import pytest
from families import one_row

from offramp.core.errors import BusyError
from offramp.serving.batch_engine import BatchEngine
from offramp.serving.core import EngineCore
from offramp.serving.engine_config import EngineConfig
from offramp.serving.request import Handle, Request
from offramp.serving.serial import SerialCore

WITHIN = 60.0
"""Seconds; a machine that others use too."""
OPTIONS = {"max_new_tokens": 3, "do_sample": False, "mode": "full"}


class Held:
    """An engine whose first answer waits until it is let go."""

    def __init__(self, engine: BatchEngine, inputs: Any) -> None:
        self._go, began = threading.Event(), threading.Event()

        def told(_: Any) -> None:
            began.set()
            self._go.wait(WITHIN)

        self.first = engine.submit(inputs, on_token=told, **OPTIONS)
        assert began.wait(WITHIN)

    def let_go(self) -> None:
        self._go.set()


@pytest.fixture
def llava(backbone: Callable[..., Any], batch: Callable[..., Any]) -> tuple[Any, Any, Any]:
    """A model that answers prompts without an image too, one with and one without."""
    whole = one_row("llava", batch("llava", 2), 0)
    text = {"input_ids": whole["input_ids"][:, :4].clamp(max=5) + 3}
    text["attention_mask"] = text["input_ids"] * 0 + 1
    return backbone("llava"), whole, text


def order_of(handles: dict[str, Handle]) -> list[str]:
    done: list[str] = []
    for name, handle in handles.items():
        handle.add_done_callback(lambda _, name=name: done.append(name))
    assert not wait(handles.values(), WITHIN).not_done
    return done


def test_an_image_is_prepared_however_many_texts_wait(llava: Any) -> None:
    backbone, image, text = llava
    with BatchEngine(backbone, config=EngineConfig(slots=1, limit=64), queue=50) as engine:
        held = Held(engine, text)
        handles = {f"text {n}": engine.submit(text, **OPTIONS) for n in range(5)}
        handles["image"] = engine.submit(image, **OPTIONS)
        handles |= {f"text {n}": engine.submit(text, **OPTIONS) for n in range(5, 30)}
        until_prepared(engine)
        held.let_go()
        assert order_of(handles) == list(handles)


def until_prepared(engine: BatchEngine) -> None:
    with engine._changed:
        assert engine._changed.wait_for(lambda: not engine._preparing, WITHIN)


def test_no_more_images_are_prepared_ahead_than_there_are_slots(llava: Any) -> None:
    backbone, image, text = llava
    with BatchEngine(backbone, config=EngineConfig(slots=2, limit=64), queue=50) as engine:
        held = Held(engine, text)
        handles = [engine.submit(image, **OPTIONS) for _ in range(8)]
        with engine._changed:
            assert engine._changed.wait_for(lambda: len(engine._preparing) == 6, WITHIN)
            assert len(engine._ahead) == 2
        held.let_go()
        assert not wait(handles, WITHIN).not_done
        assert engine.drain(WITHIN) and not engine._ahead


def test_the_image_that_came_first_is_prepared_first(
    llava: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever worker is quicker to ask for the only place."""
    backbone, image, text = llava
    with BatchEngine(backbone, config=EngineConfig(slots=1, limit=64), queue=50) as engine:
        held, work = Held(engine, text), []
        monkeypatch.setattr(engine._pool, "submit", lambda *task: work.append(task))
        handles = [engine.submit(image, **OPTIONS) for _ in range(2)]
        workers = [threading.Thread(target=run, args=args) for run, *args in reversed(work)]
        for worker in workers:
            worker.start()
            time.sleep(0.1)
        with engine._changed:
            assert engine._changed.wait_for(lambda: len(engine._preparing) == 1, WITHIN)
            assert engine._preparing == {handles[1]}
        held.let_go()
        for worker in workers:
            worker.join(WITHIN)


def test_what_was_prepared_later_does_not_go_before_what_came_first(llava: Any) -> None:
    backbone, _, text = llava
    core = EngineCore(backbone, config=EngineConfig(slots=1, limit=64))
    serial = SerialCore(backbone)
    for one in (core, serial):
        made = [Handle(Request(text, "full", options={"max_new_tokens": 1})) for _ in range(6)]
        for number in (1, 2, 5, 0, 4, 3):
            one.add(made[number])
        assert [job.handle for job in one._queue] == made
        assert one.queued == set(made)


def test_draining_waits_for_the_answer_of_a_request_that_is_on_its_way_to_a_slot(
    llava: Any,
) -> None:
    """Neither queued nor in a slot, it is not answered yet."""
    backbone, _, text = llava
    with BatchEngine(backbone, config=EngineConfig(slots=1, limit=64)) as engine:
        came, go = threading.Event(), threading.Event()
        seat = engine.core._seat  # type: ignore[union-attr]

        def slowly(job: Any) -> int:
            came.set()
            go.wait(WITHIN)
            return int(seat(job))

        engine.core._seat = slowly  # type: ignore[method-assign,union-attr]
        handle = engine.submit(text, **OPTIONS)
        assert came.wait(WITHIN)
        assert not engine.drain(0.01)
        go.set()
        assert engine.drain(WITHIN) and handle.done()


# -- who is not wanted any more --------------------------------------------------------------------


def test_what_waits_to_be_prepared_and_is_cancelled_is_not_prepared(
    llava: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, image, text = llava
    config = EngineConfig(slots=1, limit=64)
    # One worker: of two, either may be ahead.
    with BatchEngine(backbone, config=config, queue=50, workers=1) as engine:
        read: list[Any] = []
        reader = engine._images
        assert reader is not None
        monkeypatch.setattr(reader, "read", read.append)
        held = Held(engine, text)
        handles = [engine.submit(image, **OPTIONS) for _ in range(4)]
        with engine._changed:
            assert engine._changed.wait_for(lambda: len(engine._preparing) == 3, WITHIN)
        for handle in handles[1:]:
            engine.cancel(handle)
        until_prepared(engine)
        held.let_go()
        assert engine.drain(WITHIN)
        assert len(read) == 1  # the one that was ahead already
        assert [handle.cancelled() for handle in handles] == [False, True, True, True]


def test_a_prompt_that_is_cancelled_is_not_read_to_its_end(llava: Any) -> None:
    backbone, _, text = llava
    core = EngineCore(backbone, config=EngineConfig(slots=2, limit=128, budget=8))
    chunks = 0
    run_stack = core._host._prompts._run_stack

    def counted(*args: Any, **more: Any) -> Any:
        nonlocal chunks
        chunks += 1
        return run_stack(*args, **more)

    core._host._prompts._run_stack = counted
    long = {name: part.repeat(1, 16) for name, part in text.items()}  # 64 tokens, eight chunks
    second = Handle(Request(long, "full", options={"max_new_tokens": 2, "do_sample": False}))

    def told(_: Any) -> None:
        if core.running > 1:
            second.cancel()

    options = {"max_new_tokens": 30, "do_sample": False}
    first = core.add(Request(text, "full", on_token=told, options=options))
    core.round()
    before = chunks
    core.add(second)
    core.run()
    assert first.result().output.depths.numel() == 30
    assert second.cancelled() and chunks - before < 4


# -- the end of its thread -------------------------------------------------------------------------


class Broken(BaseException):
    """Not an `Exception`, as an exit of the interpreter."""


def break_round(engine: BatchEngine, error: BaseException) -> None:
    def told() -> None:
        raise error

    engine._on_round = told


def break_leave(engine: BatchEngine, error: BaseException) -> None:
    def leave(*_: Any) -> None:
        raise error

    engine.core.decoder.leave = leave  # type: ignore[method-assign]


def break_failing(engine: BatchEngine, error: BaseException) -> None:
    def fails(*_: Any) -> None:
        raise error

    engine.core.round = fails  # type: ignore[method-assign]
    engine.core.fail_all = fails  # type: ignore[method-assign]


@pytest.mark.parametrize("error", [RuntimeError("lost"), MemoryError(), Broken("over")])
@pytest.mark.parametrize("breaks", [break_round, break_leave, break_failing])
def test_when_the_engine_ends_nobody_waits(
    breaks: Callable[[BatchEngine, BaseException], None], error: BaseException, llava: Any
) -> None:
    backbone, image, text = llava
    engine = BatchEngine(backbone, config=EngineConfig(slots=1, limit=64), queue=20)
    held = Held(engine, text)
    handles = [held.first, *(engine.submit(what, **OPTIONS) for what in (text, image, text, image))]
    breaks(engine, error)
    held.let_go()
    assert not wait(handles, WITHIN).not_done
    answered = {handle for handle in handles if handle.exception() is None}
    assert answered <= {held.first}
    for handle in set(handles) - answered:
        assert isinstance(handle.exception(), BusyError | type(error))
    engine._thread.join(WITHIN)
    assert not engine.alive
    with pytest.raises(BusyError, match=f"has failed .{type(error).__name__}"):
        engine.submit(text, **OPTIONS)
    with pytest.raises(BusyError, match="has failed"):
        engine.submit(text, wait=True, **OPTIONS)
    assert engine.drain(1.0)
    engine.close()


def test_who_waits_for_a_place_is_told_too(llava: Any) -> None:
    backbone, _, text = llava
    engine = BatchEngine(backbone, config=EngineConfig(slots=1, limit=64), queue=1)
    held = Held(engine, text)
    engine.submit(text, **OPTIONS)
    found: list[BaseException] = []

    def waits() -> None:
        try:
            engine.submit(text, wait=True, **OPTIONS)
        except BusyError as error:
            found.append(error)

    thread = threading.Thread(target=waits)
    thread.start()
    break_round(engine, RuntimeError("lost"))
    held.let_go()
    thread.join(WITHIN)
    assert not thread.is_alive() and "has failed" in str(found[0])
    engine.close()


def test_what_fails_a_round_ends_its_requests_and_no_more(llava: Any) -> None:
    """A model that fails once is no failed engine."""
    backbone, _, text = llava
    with BatchEngine(backbone, config=EngineConfig(slots=1, limit=64)) as engine:
        whole = engine.core.round

        def once() -> None:
            engine.core.round = whole  # type: ignore[method-assign]
            raise RuntimeError("a bad round")

        engine.core.round = once  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="a bad round"):
            engine.submit(text, **OPTIONS).result(WITHIN)
        assert engine.submit(text, **OPTIONS).result(WITHIN).output.depths.numel() == 3
        assert engine.alive
