"""Laws of what the API says of itself and to whom: errors name fields, and origins are named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from offramp.core.errors import InputError
from offramp.serving.server.config import ServerConfig
from serving import asking, messages, scene_examples, service_of

CHAT = "/v1/chat/completions"
EXAMPLE = messages(scene_examples()[0])
URL = EXAMPLE[0]["content"][0]["image_url"]["url"]


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    service = service_of(slots=2, cors=("https://app.example.org", "http://localhost:3000/"))
    yield asking(service)
    service.close()


def content(part: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "Caption:"}, part]}]}


@pytest.mark.parametrize(
    "body, field, says",
    [
        (
            content({"type": "image_url", "image_url": {"url": 5}}),
            "messages[0].content[1].image_url.url",
            "valid string",
        ),
        (
            content({"type": "image_url", "image_url": {}}),
            "messages[0].content[1].image_url.url",
            "required",
        ),
        (
            content({"type": "image_url", "image_url": {"url": URL, "detail": "huge"}}),
            "messages[0].content[1].image_url.detail",
            "'low', 'high' or 'auto'",
        ),
        (content({"type": "image_url"}), "messages[0].content[1].image_url", "required"),
        (
            content({"type": "image_url", "image_url": URL}),
            "messages[0].content[1].image_url",
            "object",
        ),
        (content({"type": "text", "text": 5}), "messages[0].content[1].text", "valid string"),
        (
            content({"type": "text", "text": "x", "cache": 1}),
            "messages[0].content[1].cache",
            "not supported",
        ),
        (content({"type": "video"}), "messages[0].content[1]", "video"),
        (content({}), "messages[0].content[1]", "type"),
        (content(5), "messages[0].content[1]", "object"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages[0].content",
            "string or a valid list",
        ),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'system'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ({"messages": EXAMPLE, "stop": 5}, "stop", "string or a valid list"),
        ({"messages": EXAMPLE, "stop": ["a", ""]}, "stop[1]", "at least 1"),
        ({"messages": EXAMPLE, "temperature": 3}, "temperature", "2"),
        (
            {"messages": EXAMPLE, "offramp": {"thresholds": {"2": 7}}},
            "offramp.thresholds.2",
            "less than or equal to 1",
        ),
        ({"messages": EXAMPLE, "temprature": 1}, "temprature", "'temperature'"),
    ],
)
def test_an_error_names_one_field(client: Any, body: Any, field: str, says: str) -> None:
    found = client.post(CHAT, json=body)
    error = found.json()["error"]
    assert (found.status_code, error["param"]) == (400, field), error
    assert says in error["message"] and "content.str" not in error["message"]


def test_an_error_of_a_prompt_names_its_place(client: Any) -> None:
    found = client.post("/v1/completions", json={"prompt": [1, "a"]}).json()["error"]
    assert found["param"] == "prompt[1]"


@pytest.mark.parametrize("detail", ["low", "high", "auto"])
def test_detail_is_taken_and_changes_nothing(client: Any, detail: str) -> None:
    part = {"type": "image_url", "image_url": {"url": URL, "detail": detail}}
    body = {"messages": EXAMPLE, "max_tokens": 6, "temperature": 0}
    asked = [{"role": "user", "content": [part, EXAMPLE[0]["content"][1]]}]
    texts = [
        client.post(CHAT, json={**body, "messages": given}).json()["choices"][0]["message"]
        for given in (EXAMPLE, asked)
    ]
    assert texts[0] == texts[1]


# -- other sites' pages ----------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["https://app.example.org", "http://localhost:3000"])
def test_pages_of_a_named_origin_may_ask(client: Any, origin: str) -> None:
    asks = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    asks["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-os"
    found = client.options(CHAT, headers=asks)
    assert found.status_code == 200
    assert found.headers["access-control-allow-origin"] == origin
    assert "x-stainless-os" in found.headers["access-control-allow-headers"]
    for body in ({"messages": EXAMPLE, "max_tokens": 2}, {}):  # an error is read too
        answer = client.post(CHAT, json=body, headers={"Origin": origin})
        assert answer.headers["access-control-allow-origin"] == origin


def test_pages_of_other_origins_may_not(client: Any) -> None:
    origin = {"Origin": "https://evil.org", "Access-Control-Request-Method": "POST"}
    assert client.options(CHAT, headers=origin).status_code == 400
    answer = client.get("/v1/models", headers=origin)
    assert "access-control-allow-origin" not in answer.headers


def test_without_origins_no_page_of_another_site_may_ask() -> None:
    service = service_of(slots=1, keys=("k",))
    asked = {"Origin": "https://app.example.org", "Access-Control-Request-Method": "POST"}
    found = asking(service).options(CHAT, headers=asked)
    service.close()
    assert found.status_code == 401 and "access-control-allow-origin" not in found.headers


@pytest.mark.parametrize("origin", ["example.org", "ftp://a.org", "https://a.org/path", "", "**"])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(InputError, match="origin"):
        ServerConfig("m", cors=(origin,))


def test_every_path_of_the_openapi_document_says_what_it_is_for(client: Any) -> None:
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        for about in methods.values():
            assert about.get("description"), path
