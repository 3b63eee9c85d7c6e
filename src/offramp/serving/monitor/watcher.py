"""Watches a guarantee: a share of what was asked is answered by the full model too.

Calibration says what early answers lose on images like those it saw, and nothing of others. Which
requests are watched is drawn before they are answered, so that the unit of the promise is what is
estimated: of a promise by answer, requests are drawn, and each counts; of one by image, images are,
by a secret digest of what they show, however often they are asked about, and each counts once. Of
`BLOCK` images that were drawn so, one is compared, more likely one whose answer exits doubted
(`offramp.promises.active_draw`). The full model answers it in a slot that no request needs or,
after the deadline, like a request of its own, so that a busy server is watched as well as an idle
one. What the answers lose is a bet against the promise (`offramp.promises.betting`): where the risk
is at most what was promised at each time, it is ever called broken with probability at most
`level`, however long the server runs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from offramp.adapter.answers import Answer, answers_of
from offramp.common.folders import check_writable, locked_folder
from offramp.common.jsonl_log import JsonlLog
from offramp.core.errors import BusyError, OfframpError, StorageError
from offramp.core.storage import read_json, write_json
from offramp.data.near_copies import SIDE_SHARP, Look, copied
from offramp.features.input_processor import InputProcessor
from offramp.inputs.image import pixel_digest
from offramp.promises.active_draw import BLOCK, MOST, chances, doubt
from offramp.promises.betting import RunningRisk, as_share
from offramp.promises.guarantee import Promise
from offramp.promises.likeness import Alarm, Likeness
from offramp.serving.batch_engine import BatchEngine
from offramp.serving.monitor.sample import Sample
from offramp.serving.monitor.watch_config import WatchConfig

log = logging.getLogger(__name__)

Loss = Callable[[Answer, Answer], float]
"""What an early answer loses in [0, 1] against the full model's."""
Judge = Callable[[Answer, Answer, Sequence[str]], float]
"""What an early answer loses in [-1, 1] against the full model's, by what people say is right."""
ROWS = "rows.jsonl"
LATELY = 200
"""Watched requests of which the coverage is told; fewer than `ENOUGH` tell nothing."""
ENOUGH = 50
COVERAGE, SEES = 0.5, 0.7
"""Share of these that must be compared, or the watch says that it is blind; and that must be for it
to say that it sees again."""
SHOWN = 64
"""Pixels a side of what an image is drawn by."""
SELDOM = 0.001
"""How seldom an image that is asked about as often as any that was calibrated is drawn more often
than its draws count, of a promise by answer."""
REMEMBERED = 1_000_000
"""Images that are known to have counted."""
JUDGED = 1000
"""Compared answers, the last ones, that people may still judge."""
COMPARED_WITH = 128
"""Images with which a new one is compared for copies that differ by a few pixels."""
DRAWN = 64
"""The last draws while several clients ask, of which none has more than its share; and the last
ones who would have been drawn, which tell whether several do."""
_PAUSE = 0.02


def draws_of_one(largest: int, share: float) -> int:
    """Return how many draws of one image may count, for a promise by answer: more are drawn with
    probability `SELDOM`, for an image with `largest` answers."""
    from scipy.stats import binom

    return max(1, min(largest, int(binom.ppf(1 - SELDOM, largest, share))))


