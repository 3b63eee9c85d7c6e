"""The models of one server: one, or several adapters that share a backbone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from offramp.engine.policy import Thresholds
from offramp.models.shipped import KNOWS
from offramp.serving.server.errors import ApiError
from offramp.serving.server.metrics import text_of
from offramp.serving.server.service import Service


class Models:
    """The services that answer, by the `model` that a request names; none named: the first's.

    others: names of models beside the first. load: the service of one of them, ready; called for
    every request, so it keeps what it has loaded. held: the services that are loaded now.
    """

    def __init__(
        self,
        first: Service,
        others: Sequence[str] = (),
        load: Callable[[str], Awaitable[Service]] | None = None,
        held: Mapping[str, Service] | None = None,
    ) -> None:
        self.first: Service = first
        self.others: tuple[str, ...] = tuple(others)
        self._load, self._held = load, held if held is not None else {}

    async def of(self, name: str | None) -> Service:
        """The service that answers for `name`. Raise `ApiError` where there is none."""
        if self._load is not None and name in self.others:
            return await self._load(str(name))
        if name not in (None, "", self.first.config.name):
            known = ", ".join(map(repr, (self.first.config.name, *self.others)))
            raise ApiError(
                404,
                f"The model {str(name)[:200]!r} is not served here; {known} "
                f"{'are' if self.others else 'is'}.",
                param="model",
                code="model_not_found",
            )
        return self.first

    @property
    def loaded(self) -> list[Service]:
        """The first, and the others that are loaded."""
        return [self.first, *self._held.values()]

    def cards(self) -> list[dict[str, Any]]:
        """Return what `/v1/models` lists, the first model first."""
        held, first = self._held, model_card(self.first)
        rest = [
            model_card(held[name]) if name in held else {**first, "id": name, "offramp": None}
            for name in self.others
        ]
        return [first, *rest]

    def metrics(self) -> bytes:
        """Return the metrics of all models that are loaded, in Prometheus's format."""
        return text_of([service.metrics for service in self.loaded])

    def close(self) -> None:
        for service in self.loaded:
            service.close()


def model_card(service: Service) -> dict[str, Any]:
    """Return what is served, as `/v1/models` lists it."""
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
            "guarantee": served.promised(),
            "not_guaranteed": service.standing.why or None,
            "likeness": _likeness(service),
            "watch": None if service.watcher is None else service.watcher.report(),
            "chat_template": served.prompts.has_template,
        },
    }


def _likeness(service: Service) -> dict[str, Any] | None:
    """How many requests were unlike those that were calibrated; None: that is not known."""
    if not service.served.likeness.kinds:
        return None
    alarm = service.alarm
    return {"compared": alarm.compared, "unlike": alarm.unlike, "alarm": alarm.raised}
