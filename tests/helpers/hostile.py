"""Hostile requests by field, address, body and text: for a table of them and for what is drawn."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import time
from typing import Any

import httpx
from PIL import Image

from offramp.serving.server.app import create_app
from offramp.serving.server.service import Service
from serving import data_uri, messages, scene_examples

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
GOOD = messages(scene_examples()[0])
URI = GOOD[0]["content"][0]["image_url"]["url"]


def image(url: Any, **more: Any) -> list[dict[str, Any]]:
    part = {"type": "image_url", "image_url": {"url": url, **more}}
    return [{"role": "user", "content": [part, {"type": "text", "text": "Caption:"}]}]


def chat(**fields: Any) -> tuple[str, Any]:
    return CHAT, {"messages": GOOD, **fields}


def png(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def deep(levels: int) -> bytes:
    return b'{"messages":' + b"[" * levels + b"]" * levels + b"}"


WHOLE = base64.b64decode(URI.partition(",")[2])
LARGE = data_uri(Image.new("1", (4000, 4001)))

NESTED: dict[str, Any] = {}
for _ in range(300):
    NESTED = {"type": "array", "items": NESTED}

FIELDS = {
    "temperature": [-1, 2.1, 1e308, "0.5", True, [], {}, float("nan"), float("inf"), 10**400],
    "top_p": [0, -0.1, 1.1, "1", [1]],
    "top_k": [-2, 1.5, "5", 2**31, True],
    "max_tokens": [0, -1, 1.5, "12", 2**31, 10**30, True, []],
    "max_completion_tokens": [0, -5, 2.0, "1", 257, 100_000],
    "n": [0, -1, 1.0, "2", 129, 10**9, 17],
    "seed": [1.5, "1", 2**63, -(2**63) - 1, []],
    "stop": ["", [""], [1], ["a"] * 17, 5, {}, "x" * 201, [["a"]]],
    "presence_penalty": [-2.1, 3, "1"],
    "frequency_penalty": [-3, 2.5, "1", [0]],
    "repetition_penalty": [0, -1, 11, "1"],
    "ignore_eos": ["yes", 1, []],
    "stream": ["true", 1, {}],
    "stream_options": [{"include_usage": True}, [], "x"],
    "logprobs": [2, "true", []],
    "top_logprobs": [-1, 21, 3, "1"],
    "model": ["gpt-4", 5, [], "../" * 100, "\u0000", "x" * 100_000],
    "messages": [[], {}, "hello", 5, [5], [[]], [{}], [{"role": "user"}]],
    "offramp": [
        "lossless",
        [],
        {"mode": "fast"},
        {"mode": 1},
        {"thresholds": {}},
        {"thresholds": []},
        {"thresholds": {"2": 1.5}},
        {"thresholds": {"2": -1}},
        {"thresholds": {"2": "0.5"}},
        {"thresholds": {"x": 0.5}},
        {"thresholds": {"99": 0.5}},
        {"thresholds": {"-1": 0.5}},
        {"mode": "lossless", "thresholds": {"2": 0.5}},
        {"other": 1},
        {"thresholds": {str(i): 0.5 for i in range(100)}},
    ],
    "tools": [[{"type": "function", "function": {"name": "f"}}], {}, "x"],
    "tool_choice": ["required", {"type": "function"}],
    "response_format": [
        {"type": "json_schema"},
        "text",
        {"type": "xml"},
        [],
        {"type": "json_object", "strict": 1},
        *(
            {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
            for schema in (
                [],
                {"type": 5},
                {"not": {}},
                {"$ref": "http://169.254.169.254/latest"},
                {"$ref": "#/$defs/none"},
                {"type": "string", "pattern": "("},
                {"type": "string", "pattern": "(?=a)b"},
                {"minItems": -1, "type": "array"},
                {"allOf": [{"$ref": "#"}], "uniqueItems": True},
                NESTED,
                {"multipleOf": 999_983},
            )
        ),
    ],
    "logit_bias": [{"5": 100}, [], 5],
    "metadata": [{"a": 1}, "x", [1]],
    "user": [5, {}],
    "audio": [{"voice": "x"}],
    "modalities": [["text", "audio"]],
    "functions": [[{"name": "f"}]],
    "use_beam_search": [True],
    "best_of": [3],
    "min_tokens": [5],
    "store": ["yes"],
    "temprature": [0.5],
    "__proto__": [{}],
    "x" * 5000: [1],
}

CONVERSATIONS = [
    [{"role": "tool", "content": "x"}],
    [{"role": "user", "content": []}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "x"}}]}],
    [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
    [{"role": "user", "content": 5}],
    [{"role": "user", "content": "no image"}],
    [{"role": "user", "content": "x", "extra": 1}],
    [{"role": "user", "content": "<image>"}],
    [{"role": "system", "content": "be good"}, *GOOD],
    [{"role": "assistant", "content": GOOD[0]["content"]}],
    [*GOOD, {"role": "assistant", "content": "a"}, *GOOD],
    GOOD * 10_000,
    [{"role": "user", "content": "x"}] * 10_000,
    [{"role": "user", "content": "word " * 200_000}],
    [{"role": "user", "content": [*GOOD[0]["content"], {"type": "text", "text": "word " * 4000}]}],
    [{"role": "user", "content": [GOOD[0]["content"][0]] * 9}],
    [{"role": "user", "content": [GOOD[0]["content"][0]] * 2}],
    [{"role": "user", "content": GOOD[0]["content"] * 500}],
]

URLS = [
    "",
    "x",
    "data:",
    "data:,",
    "data:image/png;base64",
    "data:image/png;base64,",
    "data:image/png;base64,!!!!",
    "data:image/png;base64,A",
    "data:image/png,rawbytes",
    "data:text/html;base64,PGI+",
    png(b""),
    png(b"GIF89a"),
    png(WHOLE[:50]),
    png(WHOLE[:-400]),
    png(b"\x00" * 1000),
    png(b"%PDF-1.4"),
    png(b"%!PS-Adobe-3.0 EPSF-3.0\n"),
    png(b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    png(b"II*\x00" + bytes(100)),
    LARGE,
    "data:image/png;base64," + "A" * 15_000_000,
    "data:" + "x" * 100_000 + ",",
    "http://127.0.0.1/",
    "http://127.0.0.1:8000/metrics",
    "http://localhost/a.png",
    "http://169.254.169.254/latest/meta-data/",
    "http://[::1]/",
    "http://[::ffff:127.0.0.1]/",
    "http://2130706433/",
    "http://0x7f000001/",
    "http://017700000001/",
    "http://127.1/",
    "http://0/",
    "https://example.com/a.png",
    "http://example.com@127.0.0.1/",
    "http://127.0.0.1#@example.com/",
    "http://allowed.org.evil.com/a.png",
    "http://evil.com/allowed.org",
    "http://user:pw@allowed.org/",
    "http://allowed.org:99999/",
    "HTTP://LOCALHOST/",
    "ftp://allowed.org/a.png",
    "gopher://allowed.org/",
    "file:///etc/passwd",
    "file://localhost/etc/passwd",
    "/etc/passwd",
    "../../etc/passwd",
    "javascript:alert(1)",
    "blob:http://allowed.org/x",
    "jar:file:///x!/y",
    "http://",
    "http:///x",
    "http://[",
    "//x/y",
    "http://allowed.org\r\nX: y/",
    "\u0000",
    "http://\ud83d.org/",
    " data:image/png;base64,AAAA",
    5,
    None,
    [],
    {"url": "x"},
    True,
]

BODIES = [
    b"",
    b"x",
    b"[]",
    b"5",
    b"null",
    b'"x"',
    b"{",
    b'{"messages": [',
    b"\xff\xfe",
    b"\x00" * 100,
    b'{"messages": NaN}',
    deep(100_000),
    b"{" * 50_000,
    b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    b'{"seed": ' + b"9" * 100_000 + b"}",
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b"messages=hello&model=x",
    b" " * 2_000_000,
]

TEXTS: list[dict[str, Any]] = [
    {"prompt": ""},
    {"prompt": []},
    {"prompt": [""]},
    {"prompt": [[]]},
    {"prompt": [1.5]},
    {"prompt": [-1]},
    {"prompt": [10**12]},
    {"prompt": [999_999]},
    {"prompt": ["a", 1]},
    {"prompt": "x", "echo": True},
    {"prompt": "x", "suffix": "y"},
    {"prompt": "x", "logprobs": 21},
    {"prompt": ["x"] * 17, "images": [URI]},
    {"prompt": [1, 2], "images": [URI]},
    {},
    {"prompt": "x", "images": ["http://127.0.0.1/"]},
    {"prompt": "x", "images": [URI] * 9},
    {"prompt": "x"},
    {"prompt": [5, 6, 7]},
    {"prompt": None},
    {"prompt": {"a": 1}},
]

OTHERS = [
    ("POST", "/tokenize", {}),
    ("POST", "/tokenize", {"prompt": 5}),
    ("POST", "/tokenize", {"prompt": "x", "messages": GOOD}),
    ("POST", "/detokenize", {}),
    ("POST", "/detokenize", {"tokens": [-1]}),
    ("POST", "/detokenize", {"tokens": [10**9]}),
    ("POST", "/detokenize", {"tokens": "x"}),
    ("GET", "/nowhere", None),
    ("GET", CHAT, None),
    ("PUT", CHAT, {}),
    ("DELETE", "/v1/models", None),
    ("GET", "/v1/models/other", None),
    ("GET", "/" + "a" * 5000, None),
    ("GET", "/v1/../../etc/passwd", None),
    ("POST", "/tokenize", {"prompt": "x" * 1_000_000}),
    ("PATCH", "/", {}),
]


def sent(body: Any) -> bytes:
    if body is None or isinstance(body, bytes):
        return body or b""
    return json.dumps(body).encode()


WITHIN = 60.0
"""Seconds; a machine that others use too."""


def table() -> list[tuple[str, str, Any]]:
    rows: list[tuple[str, str, Any]] = [
        ("POST", CHAT, {"messages": GOOD, name: value})
        for name, values in FIELDS.items()
        for value in values
    ]
    rows += [("POST", CHAT, {"messages": found}) for found in CONVERSATIONS]
    rows += [("POST", CHAT, {"messages": image(url)}) for url in URLS]
    rows += [("POST", CHAT, {"messages": image(URI, detail=d)}) for d in ("huge", 5)]
    rows += [("POST", CHAT, body) for body in BODIES]
    rows += [("POST", TEXT, {"max_tokens": 5, **fields}) for fields in TEXTS]
    return [*rows, *OTHERS]


def check_hostile(service: Service, *, may_answer: bool = False) -> None:
    """Every request of the table gets an error object, and the server lives on. may_answer: some of
    them are none of its client's mistakes there."""
    rows = table()
    assert len(rows) >= 200

    async def one(client: httpx.AsyncClient, row: tuple[str, str, Any]) -> tuple[float, Any]:
        method, path, body = row
        headers = {"Content-Type": "application/json"}
        begun = time.monotonic()
        found = await client.request(method, path, content=sent(body), headers=headers)
        return time.monotonic() - begun, found

    async def everything() -> tuple[list[tuple[float, Any]], Any]:
        transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            found = [await one(client, row) for row in rows]
            alive = await client.post(CHAT, json={"messages": GOOD, "max_tokens": 3})
            return found, alive

    found, alive = asyncio.run(everything())
    wrong = []
    for row, (seconds, response) in zip(rows, found, strict=True):
        name = f"{row[1]} {sent(row[2])[-120:]!r}"
        try:
            error = response.json()["error"]
            fine = set(error) == {"message", "type", "param", "code"} and error["message"]
        except Exception:
            fine = False
        if may_answer and response.status_code == 200:
            fine = True
        elif not 400 <= response.status_code < 500:
            fine = False
        if not fine or seconds > WITHIN:
            wrong.append((name, response.status_code, round(seconds, 2), response.text[:200]))
    assert wrong == []
    assert alive.status_code == 200
    assert service.under_way == 0
    assert service.engine.running == 0


