"""What the engine tells: depths of tokens, what the check at start found, and which guarantees
stand, from the engine's process to answers and to Prometheus."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from offramp_vllm.watch import COPY

KEY = "offramp"
"""What stands beside an answer's text: {"depths": [...]}, and where a trust above 1 was asked for
"offers": answers by drafts, with the trust that would have taken them. On its way from the engine's
process it is an entry of `kv_transfer_params`, the one field there that takes any; none leaves in
that."""
WATCHED, CHECKED = "offramp_watched", "offramp_checked"
"""There too: whether a watched answer's copy is the same, and what the check at start found."""
SERVED_BY = "vllm"
"""The engine's name in a guarantee's conditions."""
_DEFAULTS: Mapping[str, Any] = {
    "first": {},
    "gates": {},
    "weights": {},
    "visual_keep": 1.0,
    "trust": -1.0,
}
"""Of a policy that leaves them out."""
_OF_POLICY = ("thresholds", "score", "kv", "exit_in_prefill", "shortlist", *_DEFAULTS)


def attach(
    outputs: Mapping[int, Any],
    depths: Mapping[str, Sequence[int]],
    offers: Mapping[str, Sequence[Any]],
) -> None:
    """Put the depth of each request's new tokens beside them, and what drafts offered. outputs:
    EngineCoreOutputs by client. depths: by request; the last one is that of all tokens after it."""
    for client in outputs.values():
        for output in client.outputs:
            found, new = depths.get(output.request_id), len(output.new_token_ids)
            if found is not None and new:
                told = {"depths": [*found[:new], *found[-1:] * (new - len(found))]}
                told |= {"offers": offers.get(output.request_id, ())}
                output.kv_transfer_params = {**(output.kv_transfer_params or {}), KEY: told}


def watched(outputs: Mapping[int, Any], same: Mapping[str, bool | None]) -> None:
    """Put beside the last output of a watched answer's copy whether the two are the same. same: by
    request."""
    for client in outputs.values():
        for output in client.outputs:
            if same.get(output.request_id) is not None:
                output.kv_transfer_params = {WATCHED: same[output.request_id]}


class Depths:
    """Depths of the answers that are being written, and what drafts offered, in the process that
    hands them out."""

    def __init__(self) -> None:
        self._of: dict[str, list[int]] = {}
        self._offers: dict[str, list[Any]] = {}

    def gather(self, outputs: Iterable[Any]) -> None:
        """Take what the engine told out of each output."""
        for output in outputs:
            given = output.kv_transfer_params
            if not given:
                continue
            told = given.pop(KEY, None)
            if WATCHED in given:
                _watched().labels(same=str(given.pop(WATCHED)).lower()).inc()
            if CHECKED in given:
                show_checked(given.pop(CHECKED))
            output.kv_transfer_params = given or None
            if told is None or output.request_id.startswith(COPY):
                continue
            for depth in told["depths"]:
                _tokens().labels(depth=str(depth)).inc()
            self._of.setdefault(output.request_id, []).extend(told["depths"])
            self._offers.setdefault(output.request_id, []).extend(told["offers"])

    def put(self, request: str, output: Any, *, new: bool) -> None:
        """Put depths beside a CompletionOutput. new: of its tokens alone; else the answer's."""
        depths = self._of.get(request)
        if depths is not None:
            output.offramp_depths = depths[len(depths) - len(output.token_ids) if new else 0 :]
            output.offramp_offers = self._offers[request]

    def forget(self, going_on: Mapping[str, Any]) -> None:
        """Forget the answers that are over. going_on: by request."""
        for request in [one for one in self._of if one not in going_on]:
            del self._of[request], self._offers[request]


def choices(answer: Any, outputs: Iterable[Any]) -> Any:
    """An answer over HTTP, with depths beside the text of each choice.

    outputs: the CompletionOutput of each.
    """
    for choice, output in zip(getattr(answer, "choices", ()), outputs, strict=False):
        depths = getattr(output, "offramp_depths", None)
        if depths is not None:
            offers = output.offramp_offers
            setattr(choice, KEY, {"depths": depths} | ({"offers": offers} if offers else {}))
    return answer


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
def _gauge(name: str, text: str, labels: tuple[str, ...]) -> Any:
    from prometheus_client import Gauge

    return Gauge(f"offramp:{name}", text, labels, multiprocess_mode="mostrecent")


def show_checked(found: Mapping[str, Any]) -> None:
    """Show what the check at start found among the metrics. found: "on", and labels."""
    labels = {name: str(value) for name, value in found.items() if name != "on"}
    text = "1: exits answer; 0: the check at start switched them off."
    _gauge("checked", text, tuple(labels)).labels(**labels).set(int(found["on"]))


class Guarantee(NamedTuple):
    """What a calibration says of one kind of prompt.

    reason: why it does not stand here; "": it does.
    """

    risk: str
    target: str
    confidence: str
    kind: str
    reason: str


def guarantees(
    calibrations: Iterable[Mapping[str, Any]], policy: Mapping[str, Any], here: Mapping[str, Any]
) -> Iterator[Guarantee]:
    """What is guaranteed of the exits, one for each kind of prompt, and whether it stands.

    policy: that serves. here: what else decides answers, by the names of a calibration's
    conditions.
    """
    names = _OF_POLICY + (("max_draft",) if "trust" in policy else ())
    served = {**{n: policy.get(n, _DEFAULTS.get(n)) for n in names}, **here}
    for one in calibrations:
        then = one.get("conditions") or {}
        reason = "nothing was measured" if one.get("measured") is None else ""
        for name, now in served.items():
            if not reason and then.get(name, _DEFAULTS.get(name)) != now:
                reason = f"calibrated with {name} {then.get(name)}, and here it is {now}"
        for kind in one.get("kinds") or [{}]:
            target = one.get("target") if kind.get("target") is None else kind["target"]
            told = one.get("risk"), target, one.get("confidence"), kind.get("kind", "")
            yield Guarantee(*map(str, told), reason)


def in_words(found: Sequence[Guarantee]) -> str:
    """What is guaranteed of the exits, for the log."""
    for one in found:
        if not one.reason:
            return f"{one.risk} at most {one.target} with confidence {one.confidence}"
    why = found[0].reason if found else "these exits are not calibrated"
    return f"no guarantee here: {why}"


def show(found: Iterable[Guarantee]) -> None:
    """Show among the metrics what is guaranteed, and what is not."""
    text = "1: the calibrated risk stands here; 0: it does not, for the reason given."
    for one in found:
        _gauge("guarantee", text, Guarantee._fields).labels(*one).set(int(not one.reason))
