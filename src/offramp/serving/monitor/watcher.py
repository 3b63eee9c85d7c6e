"""Watches a guarantee: a share of what was asked is answered by the full model too.

Calibration says what early answers lose on images like those it saw, and nothing of others. Which
requests are watched is drawn before they are answered; the full model answers when the engine has
nothing better to do; each image counts once. What the answers lose is a bet against the promise
(`offramp.betting`): where the promise holds, it is ever called broken with probability at most
`level`, however long the server runs.
"""

from __future__ import annotations

import json
import logging
import queue
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from offramp.answers import Answer, answers_of
from offramp.betting import RunningRisk
from offramp.data.image import content_digest
from offramp.engine.policy import GenerationOutput
from offramp.errors import InputError, OfframpError, check_known
from offramp.models.input_processor import InputProcessor
from offramp.serving.batch_engine import BatchEngine
from offramp.storage import JsonlLog

log = logging.getLogger(__name__)

ACTIONS = ("lossless", "full", "warn")
"""What answers are once the promise is broken: lossless, the full model's, or as before."""
Loss = Callable[[Answer, Answer], float]
"""What an early answer loses in [0, 1] against the full model's."""
ROWS = "rows.jsonl"
_PAUSE = 0.02


def differs(early: Answer, full: Answer) -> float:
    """The risk "disagreement"."""
    return float(early.ids != full.ids)


@dataclass(frozen=True)
class Promise:
    """What was calibrated: P(risk <= target) >= confidence, over images like the calibration's."""

    risk: str
    target: float
    confidence: float

    @classmethod
    def of(
        cls, calibration: Mapping[str, Any] | None, runtime: str | None = None
    ) -> Promise | None:
        """That of an adapter; None where nothing could be guaranteed of the runtime's answers.

        runtime: its name; None: PyTorch.
        """
        if not calibration or calibration.get("measured") is None:
            return None
        if calibration.get("runtime") != runtime:
            return None
        return cls(*(calibration[name] for name in ("risk", "target", "confidence")))


@dataclass(frozen=True)
class WatchConfig:
    """How closely to look.

    share: of requests that are answered by the full model too. level: how often, at most, a promise
    that holds is ever called broken. action: of `ACTIONS`. keep: folder that images, prompts and
    answers of watched requests are written to, so that thresholds can be calibrated on them; only
    with the consent of those who ask. backlog: watched requests that may wait for the full model;
    more are let go. remembered: images that are known to have counted.

    Raises:
        InputError: a share or level outside (0, 1], an unknown action.
    """

    share: float = 0.01
    level: float = 0.01
    action: str = "lossless"
    keep: Path | None = None
    backlog: int = 32
    remembered: int = 1_000_000

    def __post_init__(self) -> None:
        if not (0 < self.share <= 1 and 0 < self.level < 1):
            raise InputError(
                f"A share of {self.share} watched at level {self.level} tells nothing.",
                "Give numbers above 0 and below 1, such as 0.01 and 0.01.",
            )
        check_known("Action", [self.action], ACTIONS)


@dataclass(frozen=True, eq=False)
class Sample:
    """A request that was answered early. inputs, options: as it was submitted. image, prompt: what
    was asked about, and what."""

    inputs: Mapping[str, Any]
    options: Mapping[str, Any]
    output: GenerationOutput
    image: Image.Image
    prompt: str


