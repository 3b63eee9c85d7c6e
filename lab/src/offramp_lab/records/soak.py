"""Soak the server: many clients for hours, some rude; what they saw goes into
lab/records/soak.json.

32 clients ask about images from 1 pixel to the limit; 10% go away in the middle of an answer, 5%
send a bad request, some sample. Recorded is every status that was not the client's own fault, the
server's memory before the first request, at its peak and after the last one, and whether answers
are those of the same requests asked one by one afterwards. `make soak` takes a night (eight hours);
`make soak SOAK=600` ten minutes, and two for the answers.

--seconds: how long. --clients: how many.
"""

import asyncio
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from offramp.data.scenes.tasks import captions
from offramp.engine.policy import MODES
from offramp_lab.records.record import Record, asked
from offramp_lab.records.serving import Server, image_part

RECORD = Record("soak")
SIDES = (1, 2, 17, 72, 300, 1000, 2000)
LIMIT = SIDES[-1] ** 2
BAD: tuple[dict[str, Any], ...] = (
    {"temperature": 9}, {"messages": []}, {"nonsense": 1}, {"max_completion_tokens": 10**6},
    {"messages": [{"role": "user", "content": "no image"}]}, {"model": "other"},
)  # fmt: skip
CHAT = "/v1/chat/completions"


def main() -> None:
    arguments = asked(__doc__, seconds=600.0, clients=32, out=RECORD.path)
    more = ("--image-limits", f"pixels={LIMIT}", "--queue", str(4 * arguments.clients))
    with Server(*more) as server:
        figures = asyncio.run(soak(server, arguments.clients, arguments.seconds))
    print(figures)
    RECORD.write({**figures, "load": os.getloadavg()}, arguments.out)


def bodies() -> list[dict[str, Any]]:
    """Good requests: images of all sizes, greedy and sampled, in all modes."""
    draw = random.Random(0)
    rows = []
    for number, example in enumerate(captions("test", 28).examples):
        side = SIDES[number % len(SIDES)]
        image = example.open_image().resize((side, side), Image.Resampling.BILINEAR)
        kind = "JPEG" if number % 2 else "PNG"
        content = [{"type": "text", "text": "Caption:"}, image_part(image, kind)]
        mode = draw.choice(MODES)
        rows.append(
            {
                "messages": [{"role": "user", "content": content}],
                "seed": number,
                "temperature": 1.0 if number % 3 == 0 else 0,
                "offramp": {"mode": mode},
                "max_completion_tokens": draw.randint(1, 40),
            }
        )
    return rows


async def soak(server: Server, clients: int, seconds: float) -> dict[str, Any]:
    """What was seen in so many seconds."""
    good, statuses = bodies(), Counter[str]()
    seen: dict[int, str] = {}
    wrong: list[str] = []
    start = resident(server.process.pid)  # nothing was asked yet
    end = time.monotonic() + seconds
    async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:

        async def one(number: int) -> None:
            draw = random.Random(number)
            while time.monotonic() < end:
                at = draw.randrange(len(good))
                what = draw.random()
                try:
                    if what < 0.10:
                        await leave_early(client, good[at], draw.random())
                        statuses["left"] += 1
                    elif what < 0.15:
                        answer = await client.post(CHAT, json={**good[at], **draw.choice(BAD)})
                        statuses[f"bad_{answer.status_code}"] += 1
                        if not 400 <= answer.status_code < 500:
                            wrong.append(f"a bad request was answered {answer.status_code}")
                    else:
                        answer = await client.post(CHAT, json=good[at])
                        statuses[f"good_{answer.status_code}"] += 1
                        if answer.status_code != 200:
                            wrong.append(answer.text[:200])
                            continue
                        text = answer.json()["choices"][0]["message"]["content"]
                        if seen.setdefault(at, text) != text:
                            wrong.append(f"request {at} was answered differently")
                except httpx.HTTPError as error:
                    wrong.append(repr(error))

        await asyncio.gather(*map(one, range(clients)))
        for at, text in seen.items():  # one by one, with nobody else there
            answer = await client.post(CHAT, json=good[at])
            if answer.json()["choices"][0]["message"]["content"] != text:
                wrong.append(f"request {at} is answered differently alone")
    memory_mib = {
        "start": start,
        "peak": peak(server.process.pid),
        "end": resident(server.process.pid),
    }
    return {
        "seconds": seconds, "clients": clients, "requests": dict(sorted(statuses.items())),
        "faults": wrong[:20], "faults_in_all": len(wrong), "compared": len(seen),
        "memory_mib": memory_mib,
    }  # fmt: skip


async def leave_early(client: httpx.AsyncClient, body: dict[str, Any], share: float) -> None:
    """Read a part of a stream, and go."""
    async with client.stream("POST", CHAT, json={**body, "stream": True}) as answer:
        answer.raise_for_status()
        pieces = 0
        async for _ in answer.aiter_raw():
            pieces += 1
            if pieces > 10 * share:
                return


def resident(process: int | str = "self") -> float:
    """MiB of memory that a process holds."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak(process: int | str = "self") -> float:
    """MiB of memory that a process ever held."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