def differs(early: Answer, full: Answer) -> float:
    """Return the loss of the risk "disagreement": 1 where two answers differ, else 0."""
    return float(early.ids != full.ids)


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A sample that waits for its block, for a slot, and until when, or for its answer. name: of
    its image, once it was looked at. times: how many times its loss counts."""

    sample: Sample
    until: float = 0.0
    name: str = ""
    times: float = 1.0
    handle: Any = None


@dataclass(frozen=True, eq=False)
class _Compared:
    """An answer that was compared. name: of its image. times: how many times its loss counts."""

    early: Answer
    full: Answer
    prompt: str
    name: str
    times: float


class _Known:
    """Images that have counted: by their pixels for long, and the last ones also by their look."""

    def __init__(self) -> None:
        self._digests: OrderedDict[str, None] = OrderedDict()
        self._last: deque[tuple[Look, Image.Image]] = deque(maxlen=COMPARED_WITH)

    def is_new(self, image: Image.Image, digest: str) -> bool:
        """Return True if neither the image nor a copy of it has counted."""
        if digest in self._digests:
            return False
        look = Look.of(image)
        return not any(look.alike(before) and copied(image, seen) for before, seen in self._last)

    def add(self, image: Image.Image, digest: str) -> None:
        self._digests[digest] = None
        while len(self._digests) > REMEMBERED:
            self._digests.popitem(last=False)
        small = image.convert("L")
        small.thumbnail((SIDE_SHARP, SIDE_SHARP))  # all that copies are compared by
        self._last.append((Look.of(image), small))


class Watcher:
    """Compares answers with the full model's in a thread of its own, from creation to `close`.

    promise: None: the risk is reported, not judged. loss: of the promise's risk. kind_of: returns
    the kind of a prompt, where kinds have targets of their own: losses then count in units of the
    smallest, so that each kind may lose its own share. about: names the promise's subject, such as
    a digest of the adapter; stored results of another are not used. alarm: over unlike requests,
    which is kept and reset with the watch. right: the promise about right answers. judge: returns
    an answer's loss by people's references; each of the two tests then has half of the level. seed:
    of the draw.

    risk: of requests like the calibrated ones. others: of unlike requests, without a promise.
    judged: of `right`; None: nobody judges. blind: whether too few of the drawn requests are
    compared for a conclusion. let_go: number of drawn requests that were not compared, for any
    reason.

    Raises:
        StorageError: another watcher has the state file.
    """

    def __init__(
        self,
        engine: BatchEngine,
        encoder: InputProcessor,
        promise: Promise | None,
        config: WatchConfig | None = None,
        *,
        loss: Loss = differs,
        kind_of: Callable[[str], str] = str,
        about: str = "",
        alarm: Alarm | None = None,
        right: Promise | None = None,
        judge: Judge | None = None,
        seed: int | None = None,
    ) -> None:
        self.config: WatchConfig = config or WatchConfig()
        self.promise: Promise | None = promise
        # What is kept may be calibrated on, so that it has to be drawn uniformly.
        uniform = self._by_answer or self.config.keep is not None
        self._block = 1 if uniform else max(1, min(BLOCK, int(1 / self.config.share)))
        self._about = {
            "about": about,
            "slack": self.config.slack,
            "level": self.config.level,
            "watchers": self.config.watchers,
            "share": self.config.share if self._by_answer else None,
            "block": self._block,
            "promise": None if promise is None else asdict(promise),
            "right": None if right is None or judge is None else asdict(right),
        }
        self._right, self._judge = right, judge
        self._held = _held(self.config.state)
        self._alarm = alarm or Alarm(Likeness({}))
        self.judged: RunningRisk | None = self._new_judged()
        self.risk = self._kept_risk() or self._new_risk()
        self.others = self._of_others()
        self._engine, self._encoder, self._loss = engine, encoder, loss
        self._kind_of = kind_of
        self._draw = random.Random(seed)
        self._secret = self._draw.randbytes(16)
        self._images: OrderedDict[bytes, None] = OrderedDict()
        self._known = _Known()
        self._lock = threading.Lock()
        self._offered: list[_Waiting] = []
        self._blocks: dict[bool, list[_Waiting | None]] = {True: [], False: []}
        self._due: list[_Waiting] = []
        self._compared: OrderedDict[str, _Compared] = OrderedDict()
        self._waiting: Counter[str] = Counter()
        self._asked: deque[str] = deque(maxlen=DRAWN)
        self._drawn: deque[str] = deque(maxlen=DRAWN)
        self._covered: deque[bool] = deque(maxlen=LATELY)
        self._closed = threading.Event()
        self.blind = False
        self.let_go = 0
        self._log = None if self.config.keep is None else JsonlLog(self.config.keep / ROWS)
        self._thread = threading.Thread(target=self._work, name="offramp-watch", daemon=True)
        self._thread.start()

    def _new_risk(self) -> RunningRisk:
        """A new test of the risk, at the level that all watchers share."""
        level, heaviest = self._level, self._heaviest
        if self.promise is None:
            return RunningRisk(None, level, most=heaviest)
        # Of requests like the calibrated ones alone: without the few that are called unlike, the
        # mean may be larger by so much.
        target = self._limit(self.promise)
        return RunningRisk(target, level, self.promise.confidence, self._of_one, heaviest)

    def _new_judged(self) -> RunningRisk | None:
        """A new test of what right answers show; gains count too."""
        if self._right is None or self._judge is None:
            return None
        target = as_share(self._limit(self._right), self._heaviest)
        return RunningRisk(target, self._level, self._right.confidence, self._of_one)

    def _limit(self, promise: Promise) -> float:
        return min(1.0, promise.least * self.config.slack / (1 - self._alarm.spared))

    @property
    def _level(self) -> float:
        tests = self.config.watchers * (1 if self._right is None or self._judge is None else 2)
        return self.config.level / tests

    @property
    def _of_one(self) -> int:
        if self.promise is None or not self._by_answer:
            return 1
        return draws_of_one(self.promise.largest, self.config.share)

    def _of_others(self) -> RunningRisk:
        return RunningRisk(None, most=self._heaviest)

    @property
    def _heaviest(self) -> float:
        """How many times a loss counts, at most."""
        return MOST if self._block > 1 else 1.0

    @property
    def _by_answer(self) -> bool:
        return self.promise is not None and self.promise.unit == "answer"

    # -- what the server asks ----------------------------------------------------------------------

    def draws(self, client: str = "", image: Image.Image | None = None) -> bool:
        """Return True if the next request is watched, or is in a block with a watched one; called
        before its answer.

        A client has at most its share of the last draws, unless it asks alone. This depends on
        earlier requests only, so the bets stay fair. image: of the request, which is drawn itself
        unless the promise is by answer; None: the request is drawn.
        """
        if image is None or self._by_answer:
            if self._draw.random() >= self.config.share * self._block:
                return False
            name = None
        else:
            name = self._name_of(image)
            if int.from_bytes(name[:7], "big") >= self.config.share * self._block * 2**56:
                return False
        with self._lock:
            if name is not None and name in self._images:
                return False
            self._asked.append(client)
            clients, drawn = len(set(self._asked)), len(self._drawn)
            most = max(self.config.a_client * drawn, drawn / clients)  # what each of few needs
            taken = self._drawn.count(client) <= most
            if taken and clients > 1:
                self._drawn.append(client)
        return taken

    def _name_of(self, image: Image.Image) -> bytes:
        """What an image is drawn by, as if at random."""
        pixels = image.resize((SHOWN, SHOWN), Image.Resampling.NEAREST).tobytes()
        return hashlib.blake2b(pixels, digest_size=16, key=self._secret).digest()

    def offer(self, sample: Sample) -> None:
        """Compare an answer, or another one of its block, when there is time; skip it where too
        many wait."""
        most = max(1, int(self.config.a_client * self.config.backlog))
        assert sample.image is not None
        name = self._name_of(sample.image)
        with self._lock:
            waiting = len(self._offered) + len(self._due)
            if self._waiting[sample.client] >= most or waiting >= self.config.backlog:
                self._enter(None)
                return
            self._offered.append(_Waiting(sample))
            self._waiting[sample.client] += 1
            self._images[name] = None
            while len(self._images) > REMEMBERED:
                self._images.popitem(last=False)

    def lost(self) -> None:
        """Note that a drawn request has no whole answer, because its client left or it took too
        long. Its loss is unknown, and such requests may differ from others."""
        with self._lock:
            self._enter(None)

    @property
    def broken(self) -> bool:
        """Return True if the promise was shown to be broken."""
        return self.risk.broken or (self.judged is not None and self.judged.broken)

    @property
    def coverage(self) -> float | None:
        """Return the share of recent watched requests that were compared or had counted before;
        None: too few requests."""
        seen = list(self._covered)
        return sum(seen) / len(seen) if len(seen) >= ENOUGH else None

    @property
    def replaces(self) -> str | None:
        """Return the mode that replaces early exit; None: early exit goes on."""
        return self.config.action if self.broken and self.config.action != "warn" else None

    def report(self) -> dict[str, Any]:
        """Return the state of the watch, as JSON for the page and for programs."""
        low, high = self.risk.interval
        return {
            "of": None if self.promise is None else self.promise.risk,
            "images": self.risk.n,
            "risk": self.risk.mean,
            "unlike": {"images": self.others.n, "risk": self.others.mean},
            "lower": low,
            "upper": high,
            "alarm_above": self.risk.promised,
            "p_value": self.risk.p_value,
            "broken": self.broken,
            "coverage": self.coverage,
            "lost": self.let_go,
            "blind": self.blind,
            "action": self.config.action,
            "judged": self._judged_report(),
        }

    def _judged_report(self) -> dict[str, Any] | None:
        """What right answers show."""
        if self.judged is None or self._right is None:
            return None
        most, risk = self._heaviest, self.judged

        def loss(share: float | None) -> float | None:
            return None if share is None else 2 * most * share - most

        low, high = map(loss, risk.interval)
        return {
            "of": self._right.risk,
            "answers": risk.n,
            "risk": loss(risk.mean),
            "lower": low,
            "upper": high,
            "alarm_above": loss(risk.promised),
            "broken": risk.broken,
        }

    def judge(self, answer: str, references: Sequence[str]) -> bool:
        """Count people's judgement of an answer; return whether it counts.

        Only a recently compared answer counts, and once: for others the full model was not asked.
        answer: the id of its reply.

        Raises:
            OfframpError: it cannot be judged by these.
        """
        with self._lock:
            one = self._compared.get(answer)
        if one is None or self._judge is None or self._right is None or self.judged is None:
            return False
        lost = self._judge(one.early, one.full, references)
        lost *= self._right.least / self._right.target_of(self._kind_of(one.prompt))
        share = as_share(lost * one.times, self._heaviest)
        with self._lock:
            if self._compared.pop(answer, None) is None:
                return False
            before = self.broken
            counts = self.judged.add(share, one.name if self._by_answer else "")
            self._save()
        if self.broken and not before:
            self._warn()
        return counts

    def reset(self) -> None:
        """Forget all results, a broken promise too: for a newly calibrated adapter, or after the
        cause of an alarm is gone. The promise counts anew from now on."""
        with self._lock:
            self.risk, self.others = self._new_risk(), self._of_others()
            self.judged = self._new_judged()
            self._compared.clear()
            self._alarm.reset()
            self._images.clear()
            self._known = _Known()
            for block in self._blocks.values():
                block.clear()
            self._save()
        log.warning(json.dumps({"event": "watch_reset"}))

    def settle(self, seconds: float) -> bool:
        """Wait until all offered answers are compared; return False after `seconds` seconds."""
        end = time.monotonic() + seconds
        while self._busy:
            if time.monotonic() > end:
                return False
            time.sleep(_PAUSE)
        return True

    @property
    def _busy(self) -> bool:
        """Whether anything waits. A sample that moves on is counted nowhere for a moment, so the
        lock is taken."""
        with self._lock:
            return bool(self._waiting.total())

    def close(self) -> None:
        """Stop the thread and drop queued answers."""
        self._closed.set()
        self._thread.join()
        if self._log is not None:
            self._log.close()
        self._held.close()

    # -- the comparison ----------------------------------------------------------------------------

    def _work(self) -> None:
        asked: list[_Waiting] = []  # whose answers are on their way
        while not self._closed.wait(_PAUSE):
            try:
                self._sort()
                asked = self._finish(asked) + self._start()
            except Exception:  # of the watch itself; the next ones may be compared
                log.warning("A watched request could not be compared.", exc_info=True)
        for one in asked:
            self._engine.cancel(one.handle)

    def _sort(self) -> None:
        """Put what was offered into blocks, unless it tells nothing."""
        while not self._closed.is_set():
            with self._lock:
                if not self._offered:
                    return
                one = self._offered.pop(0)
            try:
                looked = self._looked_at(one)
            except Exception as error:
                self._failed(one, error)
                continue
            with self._lock:
                self._over(one.sample.client)
                if looked is not None:
                    self._enter(looked)

    def _looked_at(self, one: _Waiting) -> _Waiting | None:
        """Return a sample with the name of its image; None of a promise by image, where this has
        counted."""
        image = one.sample.image
        assert image is not None
        name = pixel_digest(image)[:32]
        if not self._by_answer:
            if not self._known.is_new(image, name):
                return None
            self._known.add(image, name)
        # Images are large, and blocks fill slowly.
        kept = one.sample if self._log else replace(one.sample, image=None)
        return replace(one, sample=kept, name=name)

    def _enter(self, one: _Waiting | None) -> None:
        """Put a sample into its block, None one that is lost; choose from the block if it is full.
        Call with the lock held."""
        block = self._blocks[one is None or one.sample.like]
        block.append(one)
        if len(block) < self._block:
            return
        scores = [[] if one is None else one.sample.output.scores[0].tolist() for one in block]
        each = chances(np.array(list(map(doubt, scores))))
        place = self._draw.choices(range(len(block)), each.tolist())[0]
        chosen = block[place]
        block.clear()
        if chosen is None:
            self._lost()
            return
        until = time.monotonic() + self.config.deadline
        times = float(1 / (self._block * each[place]))
        self._due.append(replace(chosen, until=until, times=times))
        self._waiting[chosen.sample.client] += 1

    def _start(self) -> list[_Waiting]:
        """Have the full model answer what waits: one in each slot that no request needs, and
        whatever is past its deadline like a request of its own."""
        started = []
        while not self._closed.is_set():
            with self._lock:
                late = bool(self._due) and time.monotonic() >= self._due[0].until
                if not self._due or not (late or self._free):
                    break
                one = self._due.pop(0)
            try:
                handle = self._engine.submit(one.sample.inputs, mode="full", **one.sample.options)
                started.append(replace(one, handle=handle))
            except BusyError:
                if time.monotonic() > one.until + max(1.0, self.config.deadline):
                    self._end(one, False)
                    continue
                with self._lock:
                    self._due.insert(0, one)
                break
            except Exception as error:
                self._failed(one, error)
        return started

    def _finish(self, asked: list[_Waiting]) -> list[_Waiting]:
        """Compare what is answered, in the order in which it was asked, as what takes long may
        differ more often; what is not answered yet."""
        for place, one in enumerate(asked):
            if not one.handle.done():
                return asked[place:]
            try:
                self._compare(one)
                self._end(one, True)
            except Exception as error:
                self._failed(one, error)
        return []

    def _failed(self, one: _Waiting, error: Exception) -> None:
        said = error.problem if isinstance(error, OfframpError) else repr(error)
        log.warning("A watched request could not be compared: %s", said)
        self._end(one, False)

    def _end(self, one: _Waiting, compared: bool) -> None:
        """Finish a sample that was chosen."""
        with self._lock:
            self._over(one.sample.client)
            if compared:
                self._note(True)
            elif not self._closed.is_set():
                self._lost()

    def _over(self, client: str) -> None:
        """A sample of a client waits no more; call with the lock held."""
        self._waiting[client] -= 1
        self._waiting += Counter()  # drops those at 0

    def _compare(self, one: _Waiting) -> None:
        sample = one.sample
        [early] = answers_of(sample.output, self._encoder)
        [full] = answers_of(one.handle.result().output, self._encoder)
        loss = self._loss(early, full)
        if self.promise is not None:
            loss *= self.promise.least / self.promise.target_of(self._kind_of(sample.prompt))
        with self._lock:
            before = self.broken
            risk = self.risk if sample.like else self.others
            risk.add(loss * one.times, one.name if self._by_answer else "")
            if self.judged is not None and sample.like:
                answer = _Compared(early, full, sample.prompt, one.name, one.times)
                self._compared[sample.id] = answer
                if len(self._compared) > JUDGED:
                    self._compared.popitem(last=False)
            self._save()
        self._keep(one.name, sample, early, full, loss)
        if self.broken and not before:
            self._warn()

    @property
    def _free(self) -> bool:
        """Whether there is a slot that no request needs."""
        engine = self._engine
        return not engine.waiting and engine.running < engine.core.config.slots

    def _lost(self) -> None:
        """Count a watched request that was not compared; call with the lock held."""
        self.let_go += 1
        self._note(False)

    def _note(self, compared: bool) -> None:
        """Count towards the coverage, and say where too little is seen."""
        self._covered.append(compared)
        coverage = self.coverage
        if coverage is None:
            return
        blind = coverage < (SEES if self.blind else COVERAGE)
        if blind != self.blind:
            self.blind = blind
            event = "watch_blind" if blind else "watch_sees_again"
            log.warning(json.dumps({"event": event, "coverage": round(coverage, 3)}))

    # -- what is kept ------------------------------------------------------------------------------

    def _kept_risk(self) -> RunningRisk | None:
        """What was learnt of the same promise before a restart. Where the watch was another one, an
        alarm stays, and what else was learnt is not gone on with; either is said."""
        if self.config.state is None or not self.config.state.is_file():
            return None
        try:
            kept = read_json(self.config.state)
            of, about = kept["of"], json.loads(json.dumps(self._about))
            if any(of[name] != about[name] for name in ("about", "promise")):
                log.warning("The watch starts anew: %s is of another promise.", self.config.state)
                return None
            risk = RunningRisk.from_json(kept["risk"])
            self._alarm.restore(kept.get("alarm"))
            if of == about:
                new = self._new_risk()
                if (risk.promised, risk.level) != (new.promised, new.level):
                    raise ValueError("its numbers do not fit each other")
                if self.judged is not None:
                    self.judged = RunningRisk.from_json(kept["judged"])
                return risk
        except (OfframpError, KeyError, TypeError, ValueError, AttributeError):
            log.warning("%s says nothing of the watch; it starts anew.", self.config.state)
            return None
        said = ", ".join(name for name in about if of.get(name) != about[name])
        if risk.broken:
            log.warning(
                "The guarantee was called broken by a watch with another %s; that stays so until "
                "POST /v1/watch/reset.",
                said,
            )
            return risk
        log.warning("The watch starts anew: %s was made with another %s.", self.config.state, said)
        return None

    def _save(self) -> None:
        """Write the state; call with the lock held."""
        if self.config.state is None:
            return
        try:
            judged = None if self.judged is None else self.judged.to_json()
            learnt = {"risk": self.risk.to_json(), "judged": judged, "alarm": self._alarm.to_json()}
            write_json(self.config.state, {"of": self._about, **learnt}, follow=False)
        except StorageError as error:
            log.warning("What the watch learnt is not kept: %s", error.problem)

    def _keep(self, name: str, sample: Sample, early: Answer, full: Answer, loss: float) -> None:
        """Write a watched request as an example that `offramp calibrate` reads."""
        if self._log is None or self.config.keep is None:
            return
        file = self.config.keep / f"{name}.png"
        if sample.image is not None and not file.exists():
            sample.image.save(file)
        answer = {"answer": full.text} if full.text else {}
        answer |= {"id": sample.id} if sample.id else {}
        row = {"image": file.name, "prompt": sample.prompt, **answer, "early": early.text}
        self._log.append({**row, "loss": loss, "time": round(time.time(), 3)})

    def _warn(self) -> None:
        promise, told = self.promise, self.report()
        if self.judged is not None and self.judged.broken:
            promise, told = self._right, {"images": self.judged.n, **(told["judged"] or {})}
        assert promise is not None
        event = {
            "event": "guarantee_broken",
            "risk": promise.risk,
            "unit": promise.unit,
            "promised": promise.target,
            "lower_bound": told["lower"],
            "images": told["images"],
            "action": self.config.action,
        }
        log.warning(json.dumps(event))


def _held(state: Path | None) -> ExitStack:
    """Keeps other watchers from a state file until it is closed: of two, the one that saves last
    would write over the other's alarm. A file that cannot be written is left to `_save`, which says
    so.

    Raises:
        StorageError: another one has it.
    """
    held = ExitStack()
    if state is None:
        return held
    file = Path(os.path.realpath(state))
    try:
        check_writable(file)
    except StorageError:
        return held
    try:
        held.enter_context(locked_folder(file.parent, f"{file.name}.lock"))
    except StorageError as error:
        raise StorageError(
            f"Another server has {state}, where the watch keeps what it learns.",
            "Stop it, or give each a file of its own: --watch state=FILE.",
        ) from error
    return held
