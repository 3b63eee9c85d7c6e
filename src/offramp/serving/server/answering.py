"""One request on its way: its answers from the engine's thread to the client, whole or in pieces.

The engine's thread calls back with every settled token; the event loop turns these into text. A
client that goes away, and a request that takes too long, free their slots within a round.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

from offramp.core.decoding.sequence import Token
from offramp.promises.verdict import Status, Verdict
from offramp.serving.request import Completion, Handle
from offramp.serving.server.api.options import Generation
from offramp.serving.server.api.protocol import ChatRequest, Sampling
from offramp.serving.server.api.replies import DONE, Reply, Written, event
from offramp.serving.server.api.text import TextStream
from offramp.serving.server.errors import ApiError, api_error
from offramp.serving.server.served import Inputs, NoPromise
from offramp.serving.server.service import Place, Service, Use

T = TypeVar("T")
Event = tuple[int, Token | None]
"""Number of a choice, and its next token; None: it is over."""
_LATE: Event = (-1, None)
"""Stands for the end of the time that an answer may take."""
OnAnswer = Callable[[Inputs, Generation, Completion | None, Verdict | None, str], None]
"""Is told of an answer, its verdict and the id of its reply; None: its client has gone, or it took
too long."""


@dataclass(frozen=True, eq=False)
class _Choice:
    """One answer while it is written. prompt: tokens of its prompt."""

    handle: Handle
    how: Generation
    inputs: Inputs
    prompt: int
    written: Written
    stream: TextStream


class Answering:
    """The answers to one request. Made, and used, in the event loop's thread.

    prompts: inputs, one for each prompt; every one is answered `n` times. until: deadline of the
    request, by the loop's clock. on_answer: is told of every answer, or of its loss. salt: as of
    `offramp.serving.request.Request`. client: who asks. look: of `Service.look`. constraint: of
    every answer's tokens.
    """

    def __init__(
        self,
        service: Service,
        request: Sampling,
        prompts: list[Inputs],
        use: Use,
        place: Place,
        until: float,
        on_answer: OnAnswer | None = None,
        salt: str | None = None,
        *,
        question: str,
        client: str = "",
        look: Any = None,
        constraint: Any = None,
    ) -> None:
        """Submit all choices. Raise `ApiError` where a prompt or its answer does not fit."""
        self._service, self._request, self._place = service, request, place
        self._on_answer, self._salt, self._look = on_answer, salt, look
        self._question, self._use, self._client = question, use, client
        self._exact = constraint is not None
        service.outbox.open()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        # One timer a request: one a token would cost as much as the token's JSON.
        loop = asyncio.get_running_loop()
        self._timer = loop.call_at(until, self._events.put_nowait, _LATE)
        served = service.served
        sizes = [served.tokens(inputs) for inputs in prompts]
        hows = [
            served.generation(
                request,
                service.config,
                prompt=tokens,
                room=served.room(tokens),
                choice=choice,
                constraint=constraint,
            )
            for tokens in sizes
            for choice in range(request.n)
        ]
        self.standing: Status = standing_of_request(service, question, use, hows)
        self.reply = Reply(
            service.config.name,
            isinstance(request, ChatRequest),
            use.named,
            served.layers,
            sum(sizes),
            service.tokenizer,
        )
        repeated = [inputs for inputs in prompts for _ in range(request.n)]
        self.choices: list[_Choice] = []
        self._left = False
        try:
            for index, (inputs, how) in enumerate(zip(repeated, hows, strict=True)):
                self.choices.append(self._submit(index, inputs, how, use))
        except BaseException:
            self.leave()
            raise

    def _submit(
        self, index: int, inputs: Inputs, how: Generation, use: Use, *, again: bool = False
    ) -> _Choice:
        """again: in the place of an answer that was over."""
        noted = how.logprobs

        def settled(choice: Token) -> None:
            if noted is not None:
                noted.settle(choice.token)
            if self._request.stream:
                self._tell((index, choice))

        handle = self._service.submit(
            inputs, use, seed=how.seed, salt=self._salt, on_token=settled, **how.options
        )
        over = partial(self._tell, (index, None)) if again else partial(self._over, index)
        handle.add_done_callback(lambda _: over())
        if handle.done():  # before the callback was there: no round comes that would hand it over
            self._service.outbox.flush()
        stream = TextStream(self._service.tokenizer, self._request.stops, exact=self._exact)
        tokens = self._service.served.tokens(inputs)
        return _Choice(handle, how, inputs, tokens, Written(index), stream)

    def _tell(self, what: Event) -> None:  # in the engine's thread, mostly
        self._service.outbox.put(self._events, what)

    def _over(self, index: int) -> None:  # in the engine's thread, mostly
        self._service.outbox.put(self._place, 1)
        self._tell((index, None))

    def leave(self) -> None:
        """Cancel the unfinished answers; a second call changes nothing."""
        self._timer.cancel()
        left, self._left = self._left, True
        for choice in () if left else self.choices:
            if self._on_answer is not None and choice.written.reason is None:
                self._on_answer(choice.inputs, choice.how, None, None, self.reply.id)
            if not choice.handle.done():
                self._service.metrics.ended("abort")
            self._service.over(choice.handle)
        self._place.leave()

    # -- whole -------------------------------------------------------------------------------------

    async def whole(self, receive: Callable[[], Any]) -> dict[str, Any]:
        """Return the reply, once all answers are over. receive: ends when the client has gone.

        Raises:
            ApiError: an answer failed; the client has gone (499).
        """
        try:
            await unless_gone(self._all(), receive)
            await unless_gone(self._again(), receive)
            written = [choice.written for choice in self.choices]
            return self._named().whole(written, [choice.how.logprobs for choice in self.choices])
        finally:
            self.leave()

    async def _again(self) -> None:
        """Have the answers to requests unlike the calibrated ones written again, losslessly, where
        that is asked for."""
        unlike = [
            index
            for index, choice in enumerate(self.choices)
            if choice.written.verdict is not None and choice.written.verdict.unlike
        ]
        if not (unlike and self._service.answers_unlike):
            return
        use = Use("lossless", None, "lossless")
        for index in unlike:
            before = self.choices[index]
            self._service.over(before.handle)
            again = self._submit(index, before.inputs, before.how, use, again=True)
            assert before.written.verdict is not None
            again.written.verdict = replace(before.written.verdict, exact=True)
            self.choices[index] = again
        self.reply = replace(self.reply, mode="lossless")
        await self._all(len(unlike))

    async def _all(self, left: int | None = None) -> None:
        """Wait until all answers are over, or so many."""
        left = len(self.choices) if left is None else left
        while left:
            for index, _ in await self._news():  # tokens are not told of without a stream
                self._finish(self.choices[index])
                left -= 1

    async def _news(self) -> list[Event]:
        """Wait for at least one event, and return all since the last call."""
        news = [await self._events.get()]
        while not self._events.empty():
            news.append(self._events.get_nowait())
        if _LATE in news:
            raise ApiError(
                504,
                f"The answer took longer than {self._service.config.seconds:g} seconds.",
                code="timeout",
            )
        return news

    def _finish(self, choice: _Choice) -> str:
        """Note what is known of an answer that is over; the last piece of its text."""
        try:
            done = choice.handle.result()
        except CancelledError:
            raise ApiError(503, "The server is stopping.", code="stopping") from None
        except Exception as error:
            raise api_error(error) from error
        written = choice.written
        written.tokens = [token.token for token in done.tokens]
        written.depths = [token.depth for token in done.tokens]
        if not self._request.stream:
            for token in written.tokens:
                choice.stream.put(token)
        if self._request.offramp is not None:
            written.details = _details(done, self._service.tokenizer)
        last = choice.stream.finish()
        written.text = choice.stream.text
        ended = self._service.served.ends(written.tokens[-1]) and not self._request.ignore_eos
        full = len(written.tokens) >= choice.how.longest
        stopped = choice.stream.stopped or ended or not full
        written.reason = "stop" if stopped else "length"
        if written.verdict is None:
            written.verdict = self._service.verdict(
                self.standing, self._question, self._use, done, self._look, self._client
            )
        mode = self._mode(done)
        first = choice.written.index % self._request.n == 0
        tokens = choice.prompt if first else 0
        self._service.metrics.answered(done, written.depths, tokens, written.reason, mode)
        if self._on_answer is not None:
            self._on_answer(choice.inputs, choice.how, done, written.verdict, self.reply.id)
        return last

    def _mode(self, done: Completion) -> str:
        """How exits were used: at full depth, where the engine found that they do not pay."""
        early = self.reply.mode == "early_exit"
        return "full" if early and not done.early_exit else self.reply.mode

    def _named(self) -> Reply:
        """The reply, with how its answers were written."""
        modes = {self._mode(c.handle.result()) for c in self.choices if c.written.reason}
        return replace(self.reply, mode=modes.pop()) if len(modes) == 1 else self.reply

    # -- in pieces ---------------------------------------------------------------------------------

    async def first(self, pieces: AsyncIterator[bytes], receive: Callable[[], Any]) -> bytes:
        """Return the first of `pieces`, unless the client leaves before.

        Raises:
            ApiError: an answer failed; the client has gone (499).
        """
        try:
            return await unless_gone(anext(pieces), receive)
        except BaseException:
            self.leave()
            raise

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the reply as server-sent events. A failure before the first event is raised, a
        later one is an event."""
        options = self._request.stream_options
        continuous = options is not None and options.continuous_usage_stats
        left, begun = len(self.choices), False
        try:
            while left:
                chunks: list[dict[str, Any]] = []
                for index, token in await self._news():
                    choice = self.choices[index]
                    chunks += self._ended(choice) if token is None else self._wrote(choice, token)
                    left -= token is None
                if self.reply.chat and not begun:
                    chunks = [*(self.reply.opening(c.written.index) for c in self.choices), *chunks]
                begun = True
                if continuous:
                    usage = self.reply.usage([choice.written for choice in self.choices])
                    chunks = [{**chunk, "usage": usage} for chunk in chunks]
                if chunks:
                    yield b"".join(map(event, chunks))
            if options is not None and options.include_usage:
                yield event(self._named().counted([choice.written for choice in self.choices]))
            yield DONE
        except ApiError as error:
            if not begun:
                raise
            yield event(error.body) + DONE
        finally:
            self.leave()

    def _wrote(self, choice: _Choice, token: Token) -> list[dict[str, Any]]:
        written = choice.written
        written.tokens.append(token.token)
        written.depths.append(token.depth)
        piece = choice.stream.put(token.token)
        return self._piece(choice, piece) if piece else []

    def _ended(self, choice: _Choice) -> list[dict[str, Any]]:
        piece = self._finish(choice)
        detailed = choice.how.logprobs is not None or self._request.offramp is not None
        unsent = detailed and choice.written.sent < len(choice.written.tokens)
        chunks = self._piece(choice, piece) if piece or unsent else []
        return [*chunks, self.reply.ending(choice.written)]

    def _piece(self, choice: _Choice, piece: str) -> list[dict[str, Any]]:
        """A chunk of text, with the details of the tokens since the last one."""
        written = choice.written
        begin, offset = written.sent, len(written.text)
        written.text += piece if written.reason is None else ""
        written.sent = len(written.tokens)
        depths = None if self._request.offramp is None else written.depths[begin:]
        logprobs = self.reply.logprobs(written, choice.how.logprobs, begin, offset)
        return [self.reply.piece(written, piece, logprobs, depths)]


