"""Measure the server over HTTP against its own engine; rewrites lab/records/serving.json.

Models with their exits, by 8 and 32 clients at once that each ask, wait and ask again,
streamed; full, early exit and lossless. Throughput and time to the first token are what the clients
see; the engine's own throughput is that of the same requests handed to
it directly, as many at once, in turns with the server. One thread for the model; a quiet machine
with a core more for the clients: `taskset -c 0,1 python -m offramp_lab.records.serving` (about 8
minutes).

The model is tiny-opt, whose layers take a tenth of a millisecond, the harshest case for what Python
does around them; and the photo model in bfloat16, on photographs. --rounds: of all.
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import httpx
import numpy as np
from PIL import Image

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import MODES
from offramp.data.scenes.tasks import captions
from offramp.features.input_processor import InputProcessor
from offramp.inputs.example import Example
from offramp.serving.batch_engine import BatchEngine
from offramp.serving.engine_config import EngineConfig
from offramp_lab.experiments.experiment import Experiment, each
from offramp_lab.records.record import Record
from offramp_lab.records.subjects import halves, load_photo, photo_exits, tiny_with

RECORD = Record("serving")
CLIENTS, REQUESTS = (8, 32), 96
"""At once; and requests of them all."""
TOKENS = 24
SLOTS, LIMIT, PORT = 8, 256, 8731
TINY = ["offramp.cli", "serve", "tiny-opt"]
OPTIONS: dict[str, Any] = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}


def tiny(arguments: Namespace) -> dict[str, Any]:
    return measure(*tiny_with("opt"), captions("test", 32).examples, TINY, arguments.rounds)


def photo(arguments: Namespace) -> dict[str, Any]:
    exits = photo_exits(arguments.adapter)
    serve = ["offramp.cli", "serve", str(exits), "--backbone", "photo", "--dtype", "bfloat16"]
    model, asked = load_photo(exits, "bfloat16"), halves(arguments.data)[1][-32:]
    return measure(*model, asked, [*serve, "--engine", "torch"], arguments.rounds)


def measure(
    adapter: Adapter,
    encoder: InputProcessor,
    examples: Sequence[Example],
    serve: Sequence[str],
    rounds: int,
) -> dict[str, Any]:
    """An entry of each mode and number of clients; medians over rounds.

    serve: the words behind `python -m`. engine_tokens_per_second: without HTTP; share: of it that
    is left over HTTP. first: seconds, at p50 and p95.
    """
    bodies, config = requests_of(examples), EngineConfig(SLOTS, LIMIT)
    points = [*itertools.product(MODES, CLIENTS)]
    with Server(serve) as server, BatchEngine(adapter, encoder, config) as engine:

        def http(_: None, mode: str, clients: int) -> dict[str, Any]:
            return asyncio.run(clients_at_work(server.url, mode, clients, bodies))

        def alone(_: None, mode: str, clients: int) -> float:
            return engine_alone(engine, examples, mode, clients)

        ways = {
            (way, *point): partial(way, mode=point[0], clients=point[1])
            for point in points
            for way in (http, alone)
        }
        runs = Experiment(ways, rounds=rounds).run()
    entries = []
    for point in points:
        seen, own = (each(runs[way, *point]) for way in (http, alone))
        speed = median(one["tokens"] / one["seconds"] for one in seen)
        first = np.percentile([seconds for one in seen for seconds in one["first"]], (50, 95))
        entries.append(
            {
                **dict(zip(("mode", "clients"), point, strict=True)),
                "requests": REQUESTS,
                "tokens_per_second": speed,
                "engine_tokens_per_second": median(own),
                "share": speed / median(own),
                "first": dict(zip(("p50", "p95"), first.tolist(), strict=True)),
            }
        )
    return {
        "slots": SLOTS,
        "tokens": TOKENS,
        "rounds": rounds,
        "start_seconds": server.started,
        "entries": entries,
    }


# -- over HTTP -------------------------------------------------------------------------------------


class Server:
    """`offramp serve` in a process of its own. started: seconds until it was ready."""

    def __init__(self, serve: Sequence[str]) -> None:
        self.url, self._begun = f"http://127.0.0.1:{PORT}", time.perf_counter()
        how = f"--port {PORT} --threads 1 --watch 0 --slots {SLOTS} --limit {LIMIT}"
        command = [sys.executable, "-m", *serve, *how.split()]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        self.started = 0.0

    def __enter__(self) -> Server:
        until_ready(self.process, f"{self.url}/ready")
        self.started = time.perf_counter() - self._begun
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()


def until_ready(process: subprocess.Popen[bytes], address: str) -> None:
    """Wait until a server answers at this address. Raise `SystemExit` if its process ends."""
    while process.poll() is None:
        try:
            httpx.get(address, timeout=1).raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(0.05)
    raise SystemExit("The server did not start.")


def image_part(image: Image.Image) -> dict[str, Any]:
    """Of a message: the image itself."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def requests_of(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """As streamed chats with their images."""
    how = {
        "temperature": 0,
        "max_completion_tokens": TOKENS,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    contents = [
        [image_part(example.open_image()), {"type": "text", "text": example.prompt}]
        for example in examples
    ]
    return [{"messages": [{"role": "user", "content": each}], **how} for each in contents]


async def clients_at_work(
    url: str, mode: str, clients: int, bodies: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What `clients` at once see over `REQUESTS`, after one each that does not count."""
    firsts: list[float] = []
    left = iter(range(REQUESTS))
    tokens = 0
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:

        async def ask(number: int, count: bool) -> None:
            nonlocal tokens
            body = {**bodies[number % len(bodies)], "offramp": {"mode": mode}}
            begun, heard = time.perf_counter(), False
            chat = f"{url}/v1/chat/completions"
            async with client.stream("POST", chat, json=body) as answer:
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line[6:])
                    if not count:
                        continue
                    if chunk.get("usage"):
                        tokens += chunk["usage"]["completion_tokens"]
                    if not heard and any(
                        choice["delta"].get("content") for choice in chunk["choices"]
                    ):
                        heard = True
                        firsts.append(time.perf_counter() - begun)

        async def one() -> None:
            for number in left:
                await ask(number, True)

        await asyncio.gather(*(ask(number, False) for number in range(min(clients, SLOTS))))
        begun = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(clients)))
        seconds = time.perf_counter() - begun
    return {"tokens": tokens, "seconds": seconds, "first": firsts}


# -- the engine alone ------------------------------------------------------------------------------


def engine_alone(
    engine: BatchEngine, examples: Sequence[Example], mode: str, clients: int
) -> float:
    """Tokens a second of the engine with so many requests under way at once; images are opened and
    prompts processed in its worker threads, as in the server."""

    def tokens(count: int) -> int:
        asked = itertools.islice(itertools.cycle(examples), count)
        answers = engine.map(asked, ahead=clients, mode=mode, **OPTIONS)
        return sum(handle.result().output.depths.shape[1] for _, handle in answers)

    tokens(min(clients, SLOTS))  # these do not count
    begun = time.perf_counter()
    return tokens(REQUESTS) / (time.perf_counter() - begun)


if __name__ == "__main__":
    RECORD.run(__doc__, {"tiny-opt": tiny, "photo model": photo}, photo=True, rounds=3)
