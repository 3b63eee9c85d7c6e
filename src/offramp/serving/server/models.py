"""The model of a server, as OpenAI's API names and lists it."""

from __future__ import annotations

from typing import Any

from offramp.adapter.shipped import KNOWS
from offramp.core.decoding.policy import Thresholds
from offramp.serving.server.errors import ApiError
from offramp.serving.server.service import Service


def check_model(service: Service, name: str | None) -> None:
    """Raise `ApiError` where a request names another model than the served one."""
    own = service.config.name
    if name not in (None, "", own):
        raise ApiError(
            404,
            f"The model {str(name)[:200]!r} is not served here; {own!r} is.",
            param="model",
            code="model_not_found",
        )


def model_card(service: Service) -> dict[str, Any]:
    """Return the description of the served model for `/v1/models`."""
    served = service.served
    return {
        "id": service.config.name,
        "object": "model",
        "created": service.started,
        "owned_by": "offramp",
        "root": served.name,
        "parent": None,
        "max_model_len": served.limit,
        "input_modalities": ["text", "image"] if served.sees else ["text"],
        "output_modalities": ["text"],
        "offramp": {
            "layers": served.layers,
            "knows": KNOWS.get(served.name),
            "exits": list(service.engine.core.depths),
            "thresholds": Thresholds(served.policy.thresholds).to_json(),
            "first": Thresholds(served.policy.first or {}).to_json(),
            "trust": served.policy.trust,
            "guarantee": served.promised(),
            "not_guaranteed": served.stands().why or None,
            "likeness": likeness_report(service),
            "watch": None if service.watcher is None else service.watcher.report(),
            "chat_template": served.prompts.has_template,
        },
    }


def likeness_report(service: Service) -> dict[str, Any] | None:
    """Return how many requests were unlike the calibrated ones; None: not tested."""
    if not service.served.likeness.kinds:
        return None
    alarm = service.alarm
    return {"compared": alarm.compared, "unlike": alarm.unlike, "alarm": alarm.raised}