class Watcher:
    """Compares in a thread of its own; started at once, ended by `close`.

    promise: None: the risk is reported, not judged. loss: of the promise's risk. seed: of
    the draw.
    """

    def __init__(
        self,
        engine: BatchEngine,
        encoder: InputProcessor,
        promise: Promise | None,
        config: WatchConfig | None = None,
        *,
        loss: Loss = differs,
        seed: int | None = None,
    ) -> None:
        self.config, self.promise = config or WatchConfig(), promise
        target = None if promise is None else promise.target
        confidence = 0.95 if promise is None else promise.confidence
        self.risk = RunningRisk(target, self.config.level, confidence)
        self._engine, self._encoder, self._loss = engine, encoder, loss
        self._draw = random.Random(seed)
        self._known: OrderedDict[str, None] = OrderedDict()
        self._samples: queue.Queue[Sample | None] = queue.Queue(self.config.backlog)
        self._closed = threading.Event()
        self._busy = False
        self.let_go = 0
        self._log = None if self.config.keep is None else JsonlLog(self.config.keep / ROWS)
        self._thread = threading.Thread(target=self._work, name="offramp-watch", daemon=True)
        self._thread.start()

    # -- what the server asks ----------------------------------------------------------------------

    def draws(self) -> bool:
        """Whether the next request is watched; asked before it is answered."""
        return self._draw.random() < self.config.share

    def offer(self, sample: Sample) -> None:
        """Compare an answer when there is time; let it go where too many wait."""
        try:
            self._samples.put_nowait(sample)
        except queue.Full:
            self.let_go += 1

    @property
    def broken(self) -> bool:
        """Whether the promise was shown to be broken."""
        return self.risk.broken

    @property
    def replaces(self) -> str | None:
        """The mode that takes early exit's place; None: early exit goes on."""
        return self.config.action if self.broken and self.config.action != "warn" else None

    def report(self) -> dict[str, Any]:
        """What is known of the risk now, as JSON for the page and for programs."""
        low, high = self.risk.interval
        return {
            "images": self.risk.n,
            "risk": self.risk.mean,
            "lower": low,
            "upper": high,
            "p_value": self.risk.p_value,
            "broken": self.broken,
            "action": self.config.action,
        }

    def settle(self, seconds: float) -> bool:
        """Wait until all that was offered is compared; False where the time passed."""
        end = time.monotonic() + seconds
        while self._busy or not self._samples.empty():
            if time.monotonic() > end:
                return False
            time.sleep(_PAUSE)
        return True

    def close(self) -> None:
        """Stop; what is queued is dropped."""
        self._closed.set()
        self._thread.join()
        if self._log is not None:
            self._log.close()

    # -- the comparison ----------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._closed.is_set():
            try:
                sample = self._samples.get(timeout=_PAUSE)
            except queue.Empty:
                continue
            self._busy = True
            try:
                if sample is not None:
                    self._compare(sample)
            except OfframpError as error:
                log.warning("A watched request could not be compared: %s", error.problem)
            except Exception:
                log.warning("A watched request could not be compared.", exc_info=True)
            finally:
                self._busy = False

    def _compare(self, sample: Sample) -> None:
        name = content_digest(sample.image)[:32]
        if name in self._known or not self._wait_until_idle():
            return
        self._known[name] = None
        while len(self._known) > self.config.remembered:
            self._known.popitem(last=False)
        handle = self._engine.submit(sample.inputs, mode="full", **sample.options)
        while not handle.done():
            if self._closed.wait(_PAUSE):
                self._engine.cancel(handle)
                return
        [early] = answers_of(sample.output, self._encoder)
        [full] = answers_of(handle.result().output, self._encoder)
        loss = self._loss(early, full)
        before = self.broken
        self.risk.add(loss)
        self._keep(name, sample, early, full, loss)
        if self.broken and not before:
            self._warn()

    def _wait_until_idle(self) -> bool:
        """Wait for a slot that no request needs; False where the watch ends first."""
        slots = self._engine.core.config.slots
        while self._engine.waiting or self._engine.running >= max(1, slots // 2):
            if self._closed.wait(_PAUSE):
                return False
        return not self._closed.is_set()

    def _keep(self, name: str, sample: Sample, early: Answer, full: Answer, loss: float) -> None:
        """Write a watched request as an example that `offramp calibrate` reads."""
        if self._log is None or self.config.keep is None:
            return
        file = self.config.keep / f"{name}.png"
        if not file.exists():
            sample.image.save(file)
        answer = {"answer": full.text} if full.text else {}
        row = {"image": file.name, "prompt": sample.prompt, **answer, "early": early.text}
        self._log.append({**row, "loss": loss, "time": round(time.time(), 3)})

    def _warn(self) -> None:
        assert self.promise is not None
        low, _ = self.risk.interval
        event = {
            "event": "guarantee_broken", "risk": self.promise.risk, "promised": self.promise.target,
            "lower_bound": low, "images": self.risk.n, "action": self.config.action,
        }  # fmt: skip
        log.warning(json.dumps(event))
