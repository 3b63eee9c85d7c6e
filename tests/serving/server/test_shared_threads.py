"""Laws of what requests share: threads, places and time; nobody's prompt holds up another's."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from offramp.serving.server.app import create_app
from offramp.serving.server.config import ImageLimits
from offramp.serving.server.service import Service
from serving import asking, data_uri, messages, running, scene_examples, service_of

CHAT = "/v1/chat/completions"
WITHIN = 60.0
"""Seconds; a machine that others use too."""
GOOD = messages(scene_examples()[0])


@pytest.fixture
def service() -> Iterator[Service]:
    found = service_of(slots=2, queue=4)
    yield found
    found.close()


class Slow:
    """A tokenizer that works until it is let go."""

    def __init__(self, service: Service) -> None:
        self._own, self.go = service.tokenizer, threading.Event()
        self.under_way = self.calls = 0
        service.tokenizer = self

    def __len__(self) -> int:
        return len(self._own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def __call__(self, *args: Any, **more: Any) -> Any:
        self._work()
        return self._own(*args, **more)

    def decode(self, tokens: Any, **more: Any) -> Any:
        if len(tokens) == 3:  # else it is of an answer
            self._work()
        return self._own.decode(tokens, **more)

    def _work(self) -> None:
        self.calls += 1
        assert self.go.wait(WITHIN)


ROUTES = [("/tokenize", {"prompt": "a word"}), ("/detokenize", {"tokens": [5, 6, 7]})]


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_texts_are_let_in_as_completions_are_and_hold_up_none(
    path: str, body: dict[str, Any], service: Service
) -> None:
    slow = Slow(service)

    async def everything() -> tuple[list[int], int, list[int]]:
        transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            texts = [asyncio.ensure_future(client.post(path, json=body)) for _ in range(5)]
            while service.under_way < 5:
                await asyncio.sleep(0.01)
            chat = await client.post(CHAT, json={"messages": GOOD, "max_tokens": 1})
            late = [asyncio.ensure_future(client.post(path, json=body)) for _ in range(5)]
            refused = [(await done).status_code for done in late[1:]]
            slow.go.set()
            return (
                [(await done).status_code for done in texts],
                chat.status_code,
                [*refused, (await late[0]).status_code],
            )

    texts, chat, late = asyncio.run(everything())
    assert (texts, chat) == ([200] * 5, 200)
    assert late == [429, 429, 429, 429, 200]
    assert service.under_way == 0


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_texts_are_timed_as_completions_are(path: str, body: dict[str, Any]) -> None:
    service = service_of(slots=1, seconds=0.3)
    slow = Slow(service)
    try:
        found = asking(service).post(path, json=body)
        assert (found.status_code, found.json()["error"]["code"]) == (504, "timeout")
        assert service.under_way == 0
    finally:
        slow.go.set()
        service.close()


@pytest.mark.slow
def test_a_million_tokens_do_not_hold_up_the_loop(service: Service) -> None:
    text = "\U0001f600" * 400_000

    async def everything() -> tuple[Any, float]:
        transport = httpx.ASGITransport(create_app(service))
        longest = 0.0
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            asked = asyncio.ensure_future(
                client.post("/tokenize", json={"prompt": text}, timeout=WITHIN)
            )
            while service.under_way == 0 and not asked.done():
                await asyncio.sleep(0)
            while not asked.done():
                begun = time.thread_time()
                await asyncio.sleep(0)
                longest = max(longest, time.thread_time() - begun)
                await asyncio.sleep(0.001)
            return await asked, longest

    found, longest = asyncio.run(everything())
    assert found.json()["count"] == 1_600_002
    assert longest < 0.3


def test_requests_for_token_ids_are_small(service: Service) -> None:
    client = asking(service)
    assert client.post("/detokenize", content=b" " * 3_000_000).status_code == 413
    assert client.post("/detokenize", json={"tokens": [5] * 100_000}).status_code == 200


# -- images ----------------------------------------------------------------------------------------


def test_more_images_than_the_model_takes_are_refused_before_one_is_decoded(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bytes] = []
    monkeypatch.setattr(type(service.images), "decode", lambda self, file: decoded.append(file))
    large = data_uri(Image.new("1", (5000, 4000)))
    part = {"type": "image_url", "image_url": {"url": large}}
    chat = {"messages": [{"role": "user", "content": [part] * 8}]}
    for path, body in ((CHAT, chat), ("/v1/completions", {"prompt": "x", "images": [large] * 8})):
        found = asking(service).post(path, json=body)
        assert (found.status_code, found.json()["error"]["code"]) == (400, "too_many_images")
        assert "takes one image" in found.json()["error"]["message"]
    assert decoded == []


@pytest.mark.parametrize("gone", [False, True])
def test_nobodys_images_are_not_decoded_to_the_end(
    gone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a request whose time is over, or whose client has gone, no further image is decoded."""
    service = service_of(slots=1, seconds=WITHIN if gone else 0.3)
    decoded: list[int] = []
    go = threading.Event()

    def decode(self: Any, file: bytes) -> Any:
        decoded.append(len(file))
        assert go.wait(WITHIN)

    monkeypatch.setattr(type(service.images), "decode", decode)
    monkeypatch.setattr(service.prompter.processor, "check_images", lambda _: None)
    part = GOOD[0]["content"][0]
    body = {"messages": [{"role": "user", "content": [part] * 8}]}
    try:
        if gone:
            with running(service) as url:
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(url + CHAT, json=body, timeout=0.5)
                end = time.monotonic() + WITHIN
                while service.under_way and time.monotonic() < end:
                    time.sleep(0.01)
        else:
            assert asking(service).post(CHAT, json=body).status_code == 504
        assert service.under_way == 0
    finally:
        go.set()
        service.close()
    service._pool.shutdown(wait=True)
    assert len(decoded) == 1


