"""The routes: OpenAI's API, tokens, health and numbers, and the page."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from hashlib import sha256
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.middleware.cors import CORSMiddleware

from offramp import __version__
from offramp.adapter.shipped import example_picture
from offramp.common.depth_color import STOPS
from offramp.core.errors import OfframpError
from offramp.promises.verdict import Verdict
from offramp.serving.monitor.sample import Sample
from offramp.serving.request import Completion
from offramp.serving.server.answering import Answering, OnAnswer, unless_gone
from offramp.serving.server.api.options import Generation
from offramp.serving.server.api.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    JudgedAnswer,
    ResetRequest,
    Sampling,
    TokenizeRequest,
    asked_text,
)
from offramp.serving.server.errors import ApiError, add_handlers
from offramp.serving.server.middleware import Gate
from offramp.serving.server.models import check_model, likeness_report, model_card
from offramp.serving.server.served import Inputs
from offramp.serving.server.service import Service

T = TypeVar("T")
Prepared = tuple[list[Inputs], Sequence[Any]]
"""Inputs of each prompt, and the images that they share."""


def create_app(service: Service) -> FastAPI:
    """Return the ASGI application of a service; its shutdown closes the service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="offramp", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.add_middleware(Gate, config=service.config, refused=service.metrics.refused)
    if service.config.cors:  # before the gate: a browser asks whether it may ask without its key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[origin.rstrip("/") for origin in service.config.cors],
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-Id"],
        )
    add_handlers(app)
    _add_openai(app, service)
    _add_tokens(app, service)
    _add_operations(app, service)
    return app


# -- OpenAI's API ----------------------------------------------------------------------------------


