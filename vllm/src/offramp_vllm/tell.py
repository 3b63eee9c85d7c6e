"""Depths of tokens, from the worker to the answer and to Prometheus."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

KEY = "offramp"
"""Of an answer's `kv_transfer_params`, the one free field that vLLM hands on: {"depths": [...]}."""


def attach(outputs: Mapping[int, Any], depths: Mapping[str, int]) -> None:
    """Put the depth of each request's new tokens beside them. outputs: EngineCoreOutputs by client.
    depths: by request."""
    for client in outputs.values():
        for output in client.outputs:
            depth = depths.get(output.request_id)
            if depth is not None and output.new_token_ids:
                told = {"depths": [depth] * len(output.new_token_ids)}
                output.kv_transfer_params = {**(output.kv_transfer_params or {}), KEY: told}


class Depths:
    """Depths of the answers that are being written, in the process that hands them out."""

    def __init__(self) -> None:
        self._of: dict[str, list[int]] = {}

    def gather(self, outputs: Iterable[Any]) -> None:
        """Have each output tell the depths of its whole answer so far."""
        for output in outputs:
            told = (output.kv_transfer_params or {}).get(KEY)
            if told is None:
                continue
            new = told["depths"]
            for depth in new:
                _tokens().labels(depth=str(depth)).inc()
            answer = self._of.setdefault(output.request_id, [])
            answer += new
            output.kv_transfer_params[KEY] = {"depths": list(answer)}

    def forget(self, going_on: Mapping[str, Any]) -> None:
        """Forget the answers that are over. going_on: by request."""
        for request in [one for one in self._of if one not in going_on]:
            del self._of[request]


@functools.cache
def _tokens() -> Any:
    from prometheus_client import Counter

    return Counter("offramp:tokens", "Tokens written, by decoder layers run.", ["depth"])


@functools.cache
def _standing() -> Any:
    from prometheus_client import Gauge

    names = ["risk", "target", "confidence"]
    return Gauge(
        "offramp:guarantee", "1: calibrated risk of the exits served, under its conditions.", names
    )


def in_words(guarantee: Mapping[str, Any] | None) -> str:
    """What is guaranteed of the exits, for the log."""
    if not guarantee:
        return "no guarantee: these exits are not calibrated"
    risk, target = guarantee.get("risk"), guarantee.get("target")
    return (
        f"calibrated: {risk} at most {target} with confidence {guarantee.get('confidence')}, under "
        f"the conditions in adapter.json; the engine is another one here"
    )


def show(guarantee: Mapping[str, Any] | None) -> None:
    """Show what is guaranteed among the metrics."""
    if guarantee:
        values: Sequence[Any] = [guarantee.get(n) for n in ("risk", "target", "confidence")]
        _standing().labels(*map(str, values)).set(1)
