"""Laws of the outbox: everything arrives, in order, by one call into the loop for each flush."""

from __future__ import annotations

import asyncio

from offramp.serving.server.outbox import Outbox


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
