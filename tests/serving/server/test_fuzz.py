"""Requests that nobody wrote: drawn, changed and cut by a seed, whole and as streams.

Each is answered, or refused by an error object; a stream ends as streams do; afterwards nothing is
held. `make fuzz FUZZ=3600 SEED=7` goes on for an hour; a failure names its seed and its number.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import os
import random
import time
from typing import Any

import httpx
import pytest
from hostile import BODIES, CONVERSATIONS, FIELDS, GOOD, TEXTS, URI, URLS, WHOLE, image, sent

from offramp.serving.server.app import create_app
from offramp.serving.server.service import Service
from serving import messages, scene_examples, service_of

SECONDS = float(os.environ.get("OFFRAMP_FUZZ", "0"))
"""0: the first `FEW` requests alone, whatever time they take."""
FEW = 700
SEED = int(os.environ.get("OFFRAMP_FUZZ_SEED", "0"))
PATHS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -0.0,
    -1,
    1,
    0.5,
    5e-324,
    1e-39,
    1e308,
    2**31,
    2**53 + 1,
    2**63,
    -(2**63),
    10**30,
    "",
    " ",
    "\x00",
    "\ufeff",
    "\u202e",
    "\ud800",
    "a" * 3000,
    "<image>",
    [],
    [[]],
    {},
    {"": 0},
    "true",
    "1",
    "NaN",
    "../x",
    "\U0001f600" * 50,
)


def request(draw: random.Random) -> tuple[str, bytes]:
    """One of a few kinds, changed in up to three places."""
    path = draw.choice(PATHS[:2] * 3 + PATHS)
    body: Any = {"messages": GOOD, "max_tokens": draw.randint(1, 6)}
    if path == "/v1/completions":
        body = {"prompt": "Caption:", "images": [URI], "max_tokens": draw.randint(1, 6)}
    elif path == "/tokenize":
        body = draw.choice(({"prompt": "a few words"}, {"messages": GOOD}))
    elif path == "/detokenize":
        body = {"tokens": [draw.randrange(400) for _ in range(draw.randrange(9))]}
    body = copy.deepcopy(body)
    if path in PATHS[:2]:
        body["stream"] = draw.random() < 0.5
        for name in draw.sample(sorted(FIELDS), draw.randrange(3)):
            body[name] = draw.choice((*FIELDS[name], *ODD))
        if draw.random() < 0.2:
            body["n"] = draw.randint(1, 4)
        if draw.random() < 0.2:
            body |= {"logprobs": draw.choice((True, 2)), "top_logprobs": draw.randrange(21)}
        if draw.random() < 0.3:
            body["offramp"] = {"mode": draw.choice(("full", "early_exit", "lossless"))}
        if draw.random() < 0.3:
            body |= {"temperature": draw.uniform(0, 2), "seed": draw.randrange(2**32)}
        if draw.random() < 0.2:
            body["stop"] = draw.choice(("a", "e", [" ", "\n"], "\u00e9"))
    if "messages" in body and draw.random() < 0.3:
        url = draw.choice((*URLS, damaged(draw), damaged(draw)))
        body["messages"] = draw.choice((image(url), draw.choice(CONVERSATIONS[:9])))
    if draw.random() < 0.05:
        return path, draw.choice([b for b in BODIES if isinstance(b, bytes)])
    if draw.random() < 0.05:
        body = draw.choice(TEXTS)
    body = copy.deepcopy(body)  # parts of it are the tables' own
    for _ in range(draw.choice((0, 0, 1, 2))):
        change(body, draw)
    content = sent(body)
    if draw.random() < 0.05:
        cut = draw.randrange(len(content))
        content = content[:cut] + bytes([draw.randrange(256)]) + content[cut + draw.randrange(2) :]
    return path, content


def damaged(draw: random.Random) -> str:
    """An image with a few bytes changed, cut, or said twice."""
    content = bytearray(WHOLE)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(content))
        kind = draw.randrange(3)
        if kind == 0:
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del content[at : at + draw.randint(1, 40)]
        else:
            content[at:at] = content[at : at + draw.randint(1, 400)]
    return "data:image/png;base64," + base64.b64encode(content).decode()


def change(value: Any, draw: random.Random) -> None:
    """Put something odd somewhere."""
    while isinstance(value, dict | list) and value:
        key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if not isinstance(value[key], dict | list) or draw.random() < 0.4:
            value[key] = copy.deepcopy(draw.choice(ODD))
            return
        value = value[key]


def fault(path: str, response: httpx.Response) -> str | None:
    """What is wrong with an answer; None: nothing."""
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        events = [line for line in response.text.split("\n\n") if line]
        if response.status_code != 200 or events[-1] != "data: [DONE]":
            return f"a stream ended with {events[-1:]}"
        chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
        if any("error" in chunk for chunk in chunks):
            return f"a stream failed: {chunks[-1]}"
        ends = [
            c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]
        ]
        return None if ends else "a stream gave no reason to end"
    try:
        value = response.json()
    except ValueError:
        return f"{response.status_code} without JSON"
    if response.status_code == 200:
        return None if "error" not in value else "200 with an error"
    whole = set(value.get("error", ())) == {"message", "type", "param", "code"}
    if not 400 <= response.status_code < 500 or not whole:
        return f"{response.status_code}: {response.text[:300]}"
    return None if len(response.text) < 5000 else f"an error of {len(response.text)} letters"


async def fuzz(service: Service, seconds: float, seed: int) -> tuple[int, dict[int, int]]:
    """Ask for so long, or `FEW` times, eight at once; how often, and the statuses."""
    transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
    end, number, statuses = time.monotonic() + seconds, 0, dict[int, int]()
    headers = {"Content-Type": "application/json"}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://test", timeout=120
    ) as client:

        async def one() -> None:
            nonlocal number
            while number < FEW if not seconds else time.monotonic() < end:
                mine, number = number, number + 1
                path, content = request(random.Random(f"{seed} {mine}"))
                response = await client.post(path, content=content, headers=headers)
                wrong = fault(path, response)
                assert wrong is None, f"seed {seed}, request {mine}: {wrong}: {content[:400]!r}"
                code = response.status_code
                statuses[code] = statuses.get(code, 0) + 1

        await asyncio.gather(*(one() for _ in range(8)))
        alive = await client.post(PATHS[0], json={"messages": GOOD, "max_tokens": 2})
        assert alive.status_code == 200
    return number, statuses


@pytest.mark.slow
def test_whatever_is_drawn_is_answered_or_refused() -> None:
    service = service_of(slots=4, queue=40)
    try:
        number, statuses = asyncio.run(fuzz(service, SECONDS, SEED))
        assert service.under_way == 0 and service.engine.drain(60)
        assert service.engine.running == 0 and service.engine.waiting == 0
        assert service.engine.alive and not service._handles
    finally:
        service.close()
    print(f"{number} requests with seed {SEED}: {dict(sorted(statuses.items()))}")
    assert statuses[200] > 0.05 * number and statuses[400] > 0.05 * number


def test_a_seed_draws_the_same_requests_again() -> None:
    first, again = (
        [request(random.Random(f"3 {number}")) for number in range(40)] for _ in range(2)
    )
    assert first == again and len(set(first)) > 30
    assert messages(scene_examples()[0]) == GOOD
