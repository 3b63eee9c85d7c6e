"""Laws of requests unlike the calibrated ones: they are named, counted and, if asked for, answered
losslessly, and no others are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from offramp.data.scenes import tasks
from offramp.promises.guarantee import Promise
from offramp.promises.likeness import Likeness
from offramp.promises.verdict import NONE, Verdict
from offramp.serving.engine_config import EngineConfig
from offramp.serving.monitor.watch_config import WatchConfig
from offramp.serving.server.api.replies import Reply, Written
from offramp.serving.server.config import ServerConfig
from offramp.serving.server.pytorch import service_of
from offramp.serving.server.service import Service
from serving import NAME, asking, messages, shipped

PHOTO = Image.effect_noise((72, 72), 90).convert("RGB")


def service_with(unlike: str, **more: Any) -> Service:
    """Of exits whose calibrated answers were all rather sure."""
    adapter, processor = shipped()
    kept = Likeness.of([[0.97]] * 400 + [[0.6]], ["Caption:"] * 401).to_json()
    adapter = replace(adapter, calibration={**(adapter.calibration or {}), "likeness": kept})
    config = ServerConfig(NAME, unlike=unlike)
    return service_of(adapter, processor, config, EngineConfig(2, 256), **more)


@pytest.mark.parametrize("unlike", ["early_exit", "lossless"])
def test_a_request_unlike_the_calibrated_ones_is_named_and_may_be_answered_losslessly(
    unlike: str,
) -> None:
    service = service_with(unlike)
    client = asking(service)
    caption = tasks.captions("test", 1, 5).examples[0]
    noise = replace(caption, image=PHOTO)

    def ask(example: Any, **more: Any) -> dict[str, Any]:
        body = {"messages": messages(example), **more}
        found = client.post("/v1/chat/completions", json=body).json()
        return {**found["usage"]["offramp"], "text": found["choices"][0]["message"]["content"]}

    try:
        like = ask(caption)
        assert like["verdict"]["promised"] and like["mode"] == "early_exit"
        assert ask(caption, temperature=1.0)["verdict"]["p_value"] is None  # nothing is promised
        for number in range(1, 6):
            found = ask(noise)
            assert not found["verdict"]["promised"] and found["verdict"]["p_value"] < 0.005
            assert found["verdict"]["exact"] == (unlike == "lossless")
            assert found["mode"] == unlike
            assert service.alarm.unlike == number
        full = ask(noise, offramp={"mode": "full"})
        assert unlike == "early_exit" or found["text"] == full["text"]
        assert service.alarm.raised and service.under_way == 0
        assert ask(caption)["mode"] == "early_exit"  # what others ask makes nobody's slower
        card = client.get("/v1/models").json()["data"][0]["offramp"]
        assert card["likeness"]["alarm"] and card["guarantee"]["where"].startswith("on images and")
        text = client.get("/metrics").text
        assert "likeness_alarm" in text and "unlike_requests" in text
    finally:
        service.close()


def test_of_several_answers_the_one_least_like_counts() -> None:
    promise = Promise("disagreement", 0.01, 0.95)
    some = [Verdict(promise, p_value=0.5), None, Verdict(p_value=0.001), Verdict(exact=True)]
    written = [Written(index, verdict=verdict) for index, verdict in enumerate(some)]
    told = Reply("m", True, "early_exit", 6, 3, None).usage(written)["offramp"]["verdict"]
    assert told["says"] == NONE and told["p_value"] == 0.001 and not told["promised"]


@pytest.mark.slow
def test_the_watch_counts_requests_unlike_the_calibrated_ones_beside_the_others() -> None:
    """What was never promised breaks no promise."""
    watch = {"watch": WatchConfig(share=1.0), "loss": lambda early, full: 1.0}
    service = service_with("early_exit", **watch)
    client, watcher = asking(service), service.watcher
    noise = [Image.effect_noise((72, 72), 80 + n).convert("RGB") for n in range(12)]
    example = tasks.captions("test", 1, 5).examples[0]
    try:
        for image in noise:
            body = {"messages": messages(replace(example, image=image))}
            client.post("/v1/chat/completions", json=body).raise_for_status()
        assert watcher.settle(300)
        unlike = service.alarm.unlike
        assert unlike > 5 and watcher.others.n == unlike and watcher.risk.n == 12 - unlike
        assert watcher.report()["unlike"] == {"images": unlike, "risk": 1.0}
        assert not watcher.broken
    finally:
        service.close()