def _add_openai(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation with images; in pieces with `stream`."""
        check_model(service, body.model)
        prompter = service.prompter
        urls = prompter.images_of(body.messages)

        async def prompts() -> Prepared:
            make = lambda images: prompter.conversation(body.messages, images)  # noqa: E731
            inputs, images = await service.prepare(urls, make)
            return [inputs], images

        return await _answer(service, body, request, body.n, prompts)

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Continue texts as they are, or token ids; `images` is an extension."""
        check_model(service, body.model)
        prompter, asked = service.prompter, body.prompts
        urls = prompter.check_images(body.images)
        prompter.check_text([text for text in asked if isinstance(text, str)], "prompt")
        if urls and not isinstance(asked[0], str):
            raise ApiError(400, "Images need a prompt of text, not of token ids.", param="images")

        def make(images: Sequence[Any]) -> Any:
            return [
                prompter.text(p, images) if isinstance(p, str) else prompter.ids(p) for p in asked
            ]

        async def prompts() -> Prepared:
            inputs: Any
            inputs, images = await service.prepare(urls, make)
            return inputs, images

        return await _answer(service, body, request, body.n * len(asked), prompts)

    @app.get("/v1/models")
    async def cards() -> dict[str, Any]:
        """List the model that is served: context, exits, guarantee."""
        return {"object": "list", "data": [model_card(service)]}

    @app.get("/v1/models/{name:path}")
    async def card(name: str) -> dict[str, Any]:
        """Show the model of this name."""
        check_model(service, name)
        return model_card(service)


async def _answer(
    service: Service,
    body: Sampling,
    request: Request,
    answers: int,
    prompts: Callable[[], Awaitable[Prepared]],
) -> Response:
    """The response to a completion. prompts: makes its inputs."""
    until = asyncio.get_running_loop().time() + service.config.seconds
    place = service.admit(answers)
    try:
        use = service.use_of(body)
        constraint = await _in_time(service, service.constraint(body), request, until)
        inputs, images = await _in_time(service, prompts(), request, until)
        client = client_of(request)
        question = await _in_time(service, service.question(body, use), request, until)
        use = service.of_kind(use, question)
        watched = service.watches(body, use, images, client)
        watch = _watch(service, body, question, images, client) if watched else None
        look = await service.look(use, images)
        del images  # they are large, and answers take long
        salt = request.scope.get("offramp_salt")
        answering = Answering(
            service,
            body,
            inputs,
            use,
            place,
            until,
            watch,
            salt,
            question=question,
            client=client,
            look=look,
            constraint=constraint,
        )
    except BaseException:
        place.leave()
        raise
    entry = request.scope.get("offramp", {})
    entry |= {"mode": use.named, "prompt_tokens": answering.reply.prompt_tokens}
    if not body.stream:
        reply = await answering.whole(request.receive)
        usage = reply["usage"]
        entry |= {"completion_tokens": usage["completion_tokens"]}
        entry |= {"mean_depth": usage["offramp"]["mean_depth"]}
        return JSONResponse(reply)
    pieces = answering.pieces()
    # What fails before the first piece is an error object, not a stream.
    first = await answering.first(pieces, request.receive)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(
        _stream(first, pieces, answering, entry), media_type="text/event-stream", headers=headers
    )


async def _in_time(service: Service, work: Awaitable[T], request: Request, until: float) -> T:
    """Wait for a prompt, unless it takes too long or its client goes away."""
    try:
        async with asyncio.timeout_at(until):
            return await unless_gone(work, request.receive)
    except TimeoutError:
        seconds = service.config.seconds
        raise ApiError(
            504, f"The prompt took longer than {seconds:g} seconds.", code="timeout"
        ) from None


def client_of(request: Request) -> str:
    """Return a name of a request's client, for the watch: the number of its key or, without keys,
    its address."""
    key = request.scope.get("offramp_key")
    if key is not None:
        return str(key)
    return request.client.host if request.client else ""


def _watch(
    service: Service, body: Sampling, question: str, images: Sequence[Any], client: str
) -> OnAnswer:
    """Has an answer compared with the full model's, where it is one of those calibrated, or unlike
    them, which is counted beside; where nothing is promised, any greedy one. Of those that are not
    answered to their end it is counted that they are lost."""

    def compare(
        inputs: Inputs, how: Generation, done: Completion | None, verdict: Verdict | None, id: str
    ) -> None:
        if not (how.plain and (done is None or done.early_exit)) or service.watcher is None:
            return
        found = service.served.stands(asked=question, longest=how.longest)
        if service.watcher.promise is None or found.promise is not None:
            if done is None:
                service.watcher.lost()
                return
            text = asked_text(body)
            like = verdict is None or not verdict.unlike
            sample = Sample(inputs, how.options, done.output, images[0], text, client, like, id)
            service.watcher.offer(sample)

    return compare


async def _stream(
    first: bytes, pieces: AsyncIterator[bytes], answering: Answering, entry: dict[str, Any]
) -> AsyncIterator[bytes]:
    try:
        yield first
        async for piece in pieces:
            yield piece
    finally:
        answering.leave()
        entry["completion_tokens"] = sum(len(c.written.tokens) for c in answering.choices)


# -- tokens, health, numbers -----------------------------------------------------------------------


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        """Return the tokens of a text, or of a conversation."""
        check_model(service, body.model)
        prompter = service.prompter
        if body.messages is not None:
            prompter.images_of(body.messages)
        else:
            prompter.check_text([body.prompt or ""], "prompt")

        def work() -> bytes:
            text = body.prompt or ""
            if body.messages is not None:
                text = prompter.conversation_text(body.messages)
            special = body.add_special_tokens and prompter.processor.adds_special_tokens(text)
            tokens = list(service.tokenizer(text, add_special_tokens=special)["input_ids"])
            found = {"count": len(tokens), "max_model_len": service.served.limit, "tokens": tokens}
            return json.dumps(found).encode()  # here, for a million of them would hold up the loop

        return await _of_text(service, work, request)

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        """Return the text of tokens."""
        check_model(service, body.model)
        known = len(service.tokenizer)
        if wrong := [token for token in body.tokens if token >= known]:
            said = f"There is no token {wrong[0]}: the vocabulary has {known}."
            raise ApiError(400, said, param="tokens", code="invalid_value")

        def work() -> bytes:
            return json.dumps({"prompt": service.tokenizer.decode(body.tokens)}).encode()

        return await _of_text(service, work, request)


async def _of_text(service: Service, work: Callable[[], bytes], request: Request) -> Response:
    """JSON that is made of a text, let in and timed as a completion is."""
    until = asyncio.get_running_loop().time() + service.config.seconds
    place = service.admit(1)
    try:
        content = await _in_time(service, service.of_text(work), request, until)
        return Response(content, media_type="application/json")
    finally:
        place.leave()


def _add_operations(app: FastAPI, service: Service) -> None:
    page = _page()
    policy = {"Content-Security-Policy": page_policy(page, service.config.images.domains)}

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Tell whether the engine runs. Needs no key."""
        if not service.engine.alive:
            raise ApiError(503, "The engine has stopped.", code="unavailable")
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Tell whether requests are taken. Needs no key."""
        if service.draining or not service.engine.alive:
            raise ApiError(503, "The server is stopping.", code="stopping")
        return {"status": "ready"}

    @app.get("/version")
    async def version() -> dict[str, str]:
        """Return the version of offramp."""
        return {"version": __version__}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Return the metrics in Prometheus's format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.post("/v1/watch/reset")
    async def reset_watch(request: Request, body: ResetRequest) -> dict[str, Any]:
        """Reset the watch and the alarm over unlike requests; by the first of the server's keys,
        as the watch is about the requests of all."""
        check_model(service, body.model)
        if service.watcher is None and likeness_report(service) is None:
            raise ApiError(
                404,
                "Nothing is watched here: the exits are not calibrated, or the server was started "
                "with --watch 0.",
                code="not_watched",
            )
        _check_operator(service)
        if request.scope["offramp_key"]:
            raise ApiError(
                403,
                "The watch is about everybody's requests: it is reset by the first of the server's "
                "keys alone.",
                code="first_key_needed",
            )
        service.alarm.reset()
        if service.watcher is not None:
            await asyncio.to_thread(service.watcher.reset)
        watch = None if service.watcher is None else service.watcher.report()
        return {"watch": watch, "likeness": likeness_report(service)}

    @app.post("/v1/watch/answer")
    async def judge(body: JudgedAnswer) -> dict[str, Any]:
        """Count what people say is right of an answer that the watch compared; only where the
        server has keys."""
        check_model(service, body.model)
        watcher = service.watcher
        if watcher is None or watcher.judged is None:
            raise ApiError(
                404,
                "No right answers are waited for: what is guaranteed needs none, or of cider_drop "
                "the server was started without --watch frequencies=FILE.",
                code="not_watched",
            )
        _check_operator(service)
        try:
            counted = await asyncio.to_thread(watcher.judge, body.id, body.references)
        except OfframpError as error:
            said = f"{error.problem} {error.remedy}"
            raise ApiError(400, said, param="references", code="invalid_value") from error
        return {"counted": counted, "watch": watcher.report()}

    @app.get("/example")
    async def example() -> Response:
        """Return a picture of the kind that the model was trained on."""
        return FileResponse(example_picture(service.served.name))

    @app.get("/", response_class=HTMLResponse)
    async def index() -> Response:
        """Return the page to try the model on."""
        return HTMLResponse(page, headers=policy)


def _check_operator(service: Service) -> None:
    """Raise `ApiError` where requests bring no key, so that anybody could be asking."""
    if not service.config.keys:
        raise ApiError(
            403,
            "Without API keys anybody could change what the watch says. Start with --api-keys.",
            code="keys_needed",
        )


def _page() -> str:
    """The page with its script, and the colours of depth."""
    web = files("offramp.serving.server").joinpath("web")
    text, script = (web.joinpath(name).read_text("utf-8") for name in ("index.html", "page.js"))
    text = text.replace("// page.js\n", script)
    return text.replace('["from shallow to deep"]', json.dumps(STOPS))


def page_policy(page: str, hosts: Sequence[str] = ()) -> str:
    """Return the page's security policy: its own script and style, and requests to this server
    alone. hosts: of which it may show images too, as `--image-domains` has them."""

    def own(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(sha256(part.encode()).digest()).decode() for part in parts)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    shown = "".join(f" {'*' * host.startswith('.')}{host}" for host in hosts)
    return (
        f"default-src 'none'; script-src {own('script')}; style-src {own('style')}; "
        f"img-src 'self' data: blob:{shown}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
