"""Depths of tokens, from the worker to the answer and to Prometheus."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from offramp_vllm.watch import COPY

KEY = "offramp"
"""Of an answer's `kv_transfer_params`, the one free field that vLLM hands on: {"depths": [...]}."""
WATCHED = "offramp_watched"
"""There too, of the copy of a watched answer: whether it is the same."""


def attach(outputs: Mapping[int, Any], depths: Mapping[str, Sequence[int]]) -> None:
    """Put the depth of each request's new tokens beside them. outputs: EngineCoreOutputs by client.
    depths: by request; the last one is that of all tokens after it."""
    for client in outputs.values():
        for output in client.outputs:
            found, new = depths.get(output.request_id), len(output.new_token_ids)
            if found is not None and new:
                told = {"depths": [*found[:new], *found[-1:] * (new - len(found))]}
                output.kv_transfer_params = {**(output.kv_transfer_params or {}), KEY: told}


def watched(outputs: Mapping[int, Any], same: Mapping[str, bool | None]) -> None:
    """Put beside the last output of a watched answer's copy whether the two are the same. same: by
    request."""
    for client in outputs.values():
        for output in client.outputs:
            if same.get(output.request_id) is not None:
                output.kv_transfer_params = {WATCHED: same[output.request_id]}


class Depths:
    """Depths of the answers that are being written, in the process that hands them out."""

    def __init__(self) -> None:
        self._of: dict[str, list[int]] = {}

    def gather(self, outputs: Iterable[Any]) -> None:
        """Have each output tell the depths of its whole answer so far."""
        for output in outputs:
            given = output.kv_transfer_params or {}
            if WATCHED in given:
                _watched().labels(same=str(given[WATCHED]).lower()).inc()
            told = given.get(KEY)
            if told is None or output.request_id.startswith(COPY):
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
def _watched() -> Any:
    from prometheus_client import Counter

    text = "Early answers that were written again at full depth, by whether they are the same."
    return Counter("offramp:watched_answers", text, ["same"])


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
