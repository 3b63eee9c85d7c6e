"""photo-chat with photographs, inside vLLM and in offramp's own engine; rewrites vllm-chat.json.

    python vllm/benchmarks/record_chat.py --vllm .venv-vllm/bin/python

`offramp serve photo-chat --engine vllm` answers over HTTP, several requests at once: of each
held-out photograph a question, a second one after the answer to the first, and a caption. Counted
are answers whose tokens are those of `offramp.generate`; where tokens leave early, depths too.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

import offramp
from offramp.features.input_processor import turn_of
from offramp_lab.experiments.experiment import bar
from offramp_lab.records.record import Record, asked
from offramp_lab.records.serving import image_part, until_ready
from offramp_lab.records.subjects import halves, text_of

RECORD = Record("vllm-chat", "vllm/benchmarks/record_chat.py")
NAME, THRESHOLD = "photo-chat", 0.9
OPTIONS: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
QUESTIONS = "What is the person or animal doing?", "Where is that?"
MODES: dict[str, dict[str, Any]] = {
    "full depth": {"offramp_mode": "full"},
    "lossless": {},
    "early exit": {"offramp_threshold": THRESHOLD},
}
Turns = list[dict[str, Any]]
Answer = tuple[list[int], list[int]]
"""Tokens, and where they leave early the depth of each."""


def main() -> None:
    arguments = asked(__doc__, data=True, vllm=Path, photographs=100, at_once=8)
    pictures = [e.open_image() for e in halves(arguments.data)[1][: arguments.photographs]]
    turns, said = own(pictures)
    asked_of = [(mode, place) for mode in MODES for place in range(len(turns))]
    with server(arguments.vllm) as url, ThreadPoolExecutor(arguments.at_once) as pool:
        served = pool.map(
            lambda one: answer(url, turns[one[1]], pictures[one[1] // 3], MODES[one[0]]), asked_of
        )
        found = list(bar("vLLM")(served))
    same = dict.fromkeys(MODES, 0)
    for (mode, place), (tokens, depths) in zip(asked_of, found, strict=True):
        want = said["early exit" if mode == "early exit" else "full depth"][place]
        early = mode == "early exit"
        same[mode] += tokens == want[0] and (depths == want[1] or not early)
    left = sum(depth < max(d) for _, d in said["early exit"] for depth in d)
    RECORD.write(
        {
            "photographs": len(pictures),
            "answers": len(turns),
            "at_once": arguments.at_once,
            "threshold": THRESHOLD,
            "some_left_early": left > 0,
            "same": same,
            **OPTIONS,
        }
    )


def own(pictures: Sequence[Image.Image]) -> tuple[list[Turns], dict[str, list[Answer]]]:
    """Three conversations about each picture, and what `offramp.generate` answers by mode."""
    loaded = offramp.load(NAME, engine="torch", vision="torch")
    adapter, encoder = loaded.adapter, loaded.encoder
    depths = adapter.exits.depths
    early = adapter.policy.asked("early_exit", dict.fromkeys(depths, THRESHOLD), depths)
    policies = {"full depth": adapter.policy.in_mode("full"), "early exit": early}
    turns: list[Turns] = []
    said: dict[str, list[Answer]] = {mode: [] for mode in policies}

    def asks(one: Turns, picture: Image.Image) -> list[int]:
        inputs = encoder.of_text(encoder.conversation_text(one), [picture])
        for mode, policy in policies.items():
            made = adapter.generate(dict(inputs), policy=policy, **OPTIONS)
            said[mode].append((made.new_tokens[0].tolist(), made.depths[0].tolist()))
        turns.append(one)
        return said["full depth"][-1][0]

    asks(shown("Caption:"), pictures[0])  # an engine is tried on its first answer
    for of_mode in (turns, *said.values()):
        of_mode.clear()
    for picture in bar("offramp")(pictures):
        first = shown(QUESTIONS[0])
        answered = turn_of("assistant", text_of(encoder, asks(first, picture)))
        asks([*first, answered, turn_of("user", QUESTIONS[1])], picture)
        asks(shown("Caption:"), picture)
    return turns, said


def shown(text: str) -> Turns:
    return [turn_of("user", text, sees=True)]


@contextmanager
def server(python: Path) -> Iterator[str]:
    """The address of a server of vLLM's. python: of its environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "offramp.cli", "serve", NAME, "--engine", "vllm"]
    env = {**os.environ, "OFFRAMP_VLLM_PYTHON": str(python.absolute()), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*words, "--port", str(port)], env=env)
    url = f"http://127.0.0.1:{port}"
    try:
        until_ready(process, f"{url}/health")
        yield url
    finally:
        process.terminate()
        process.wait(60)


def answer(url: str, turns: Turns, picture: Image.Image, settings: Mapping[str, Any]) -> Answer:
    part = image_part(picture)
    messages = [
        {**turn, "content": [part if p["type"] == "image" else p for p in turn["content"]]}
        for turn in turns
    ]
    body = {
        "model": NAME,
        "messages": messages,
        "temperature": 0,
        "max_tokens": OPTIONS["max_new_tokens"],
        "return_token_ids": True,
        "vllm_xargs": settings,
    }
    where, kind = f"{url}/v1/chat/completions", {"Content-Type": "application/json"}
    request = urllib.request.Request(where, json.dumps(body).encode(), kind)
    with urllib.request.urlopen(request, timeout=600) as reply:
        [choice] = json.load(reply)["choices"]
    return choice["token_ids"], choice["offramp"]["depths"]


if __name__ == "__main__":
    main()
