"""Measure the server over HTTP against its own engine; rewrites benchmarks/records/serving.json.

The shipped model with its exits, in this process, by 1, 2, 4, 8, 16 and 32 clients at once that
each ask, wait and ask again, streamed; full, early exit and lossless. Throughput, time to the first
token and the gaps between tokens are what the clients see; the engine's own throughput is that of
the same requests handed to it directly, as many at once. One thread for the model; a quiet machine
with a core more for the clients: `taskset -c 0,1 python -m benchmarks.serving` (about 12 minutes).

--requests: for each number of clients and mode. --clients: numbers of clients.
"""

import argparse
import asyncio
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from offramp.adapter import Adapter
from offramp.models.input_processor import InputProcessor
from offramp.models.shipped import load_tiny, tiny_exits
from offramp.provenance import provenance
from offramp.research.scenes.tasks import captions
from offramp.serving.batch_engine import BatchEngine
from offramp.serving.core import EngineConfig
from offramp.storage import read_json, write_json

RECORD = Path(__file__).parent / "records" / "serving.json"
MODES = ("full", "early_exit", "lossless")
CLIENTS = (1, 2, 4, 8, 16, 32)
TOKENS = 24
SLOTS = 8
OPTIONS: dict[str, Any] = {
    "max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Of one mode and number of clients. engine: tokens a second without HTTP. share: of it that
    is left over HTTP. first, gap: seconds, at p50 and p95."""

    mode: str
    clients: int
    requests: int
    tokens_per_second: float
    engine_tokens_per_second: float
    share: float
    first: dict[str, float]
    gap: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS))
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--out", type=Path, default=RECORD)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bodies = requests_of(min(32, arguments.requests))
    with Server() as server:
        started, first = server.started, first_token(server.url, bodies[0])
        over_http = {
            (mode, clients): asyncio.run(
                clients_at_work(server.url, mode, clients, arguments.requests, bodies)
            )
            for mode, clients in itertools.product(arguments.modes, arguments.clients)
        }
    own = engine_alone(arguments)
    entries = []
    for (mode, clients), measured in over_http.items():
        speed = measured["tokens"] / measured["seconds"]
        entry = Entry(
            mode, clients, arguments.requests, speed, own[mode, clients],
            speed / own[mode, clients], spread(measured["first"]), spread(measured["gaps"]),
        )  # fmt: skip
        entries.append(asdict(entry))
        print(
            f"{mode:>10} {clients:>3} clients: {speed:7.1f} tokens/s, engine alone "
            f"{entry.engine_tokens_per_second:7.1f} ({entry.share:.2f}); first token "
            f"{1000 * entry.first['p50']:.0f} ms, gap {1000 * entry.gap['p50']:.1f} ms",
            flush=True,
        )
    record = read_json(arguments.out) if arguments.out.is_file() else {}
    record["http"] = {
        "model": "tiny-opt", "slots": SLOTS, "tokens": TOKENS, "start_seconds": started,
        "first_token_seconds": first, "load": os.getloadavg(), "entries": entries,
    }  # fmt: skip
    record["provenance"] = provenance(0, ["benchmarks.serving"], None)
    write_json(arguments.out, record)


# -- over HTTP -------------------------------------------------------------------------------------


class Server:
    """`offramp serve tiny-opt` in a process of its own. started: seconds until it was ready."""

    def __init__(self, *more: str, port: int = 8731) -> None:
        self.url, self._begun = f"http://127.0.0.1:{port}", time.perf_counter()
        words = ["serve", "tiny-opt", "--port", str(port), "--threads", "1", "--watch", "0"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "offramp.cli", *words, "--slots", str(SLOTS), *more],
            stderr=subprocess.DEVNULL,
        )
        self.started = 0.0

    def __enter__(self) -> "Server":
        while not self.started:
            if self.process.poll() is not None:
                raise SystemExit("The server did not start.")
            try:
                httpx.get(f"{self.url}/ready", timeout=1).raise_for_status()
                self.started = time.perf_counter() - self._begun
            except httpx.HTTPError:
                time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()


def requests_of(n: int) -> list[dict[str, Any]]:
    """Captions of the shipped model's world, as chats."""
    from base64 import b64encode
    from io import BytesIO

    bodies = []
    for example in captions("test", n).examples:
        buffer = BytesIO()
        example.open_image().save(buffer, "PNG")
        url = "data:image/png;base64," + b64encode(buffer.getvalue()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": example.prompt},
        ]
        bodies.append(
            {
                "messages": [{"role": "user", "content": content}], "temperature": 0,
                "max_completion_tokens": TOKENS, "ignore_eos": True, "stream": True,
                "stream_options": {"include_usage": True},
            }
        )  # fmt: skip
    return bodies


def first_token(url: str, body: dict[str, Any]) -> float:
    """Seconds to the first token of a server that has just started; the first request of all."""
    begun = time.perf_counter()
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            if '"content":' in line and '"content":""' not in line:
                return time.perf_counter() - begun
    raise SystemExit("The server answered nothing.")


async def clients_at_work(
    url: str, mode: str, clients: int, requests: int, bodies: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What `clients` at once see over `requests` requests, after one each that does not count."""
    firsts: list[float] = []
    gaps: list[float] = []
    left = iter(range(requests))
    tokens = 0
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:

        async def ask(number: int, count: bool) -> None:
            nonlocal tokens
            body = {**bodies[number % len(bodies)], "offramp": {"mode": mode}}
            begun = last = time.perf_counter()
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
                    if any(choice["delta"].get("content") for choice in chunk["choices"]):
                        now = time.perf_counter()
                        (firsts if last == begun else gaps).append(now - last)
                        last = now

        async def one() -> None:
            for number in left:
                await ask(number, True)

        await asyncio.gather(*(ask(number, False) for number in range(min(clients, SLOTS))))
        begun = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(clients)))
        seconds = time.perf_counter() - begun
    return {"tokens": tokens, "seconds": seconds, "first": firsts, "gaps": gaps}


def spread(values: Sequence[float]) -> dict[str, float]:
    return {f"p{p}": float(np.percentile(values, p)) for p in (50, 95)}


# -- the engine alone ------------------------------------------------------------------------------


def engine_alone(arguments: argparse.Namespace) -> dict[tuple[str, int], float]:
    """Tokens a second of the engine, by mode and requests under way at once; the images are opened
    and the prompts processed in its worker threads, as the server does."""
    backbone, processor = load_tiny("opt")
    adapter = Adapter.from_pretrained(backbone, tiny_exits("opt"))
    examples = captions("test", min(32, arguments.requests)).examples
    speeds = {}
    config = EngineConfig(SLOTS, 256)
    with BatchEngine(adapter, InputProcessor(backbone, processor), config) as engine:
        for mode, clients in itertools.product(arguments.modes, arguments.clients):
            seconds, tokens = 0.0, 0
            for requests, count in ((min(clients, SLOTS), False), (arguments.requests, True)):
                begun = time.perf_counter()
                under_way: set[Any] = set()
                written = 0
                for number in range(requests):
                    if len(under_way) >= clients:
                        done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                        written += sum(h.result().output.depths.shape[1] for h in done)
                    example = examples[number % len(examples)]
                    under_way.add(engine.submit(example, mode=mode, wait=True, **OPTIONS))
                written += sum(h.result().output.depths.shape[1] for h in under_way)
                if count:
                    seconds, tokens = time.perf_counter() - begun, written
            speeds[mode, clients] = tokens / seconds
    return speeds


if __name__ == "__main__":
    main()
