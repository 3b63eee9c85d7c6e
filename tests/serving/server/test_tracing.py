"""Laws of traces: a span a request and one for each of its parts, and nothing where none are asked
for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from offramp.errors import InputError
from offramp.serving.server.app import create_app
from offramp.serving.server.tracing import provider_of
from serving import messages, scene_examples, service_of

trace = pytest.importorskip("opentelemetry.sdk.trace")
CHAT = "/v1/chat/completions"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
BODY = {"messages": messages(scene_examples()[0]), "max_tokens": 12, "temperature": 0}


@pytest.fixture
def traced() -> Iterator[tuple[Any, Any]]:
    """A client, and where its requests' spans go."""
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from starlette.testclient import TestClient

    kept, provider = InMemorySpanExporter(), trace.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    service = service_of(slots=2)
    yield TestClient(create_app(service, provider), raise_server_exceptions=False), kept
    service.close()


def by_name(kept: Any) -> dict[str, Any]:
    return {span.name: span for span in kept.get_finished_spans()}


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_and_its_parts_are_spans(traced: Any, stream: bool) -> None:
    client, kept = traced
    options = {"stream": stream, "offramp": {"mode": "early_exit"}}
    found = client.post(CHAT, json={**BODY, **options}, headers={"traceparent": PARENT})
    assert found.status_code == 200
    spans = by_name(kept)
    assert set(spans) == {f"POST {CHAT}", "image", "prompt", "decode"}
    request = spans[f"POST {CHAT}"]
    assert f"{request.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{request.parent.span_id:016x}" == PARENT.split("-")[2]
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["offramp.mode"] == "early_exit"
    assert request.attributes["offramp.completion_tokens"] == 12
    for name in ("image", "prompt", "decode"):
        assert spans[name].parent.span_id == request.context.span_id
        assert request.start_time <= spans[name].start_time <= spans[name].end_time
    assert spans["image"].end_time <= spans["prompt"].start_time
    assert spans["prompt"].end_time == spans["decode"].start_time
    decode = spans["decode"].attributes
    assert decode["gen_ai.usage.output_tokens"] == 12
    assert decode["gen_ai.response.finish_reasons"] == ("length",)
    pairs = zip(decode["offramp.depths"], decode["offramp.tokens_by_depth"], strict=True)
    by_depth = dict(pairs)
    assert set(by_depth) <= {2, 12} and sum(by_depth.values()) == 12
    mean = sum(depth * tokens for depth, tokens in by_depth.items()) / 12
    assert decode["offramp.mean_depth"] == pytest.approx(mean)
    assert spans["prompt"].attributes["gen_ai.usage.input_tokens"] > 0


def test_each_of_several_answers_has_its_spans(traced: Any) -> None:
    client, kept = traced
    assert client.post(CHAT, json={**BODY, "n": 3, "temperature": 1}).status_code == 200
    names = [span.name for span in kept.get_finished_spans()]
    assert names.count("decode") == names.count("prompt") == 3 and names.count("image") == 1


def test_a_mistake_and_a_failure_are_spans_too(traced: Any, monkeypatch: Any) -> None:
    client, kept = traced
    assert client.post(CHAT, json={}).status_code == 400
    assert client.get("/nowhere").status_code == 404
    spans = by_name(kept)
    assert spans[f"POST {CHAT}"].attributes["http.response.status_code"] == 400
    assert spans["GET /nowhere"].status.is_unset
    assert not {"image", "prompt", "decode"} & set(spans)


def test_what_monitors_ask_all_the_time_is_no_trace(traced: Any) -> None:
    client, kept = traced
    for path in ("/health", "/ready", "/metrics"):
        assert client.get(path).status_code == 200
    assert kept.get_finished_spans() == ()


# -- what asks for traces --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment",
    [
        {}, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, {"OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://here:4318", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://here:4318", "OTEL_TRACES_EXPORTER": "none"},
    ],
)  # fmt: skip
def test_without_a_wish_there_is_no_provider(environment: dict[str, str]) -> None:
    assert provider_of(environment) is None


@pytest.mark.parametrize(
    "environment",
    [
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"},
        {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:9/v1/traces"},
        {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
    ],
)
def test_the_standard_variables_ask_for_one(environment: dict[str, str], monkeypatch: Any) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    provider = provider_of(environment)
    assert provider.resource.attributes["service.name"] == "offramp"
    provider.shutdown()
    monkeypatch.setenv("OTEL_SERVICE_NAME", "captions")
    named = provider_of({**environment, "OTEL_SERVICE_NAME": "captions"})
    assert named.resource.attributes["service.name"] == "captions"
    named.shutdown()


@pytest.mark.parametrize(
    "more", [{"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, {"OTEL_TRACES_EXPORTER": "zipkin"}]
)
def test_another_way_out_is_refused(more: dict[str, str]) -> None:
    with pytest.raises(InputError, match="exported by"):
        provider_of({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://here:4318", **more})


def test_without_the_library_it_says_what_to_install(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(InputError, match=r"not installed.*\n.*pip install .*\[trace\]"):
        provider_of({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://here:4318"})


def test_without_a_wish_nothing_of_it_is_imported() -> None:
    code = (
        "import sys, offramp.serving.server.app, offramp.serving.server.tracing as t\n"
        "assert t.provider_of({}) is None\n"
        "print(*[n for n in sys.modules if n.startswith('opentelemetry.sdk')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
