"""What a dashboard asks of the server, under the names that dashboards know."""

from __future__ import annotations

from collections import Counter as Counted
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from offramp.serving.request import Completion

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
HISTOGRAMS = {
    "time_to_first_token_seconds": "From submission to the first token.",
    "inter_token_latency_seconds": "Between two tokens of an answer.",
    "e2e_request_latency_seconds": "From submission to the end of the answer.",
    "request_queue_time_seconds": "From submission to the prompt's turn.",
    "request_prefill_time_seconds": "From the prompt's turn to the first token.",
    "request_decode_time_seconds": "From the first token to the last.",
}


PREFIX = "offramp"
"""Before the names, which are vLLM's where it has the same."""


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self, model: str) -> None:
        self.registry: CollectorRegistry = CollectorRegistry()
        self._model = model
        histogram = {
            name: Histogram(
                f"{PREFIX}:{name}",
                text,
                ["model_name"],
                buckets=GAPS if name.startswith("inter") else SECONDS,
                registry=self.registry,
            ).labels(model)
            for name, text in HISTOGRAMS.items()
        }
        self._seconds = histogram
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.").labels(model)
        self._written = self._counter("generation_tokens", "Tokens of answers.").labels(model)
        self._over = self._counter(
            "request_success", "Answers, by how they ended.", "finished_reason"
        )
        self._refused = self._counter("request_errors", "Requests refused or failed.", "status")
        self._depth = self._counter(
            "tokens_by_depth", "Tokens of answers, by their depth.", "depth"
        )
        self._mode = self._counter("requests_by_mode", "Answers, by how they used exits.", "mode")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        full = f"{PREFIX}:{name}"
        return Counter(full, text, ["model_name", *labels], registry=self.registry)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a number that is computed whenever the metrics are read."""
        gauge = Gauge(f"{PREFIX}:{name}", text, ["model_name"], registry=self.registry)
        gauge.labels(self._model).set_function(value)

    def answered(
        self, done: Completion, depths: Sequence[int], prompt: int, reason: str, mode: str
    ) -> None:
        """Count an answer. prompt: tokens of its prompt; 0: counted already."""
        seconds = self._seconds
        seconds["time_to_first_token_seconds"].observe(done.first)
        seconds["e2e_request_latency_seconds"].observe(done.total)
        seconds["request_queue_time_seconds"].observe(done.queued)
        seconds["request_prefill_time_seconds"].observe(max(0.0, done.first - done.queued))
        seconds["request_decode_time_seconds"].observe(max(0.0, done.total - done.first))
        for gap in done.gaps:
            seconds["inter_token_latency_seconds"].observe(gap)
        self._prompt.inc(prompt)
        self._written.inc(len(depths))
        for depth, tokens in Counted(depths).items():
            self._depth.labels(self._model, str(depth)).inc(tokens)
        self.ended(reason)
        self._mode.labels(self._model, mode).inc()

    def ended(self, reason: str) -> None:
        """Count an answer's end: stop, length or abort."""
        self._over.labels(self._model, reason).inc()

    def refused(self, status: int) -> None:
        """Count a request that was answered by an error."""
        self._refused.labels(self._model, str(status)).inc()

    def text(self) -> bytes:
        """Return all numbers in Prometheus's format."""
        return generate_latest(self.registry)
