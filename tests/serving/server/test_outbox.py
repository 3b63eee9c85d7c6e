"""Laws of the outbox: everything arrives, in order, by one call into the loop for each flush."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import pytest

from offramp.serving.server import run
from offramp.serving.server.app import create_app
from offramp.serving.server.outbox import Outbox
from serving import asking, messages, scene_examples, service_of


def test_what_a_round_brought_arrives_in_order_by_one_call() -> None:
    async def received() -> tuple[list[int], list[int], int]:
        loop, box, calls = asyncio.get_running_loop(), Outbox(), 0
        first: asyncio.Queue[int] = asyncio.Queue()
        second: asyncio.Queue[int] = asyncio.Queue()
        box.open()

        def round_of(start: int) -> None:
            for number in range(start, start + 3):
                box.put(first if number % 2 else second, number)
            box.flush()
            box.flush()  # nothing is left to hand over

        real = loop.call_soon_threadsafe

        def counted(*arguments: object) -> object:
            nonlocal calls
            calls += arguments[0].__name__ == "_deliver"  # type: ignore[attr-defined]
            return real(*arguments)  # type: ignore[arg-type]

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign, assignment]
        await asyncio.to_thread(round_of, 0)
        await asyncio.to_thread(round_of, 3)
        odd = [first.get_nowait() for _ in range(first.qsize())]
        even = [second.get_nowait() for _ in range(second.qsize())]
        return odd, even, calls

    assert asyncio.run(received()) == ([1, 3, 5], [0, 2, 4], 2)


def test_a_loop_that_has_ended_and_two_that_flush_at_once_are_no_matter() -> None:
    box = Outbox()

    async def first() -> None:
        box.open()

    asyncio.run(first())
    box.put(asyncio.Queue(), 1)
    box.flush()

    async def received() -> list[int]:
        box.open()
        queue: asyncio.Queue[int] = asyncio.Queue()

        def some(start: int) -> None:
            for number in range(start, start + 2000):
                box.put(queue, number)
                box.flush()

        await asyncio.gather(*(asyncio.to_thread(some, start) for start in (0, 2000)))
        await asyncio.sleep(0)
        return sorted(queue.get_nowait() for _ in range(queue.qsize()))

    assert asyncio.run(received()) == list(range(4000))


def test_an_answer_that_is_there_at_once_is_heard_of() -> None:
    service = service_of(slots=1)
    submit = service.engine.submit

    def at_once(*arguments: Any, **more: Any) -> Any:
        handle = submit(*arguments, **more)
        handle.result()
        time.sleep(0.05)  # its round is over
        return handle

    service.engine.submit = at_once  # type: ignore[method-assign]
    with asking(service) as client:
        body = {"messages": messages(scene_examples()[6]), "max_tokens": 2}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
    service.close()


def test_the_engine_waits_for_the_loop_no_longer_than_it_must(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[float] = []

    async def noted(self: Any, sockets: Any) -> None:
        seen.append(sys.getswitchinterval())

    monkeypatch.setattr(run.Server, "serve", noted)
    before, service = sys.getswitchinterval(), service_of(slots=1)
    place = run.listen("127.0.0.1", 0)
    run.serve(create_app(service), service, place, ready=lambda _: None)
    place.close()
    service.close()
    assert seen == [pytest.approx(run.SWITCH_SECONDS)]
    assert sys.getswitchinterval() == before
