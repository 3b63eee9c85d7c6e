"""Laws of `response_format`: over HTTP, whole and in pieces, an answer that ended parses."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import jsonschema
import pytest
from schemas import drawn, random_model

from offramp import Adapter, EngineConfig, ExitPolicy
from offramp.core.decoding.scheduler import Schedule
from offramp.promises.verdict import NONE
from offramp.serving.server.config import ServerConfig
from offramp.serving.server.inputs import schemas
from offramp.serving.server.pytorch import service_of as service_of_model
from offramp.serving.server.service import Service
from serving import NAME, asking, messages, running, scene_examples, service_of

CHAT = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"shape": {"enum": ["square", "circle"]}},
    "required": ["shape"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    backbone, exits, processor = random_model()
    adapter = Adapter(backbone, exits, ExitPolicy({1: 0.5, 3: 0.2}))
    sizes = EngineConfig(4, 256, schedule=Schedule.of(4))
    service = service_of_model(adapter, processor, ServerConfig(NAME), sizes)
    yield asking(service)
    service.close()


def by(schema: Any, **more: Any) -> dict[str, Any]:
    named = {"name": "answer", "schema": schema, "strict": True}
    return {
        "messages": messages(scene_examples()[0]),
        "max_tokens": 120,
        "response_format": {"type": "json_schema", "json_schema": named},
        **more,
    }


def ask(client: Any, body: dict[str, Any]) -> list[tuple[str, str]]:
    """Text and reason of each choice."""
    found = client.post(CHAT, json=body)
    assert found.status_code == 200, found.text
    if not body.get("stream"):
        return [(c["message"]["content"], c["finish_reason"]) for c in found.json()["choices"]]
    texts, reasons = [""] * body.get("n", 1), [""] * body.get("n", 1)
    for line in found.text.split("\n\n"):
        if line and line != "data: [DONE]":
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                texts[choice["index"]] += choice["delta"].get("content") or ""
                reasons[choice["index"]] = choice["finish_reason"] or ""
    return list(zip(texts, reasons, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("mode", ["full", "early_exit", "lossless"])
def test_an_answer_that_stopped_is_valid(client: Any, mode: str, stream: bool) -> None:
    stopped = 0
    for seed in range(10):
        schema = drawn(random.Random(f"{mode} {seed}"))
        sampled = {"temperature": 1, "seed": seed, "n": 2, "top_logprobs": 3, "logprobs": True}
        extra = {"offramp": {"mode": mode}, "stream": stream, **(sampled if seed % 2 else {})}
        for text, reason in ask(client, by(schema, **extra)):
            if reason == "stop":
                jsonschema.Draft202012Validator(schema).validate(json.loads(text))
                stopped += 1
            else:
                assert reason == "length"
    assert stopped > 10


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_was_cut_says_so(client: Any, stream: bool) -> None:
    [(text, reason)] = ask(client, by(SCHEMA, max_tokens=4, stream=stream))
    assert reason == "length" and text.startswith("{") and not text.endswith("}")


@pytest.mark.slow
def test_json_object_is_an_object(client: Any) -> None:
    body = by(SCHEMA, temperature=1, seed=1, max_tokens=220)
    body["response_format"] = {"type": "json_object"}
    [(text, reason)] = ask(client, body)
    assert text.startswith("{")
    assert reason == "length" or isinstance(json.loads(text), dict)


def test_completions_take_it_too(client: Any) -> None:
    body = by(SCHEMA)
    del body["messages"]
    images = [messages(scene_examples()[0])[0]["content"][0]["image_url"]["url"]]
    found = client.post("/v1/completions", json={**body, "prompt": "Caption:", "images": images})
    jsonschema.validate(json.loads(found.json()["choices"][0]["text"]), SCHEMA)


@pytest.mark.parametrize(
    "change, param, says",
    [
        ({"type": "xml"}, "response_format", "xml"),
        ({"type": "json_schema"}, "response_format.json_schema", "required"),
        (by({"not": {}})["response_format"], "response_format", '"not"'),
        (by({"type": "strin"})["response_format"], "response_format", "strin"),
        (by({"$ref": "#"})["response_format"], "response_format", "nothing"),
        (by({"pattern": "("})["response_format"], "response_format", "unclosed group"),
        (by(True)["response_format"], "response_format.json_schema.schema", "dictionary"),
        ({"type": "json_object", "schema": {}}, "response_format.schema", "not supported"),
        (
            {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
            "response_format.json_schema.name",
            "pattern",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    client: Any, change: Any, param: str, says: str
) -> None:
    found = client.post(CHAT, json=by({}, response_format=change))
    error = found.json()["error"]
    assert (found.status_code, error["param"]) == (400, param) and says in error["message"]


def test_a_schema_has_an_end(client: Any) -> None:
    long = {"enum": [f"word {i}" for i in range(8000)]}
    error = client.post(CHAT, json=by(long)).json()["error"]
    assert (error["param"], error["code"]) == ("response_format", "schema_too_long")


def test_an_answer_by_a_schema_has_no_guarantee() -> None:
    service = service_of(slots=1)
    found = asking(service).post(CHAT, json=by(SCHEMA, offramp={"mode": "early_exit"}))
    service.close()
    usage = found.json()["usage"]["offramp"]
    assert usage["verdict"]["says"] == NONE and not usage["verdict"]["promised"]
    assert json.loads(found.json()["choices"][0]["message"]["content"])["shape"]


def test_json_and_writing_on_behind_its_end_exclude_each_other(client: Any) -> None:
    found = client.post(CHAT, json=by(SCHEMA, ignore_eos=True))
    assert found.status_code == 400 and "ignore_eos" in found.json()["error"]["message"]


def test_openais_client_parses_it() -> None:
    """With a class of pydantic's, as its users write it."""
    import openai
    from pydantic import BaseModel

    class Thing(BaseModel):
        color: Literal["red", "blue"]
        count: Literal[1, 2, 3]

    class Scene(BaseModel):
        thing: Thing
        background: Literal["white", "black"] | None

    service = service_of(slots=1)
    with running(service) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="-") as asker:
        found = asker.chat.completions.parse(
            model=NAME,
            messages=messages(scene_examples()[0]),
            max_completion_tokens=150,
            response_format=Scene,
        )
    assert isinstance(found.choices[0].message.parsed, Scene)


