"""Laws of requests unlike the calibrated ones: they are named, counted and, if asked for, answered
losslessly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from offramp.data.scenes import tasks
from offramp.promises.likeness import Likeness
from offramp.serving.engine_config import EngineConfig
from offramp.serving.server.api.replies import Reply, Written
from offramp.serving.server.config import ServerConfig
from offramp.serving.server.pytorch import service_of
from offramp.serving.server.service import Service
from serving import NAME, asking, messages, shipped

PHOTO = Image.effect_noise((72, 72), 90).convert("RGB")


def service_with(unlike: str) -> Service:
    """Of exits whose calibrated answers were all rather sure."""
    adapter, processor = shipped()
    kept = Likeness.of([[0.97]] * 400 + [[0.6]], ["Caption:"] * 401).to_json()
    adapter = replace(adapter, calibration={**(adapter.calibration or {}), "likeness": kept})
    config = ServerConfig(NAME, unlike=unlike)
    return service_of(adapter, processor, config, EngineConfig(2, 256))


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
        assert like["likeness"]["like"] and like["mode"] == "early_exit"
        assert "likeness" not in ask(caption, temperature=1.0)  # nothing is guaranteed of it
        for number in range(1, 6):
            found = ask(noise)
            if "likeness" not in found:
                break  # the alarm was raised, and all is answered losslessly
            assert not found["likeness"]["like"] and found["likeness"]["p_value"] < 0.005
            assert found["mode"] == unlike
            assert service.alarm.unlike == number
        full = ask(noise, offramp={"mode": "full"})
        assert unlike == "early_exit" or found["text"] == full["text"]
        assert service.alarm.raised and service.under_way == 0
        assert ask(caption)["mode"] == unlike
        card = client.get("/v1/models").json()["data"][0]["offramp"]
        assert card["likeness"]["alarm"] and card["guarantee"]["where"].startswith("on images and")
        text = client.get("/metrics").text
        assert "likeness_alarm" in text and "unlike_requests" in text
    finally:
        service.close()


def test_of_several_answers_the_one_least_like_counts() -> None:
    written = [Written(0, likeness=0.5), Written(1), Written(2, likeness=0.001)]
    told = Reply("m", True, "early_exit", 6, 3, None).usage(written)["offramp"]["likeness"]
    assert told == {"p_value": 0.001, "like": False}
