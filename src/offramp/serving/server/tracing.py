"""Traces by OpenTelemetry, where its standard variables ask for them; needs the extra `trace`.

A request is a span of the client's trace (`traceparent`), and its parts are spans below it:
`image`, fetched, decoded and processed; of each answer `prompt`, from submission to the first
token, and `decode`, from there to the last. Where no variable asks, nothing is imported and nothing
is called.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from offramp.errors import InputError
from offramp.missing import install_command
from offramp.serving.request import Completion

log = logging.getLogger(__name__)
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
KEY = "offramp_trace"
"""Of a request's `Trace` in its scope."""
QUIET = ("/health", "/ready", "/metrics")
"""Asked for all the time, and not worth a trace."""


def provider_of(environment: Mapping[str, str]) -> Any:
    """A `TracerProvider` that sends spans where the variables say; None: they ask for none.

    Raises:
        InputError: they ask for traces, and OpenTelemetry is not installed; for another exporter or
            protocol than OTLP over HTTP.
    """
    exporter = environment.get("OTEL_TRACES_EXPORTER") or None
    asked = exporter or any(environment.get(name) for name in ENDPOINTS)
    off = environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or exporter == "none"
    if not asked or off:
        return None
    protocol = environment.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environment.get(
        "OTEL_EXPORTER_OTLP_PROTOCOL"
    )
    if exporter not in (None, "otlp") or protocol not in (None, "", "http/protobuf"):
        raise InputError(
            f"Traces cannot be exported by {exporter or 'otlp'}, {protocol or 'http/protobuf'}.",
            "Leave OTEL_TRACES_EXPORTER and the protocol out, or set otlp and http/protobuf.",
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise InputError(
            "OTEL_... asks for traces, and OpenTelemetry is not installed.",
            f"Install it: {install_command('trace')}; or set OTEL_SDK_DISABLED=true.",
        ) from error
    named = {} if environment.get("OTEL_SERVICE_NAME") else {"service.name": "offramp"}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class Trace:
    """The span of one request, and those of its parts."""

    def __init__(self, tracer: Any, span: Any) -> None:
        from opentelemetry.trace import set_span_in_context

        self.span: Any = span
        self._tracer = tracer
        self._context = set_span_in_context(span)

    def part(self, name: str, begun: int, end: int, **attributes: Any) -> None:
        """A span from `begun` to `end`, in nanoseconds since the epoch."""
        known = {key.replace("__", "."): value for key, value in attributes.items()}
        span = self._tracer.start_span(
            name, context=self._context, start_time=begun, attributes=known
        )
        span.end(end)

    def answered(
        self, begun: int, done: Completion, depths: Sequence[int], prompt: int, reason: str
    ) -> None:
        """The spans of an answer that was submitted at `begun`. prompt: tokens of its prompt."""
        first, last = (begun + int(seconds * 1e9) for seconds in (done.first, done.total))
        self.part(
            "prompt", begun, first, offramp__queued_seconds=done.queued,
            gen_ai__usage__input_tokens=prompt,
        )  # fmt: skip
        counted = sorted(Counter(depths).items())
        self.part(
            "decode", first, last, gen_ai__usage__output_tokens=len(depths),
            gen_ai__response__finish_reasons=[reason], offramp__early_exit=done.early_exit,
            offramp__mean_depth=sum(depths) / len(depths),
            offramp__depths=[depth for depth, _ in counted],
            offramp__tokens_by_depth=[tokens for _, tokens in counted],
        )  # fmt: skip


class Traced:
    """An ASGI middleware around everything else: a span a request."""

    def __init__(self, app: ASGIApp, provider: Any) -> None:
        self._app, self._tracer = app, provider.get_tracer("offramp")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in QUIET:
            await self._app(scope, receive, send)
            return
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        headers = {
            key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]
        }
        method, path = scope["method"], scope["path"][:200]
        span = self._tracer.start_span(
            f"{method} {path}",
            context=TraceContextTextMapPropagator().extract(headers),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method, "url.path": path},
        )
        scope[KEY] = Trace(self._tracer, span)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                status = message["status"]
                span.set_attribute("http.response.status_code", status)
                if status >= 500:
                    span.set_status(Status(StatusCode.ERROR))
            await send(message)

        try:
            await self._app(scope, receive, answer)
        finally:
            for key, value in scope.get("offramp", {}).items():  # what the log says of it too
                span.set_attribute(f"offramp.{key}", value)
            span.end()