# -- odd values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1e-39, 5e-324, 1e-10, 0.0099, 10.01, 1e39, -0.0])
def test_penalties_that_make_infinities_are_refused(value: float, service: Service) -> None:
    body = {"messages": GOOD, "max_tokens": 3, "repetition_penalty": value}
    assert asking(service).post(CHAT, json=body).status_code == 400


EXTREMES: dict[str, list[Any]] = {
    "repetition_penalty": [0.01, 10],
    "temperature": [5e-324, 1e-39, 1e-4, 1.0001e-4, 2],
    "top_p": [5e-324, 1e-39, 1e-8, 1],
    "top_k": [-1, 0, 1, 2**31 - 1],
    "presence_penalty": [-2, 2, 1e-320],
    "frequency_penalty": [-2, 2, 1e-320],
    "seed": [-(2**63), -1, 0, 2**63 - 1],
    "n": [1, 6],
    "max_tokens": [1, 200],
}


MODES = ("full", "early_exit", "lossless")
OTHERS = ({}, {"temperature": 1e-4, "repetition_penalty": 0.01}, {"temperature": 2})


@pytest.mark.slow
@pytest.mark.parametrize("field", EXTREMES)
def test_extremes_that_are_allowed_are_answered(field: str, service: Service) -> None:
    """Each in every mode, and beside others."""
    for number, value in enumerate(EXTREMES[field]):
        for mode, more in zip(MODES, (OTHERS * 2)[number % 3 :], strict=False):
            body = {"messages": GOOD, "max_tokens": 3, "seed": 1, **more, "offramp": {"mode": mode}}
            found = asking(service).post(CHAT, json={**body, field: value})
            assert found.status_code == 200, (field, value, found.text)


def test_odd_files_of_the_folder_look_like_missing_ones(tmp_path: Path) -> None:
    import os
    import socket

    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a").symlink_to(folder / "b")
    (folder / "b").symlink_to(folder / "a")
    (folder / "self").symlink_to("self")
    (folder / "up").symlink_to(folder)
    (folder / "device").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as line:
        line.bind(str(folder / "line"))
    service = service_of(slots=1, images=ImageLimits(folder=folder, bytes=1000))
    (folder / "large").write_bytes(bytes(1001))
    client = asking(service)
    try:
        names = (
            "a",
            "b",
            "self",
            "self/x",
            "up",
            "up/" * 50 + "x",
            "device",
            "pipe",
            "line",
            "x" * 300,
            "%ff",
            "%00",
            "%ED%A0%80",
            "a/b/c",
            "",
        )
        said = set()
        for name in names:
            part = {"type": "image_url", "image_url": {"url": f"file://{folder}/{name}"}}
            text = {"type": "text", "text": "Caption:"}
            body = {"messages": [{"role": "user", "content": [part, text]}]}
            found = client.post(CHAT, json=body)
            said.add((found.status_code, found.json()["error"]["message"]))
        assert said == {(404, "There is no such image in the server's folder.")}
        part["image_url"]["url"] = f"file://{folder}/large"  # type: ignore[index]
        assert client.post(CHAT, json=body).status_code == 413
    finally:
        service.close()


# -- an engine that has ended ----------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_health_says_that_the_engine_has_failed(stream: bool) -> None:
    service = service_of(slots=1)
    client = asking(service)
    body = {"messages": GOOD, "max_tokens": 20, "stream": stream}
    try:
        assert client.get("/health").status_code == 200

        def fails(*_: Any) -> None:
            raise RuntimeError("lost")

        service.engine.core.decoder.leave = fails  # type: ignore[method-assign]
        found = client.post(CHAT, json=body)
        assert "has failed" in found.text or "RuntimeError" in found.text
        service.engine._thread.join(WITHIN)
        assert client.get("/health").status_code == 503
        assert client.get("/ready").status_code == 503
        found = client.post(CHAT, json=body)
        assert (found.status_code, found.json()["error"]["code"]) == (503, "unavailable")
        assert service.under_way == 0
    finally:
        service.close()