# -- what a schema may cost ------------------------------------------------------------------------


MEETING = {
    "allOf": [{"type": "string", "pattern": f".*{chr(97 + n)}.{{{5 + n}}}"} for n in range(18)]
}
"""5 seconds of one core and 700 MB; each further pattern doubles both."""
KEYS = {"type": "object", "patternProperties": {f"^k{n}_$": {} for n in range(900)}}
"""Each pair is compared."""
WITHIN = 60.0
"""Seconds, on a machine that others use too."""


@pytest.fixture
def service() -> Iterator[Service]:
    found = service_of(slots=2, queue=8)
    yield found
    found.close()


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Those that try schemas, as they begin."""
    begun: list[subprocess.Popen[bytes]] = []
    own = schemas.started

    def started() -> subprocess.Popen[bytes]:
        begun.append(own())
        return begun[-1]

    monkeypatch.setattr(schemas, "started", started)
    monkeypatch.setattr(schemas, "passed", set())
    return begun


def eventually(true: Callable[[], bool]) -> None:
    end = time.monotonic() + WITHIN
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("costly", [MEETING, KEYS, {"multipleOf": 9973, "allOf": [MEETING]}])
def test_a_costly_schema_is_refused_and_costs_the_server_nothing(
    costly: Any, service: Service, children: list[Any]
) -> None:
    with running(service) as url:
        begun = time.process_time()
        found = httpx.post(url + CHAT, json=by(costly), timeout=WITHIN)
        spent = time.process_time() - begun
    error = found.json()["error"]
    assert (found.status_code, error["param"]) == (400, "response_format")
    assert "CPU" in error["message"] and spent < 1
    assert len(children) == 1 and children[0].poll() is not None
    assert service.under_way == 0


@pytest.mark.slow
def test_the_trial_of_a_schema_ends_with_its_client(
    service: Service, children: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others are answered meanwhile, and the next schema gets its turn."""
    monkeypatch.setattr(schemas, "_CODE", "while True: pass")
    monkeypatch.setattr(schemas, "SECONDS", 2 * WITHIN)  # it does not end by itself
    plain = {"messages": by({})["messages"], "max_tokens": 1}
    with running(service) as url:
        with ThreadPoolExecutor(1) as pool:
            leaves = pool.submit(httpx.post, url + CHAT, json=by(MEETING), timeout=2)
            eventually(lambda: len(children) == 1)
            assert httpx.post(url + CHAT, json=plain, timeout=WITHIN).status_code == 200
            with pytest.raises(httpx.ReadTimeout):
                leaves.result()
        eventually(lambda: children[0].poll() is not None and service.under_way == 0)
        monkeypatch.undo()
        found = httpx.post(url + CHAT, json=by(SCHEMA), timeout=WITHIN)
    assert json.loads(found.json()["choices"][0]["message"]["content"])["shape"]


def test_a_schema_is_tried_once(service: Service, children: list[Any]) -> None:
    with running(service) as url:
        for _ in range(3):
            assert httpx.post(url + CHAT, json=by(SCHEMA), timeout=WITHIN).status_code == 200
    assert len(children) == 1
