"""A server with exits, over HTTP: answers, depths, metrics, and a request that is refused."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine import stored

MINUTES = 20


@pytest.fixture(scope="module", params=["1", "2"], ids=["alone", "tensor parallel"])
def server(made: Any, request: pytest.FixtureRequest) -> Iterator[str]:
    folder = made("tiny-opt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    added = json.dumps({"offramp": {"exits": str(folder / "export")}})
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(folder / "model"),
        "--port", str(port), "--dtype", "float32", "--max-model-len", "256",
        "--tensor-parallel-size", request.param,
        "--served-model-name", "tiny", "--additional-config", added,
        "--chat-template", str(Path(__file__).parent / "plain.jinja"),
    ]  # fmt: skip
    env = {**os.environ, "VLLM_TARGET_DEVICE": "cpu"}
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    process = subprocess.Popen(command, env=env)
    base = f"http://127.0.0.1:{port}"
    try:
        for _ in range(MINUTES * 60):
            assert process.poll() is None, "the server has ended"
            try:
                urllib.request.urlopen(f"{base}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield base
    finally:
        process.terminate()
        process.wait(60)


def ask(base: str, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{base}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def about(folder: Path, place: int, row: dict[str, Any], **more: Any) -> dict[str, Any]:
    picture = base64.b64encode((folder / "images" / f"{place}.png").read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": row["prompt"]},
    ]
    return {
        "model": "tiny", "messages": [{"role": "user", "content": content}], "temperature": 0,
        "max_tokens": 30, "return_token_ids": True,
        "add_special_tokens": True, **more,  # as the exits' prompts begin
    }  # fmt: skip


def test_a_server_answers_as_offramp_and_tells_depths(server: str, made: Any) -> None:
    folder = made("tiny-opt")
    for mode, extra in (("early_exit", {}), ("full", {"vllm_xargs": {"offramp_mode": "full"}})):
        for place, row in enumerate(stored(folder, mode)[:6]):
            got = ask(server, "/v1/chat/completions", about(folder, place, row, **extra))
            assert got["choices"][0]["token_ids"] == row["tokens"]
            assert got["kv_transfer_params"]["offramp"]["depths"] == row["depths"]
    with urllib.request.urlopen(f"{server}/metrics") as metrics:
        text = metrics.read().decode()
    assert 'offramp:tokens_total{depth="2"}' in text
    assert 'offramp:tokens_total{depth="12"}' in text


def test_what_a_server_has_not_is_a_bad_request(server: str, made: Any) -> None:
    folder = made("tiny-opt")
    row = stored(folder)[0]
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(server, "/v1/chat/completions", about(
            folder, 0, row, vllm_xargs={"offramp_mode": "lossless"}))  # fmt: skip
    assert refused.value.code == 400 and "drafts" in refused.value.read().decode()