def _details(done: Completion, tokenizer: Any) -> dict[str, Any]:
    """Return when each token of an answer was written, in seconds since the request was submitted,
    and its score. offers: by trust, the answers that drafts made, as of `GenerationOutput`."""
    scores = [None if math.isnan(token.score) else token.score for token in done.tokens]
    offers = [] if done.output is None else done.output.offers[:1]
    return {
        "seconds": [*accumulate((done.first, *done.gaps))],
        "scores": scores,
        "offers": [
            {"trust": trust, "text": tokenizer.decode(ids, skip_special_tokens=True)}
            for trust, ids in (offers[0] if offers else ())
        ],
    }


async def unless_gone(work: Awaitable[T], receive: Callable[[], Any]) -> T:
    """Return the result of `work`, which is cancelled if the client leaves before.

    Raises:
        ApiError: the client has gone (499).
    """
    gone = asyncio.ensure_future(_gone(receive))
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "The client has gone.", code="client_gone")
        return await task
    finally:
        task.cancel()
        gone.cancel()


def standing_of_request(
    service: Service, question: str, use: Use, hows: Sequence[Generation]
) -> Status:
    """Return what is guaranteed of a question's answers, if they may exit early."""
    if use.named != "early_exit":
        return NoPromise()
    if use.trust is not None:
        return NoPromise(why="the request names a trust of its own")
    return service.served.stands(
        asked=question,
        longest=max(how.longest for how in hows),
        plain=all(how.plain for how in hows),
        thresholds=use.thresholds,
    )


async def _gone(receive: Callable[[], Any]) -> None:
    """Return once the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
