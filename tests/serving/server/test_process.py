"""Laws of the server's process: it starts, and told to stop it ends what it has begun."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from command_line import RunCommand, assert_two_lines

from offramp.core.errors import InputError
from offramp.serving.server.config import ServerConfig
from serving import NAME, messages, running, scene_examples, service_of

CHAT = "/v1/chat/completions"

WITHIN = 240.0
"""Seconds that anything may take on a machine that others use too."""


class Process:
    """`offramp serve tiny-opt`, with its log."""

    def __init__(self, log: Path, *more: str) -> None:
        self.port = free_port()
        words = ["serve", "tiny-opt", "--port", str(self.port), "--threads", "1", *more]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "offramp.cli", *words],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        self.url = f"http://127.0.0.1:{self.port}"

    def wait_until_ready(self) -> None:
        end = time.monotonic() + WITHIN
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if httpx.get(f"{self.url}/ready", timeout=5).is_success:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        raise AssertionError(self.log.read_text())


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Process]:
    found = Process(tmp_path / "log", "--drain", "200")
    yield found
    found.process.kill()
    found.process.wait()


def body(tokens: int, **more: Any) -> dict[str, Any]:
    return {
        "messages": messages(scene_examples()[0]),
        "max_completion_tokens": tokens,
        "ignore_eos": True,
        "offramp": {"mode": "full"},
        "stream": True,
        **more,
    }


def streamed(url: str, asked: dict[str, Any]) -> tuple[threading.Thread, list[str]]:
    """A client that reads a streamed answer, and its lines so far: one at least."""
    begun, lines = threading.Event(), list[str]()

    def client() -> None:
        with httpx.stream("POST", url, json=asked, timeout=WITHIN) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                begun.set()

    thread = threading.Thread(target=client)
    thread.start()
    assert begun.wait(WITHIN)
    return thread, lines


@pytest.mark.slow
def test_sigterm_lets_answers_end_and_takes_no_new_ones(server: Process) -> None:
    server.wait_until_ready()
    chat = server.url + CHAT
    thread, pieces = streamed(chat, body(60))
    server.process.send_signal(signal.SIGTERM)
    with pytest.raises((httpx.TransportError, httpx.HTTPStatusError)):
        while True:  # until the signal has come; then neither taken nor connected
            httpx.post(chat, json=body(1, stream=False), timeout=10).raise_for_status()
    thread.join(WITHIN)
    assert server.process.wait(WITHIN) == 0
    rows = [json.loads(line[6:]) for line in pieces if line.startswith("data: {")]
    assert rows[-1]["choices"][0]["finish_reason"] == "length"
    assert "data: [DONE]" in pieces
    log = server.log.read_text()
    assert "Traceback" not in log
    logged = [json.loads(line) for line in log.splitlines() if line.startswith('{"request_id"')]
    assert 60 in [row.get("completion_tokens") for row in logged]
    assert "base64" not in log


def test_what_the_drain_does_not_wait_for_ends_with_an_error_object() -> None:
    service = service_of(drain_seconds=0.1)
    with running(service) as url:
        thread, lines = streamed(url + CHAT, body(230))
        service.engine.core.clock = lambda: time.sleep(0.02) or time.perf_counter()  # a slow model
    thread.join(WITHIN)
    assert not thread.is_alive()
    events = [line for line in lines if line]
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2][6:])["error"]["code"] == "stopping"


@pytest.mark.parametrize(
    ("host", "option"),
    [
        ("127.0.0.1", "--port"),
        ("no such host", "--host"),
        ("\u00e9" * 100, "--host"),
        ("192.0.2.1", "--host"),
    ],
)
def test_an_address_that_cannot_be_had_is_two_lines_before_a_model_loads(
    host: str, option: str, run: RunCommand
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = run("serve", "tiny-opt", "--host", host, "--port", port)
    assert_two_lines(found, "cannot listen", option)


@pytest.mark.parametrize(
    "words", [("--drain", "inf"), ("--timeout", "1e400"), ("--watch", "slack=inf")]
)
def test_numbers_that_nothing_runs_with_are_two_lines_before_a_model_loads(
    words: tuple[str, str], run: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offramp.cli.commands.serve.loaded", None)
    assert_two_lines(run("serve", "tiny-opt", "--port", 0, *words), "Give")


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["seconds", "body_seconds", "send_seconds", "drain_seconds"])
def test_a_time_without_an_end_is_refused(name: str, wrong: float) -> None:
    with pytest.raises(InputError, match=name):
        ServerConfig(NAME, **{name: wrong})