# -- below HTTP ------------------------------------------------------------------------------------


def talk(address: tuple[str, int], *parts: bytes, wait: float = 0.0) -> bytes:
    """What comes back for what is sent, with pauses between the parts."""
    with socket.create_connection(address, timeout=WITHIN) as line:
        for number, part in enumerate(parts):
            if number:
                time.sleep(wait)
            try:
                line.sendall(part)
            except OSError:
                break  # it was answered already
        answer = b""
        try:
            while more := line.recv(65536):
                answer += more
        except ConnectionError:
            pass
        return answer


HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    b"Content-Type: application/json\r\n"
)

LINES = {
    "no HTTP": (b"\x00\x01\x02\r\n\r\n",),
    "a TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200) + b"\r\n\r\n",),
    "a header flood": (b"GET /health HTTP/1.1\r\n", b"X: " + b"a" * 200_000 + b"\r\n\r\n"),
    "many headers": (
        b"GET /health HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(9999)) + b"\r\n",
    ),
    "a long address": (
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    ),
    "a bad length": (HEAD + b"Content-Length: x\r\n\r\n{}",),
    "a negative length": (HEAD + b"Content-Length: -5\r\n\r\n{}",),
    "two lengths": (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",),
    "a bad chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",),
    "a body that is declared too large": (HEAD + b"Content-Length: 99999999999\r\n\r\n",),
    "a body that is too large": (
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
        *[b"4000\r\n" + b" " * 0x4000 + b"\r\n"] * 10,
    ),
    "a body that does not come": (HEAD + b"Content-Length: 50\r\n\r\n", b"{"),
    "a header that does not come": (HEAD,),
    "nothing at all": (b"",),
}


def check_line(name: str, address: tuple[str, int]) -> None:
    """What is hostile below HTTP is answered too."""
    begun = time.monotonic()
    answer = talk(address, *LINES[name], wait=0.1)
    assert time.monotonic() - begun < WITHIN
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 4"), answer[:200]
    assert json.loads(body)["error"]["message"]
    assert httpx.get(f"http://{address[0]}:{address[1]}/health").status_code == 200
