"""What was answered is read again by the model itself.

After the first answer of each shape of prompt, and of a share of all, the model reads the prompt
and then the answer in one call on its own cache, and the logits of every token of full depth are
held to those. What was served is what is checked: no list of kinds, families or patches decides.
What fails is written by the model's own forward pass from then on.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LogitsProcessorList

from offramp.core.decoding.policy import GenerationOutput
from offramp.core.decoding.sequence import NAN
from offramp.core.engine.sampler import Constraint, Observer, Sampler
from offramp.core.errors import UnsupportedBackboneError
from offramp.core.executors.kv_cache import CACHE_NAMES, cache_name
from offramp.core.executors.prefill import Prepared
from offramp.core.models.backbone import Backbone
from offramp.core.models.change import HOOKS, is_recorder
from offramp.core.models.discovery.comparison import relative_difference
from offramp.core.models.discovery.probe import special_ids
from offramp.core.models.discovery.twin import graft, twin
from offramp.core.models.weights import scheme

log = logging.getLogger(__name__)

DEEP = 1
"""The token of a trial that may not exit: those before it catch up on the way."""
TRIAL = 4
"""Tokens of a trial, where a first answer has no token of full depth."""
_WIDE, _HALF = 5e-5, 8e-2
"""Largest difference of logits that is rounding, relative to the largest: in float32, and in half
precision or over quantised weights. Right ones are off by 1e-6 to 3e-6 in float32."""
_COLUMNS = 512
"""Of the logits, about as many are compared."""
_SLOWLY = 64
"""Tokens that are read one by one, where in one call they come out otherwise."""
_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


@dataclass(eq=False)
class Kept:
    """Raw logits that tokens were chosen from, by row and place in the answer.

    deep: place of a token that may not exit; None: any token may. most: tokens of the answer, at
    most; None: as many as were asked for.
    """

    deep: int | None = None
    most: int | None = None
    logits: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def of(self, sampler: Sampler) -> None:
        """Make a sampler store the logits that it chooses from."""
        row = sampler.row

        def keep(place: int, logits: Tensor) -> None:
            self.logits[row, place] = logits[columns(logits.shape[-1])].float()

        sampler.keep, sampler.deep = keep, self.deep
        if self.most is not None:
            sampler.most = self.most


def columns(words: int) -> slice:
    """Return the slice of the logits that is compared."""
    return slice(None, None, max(1, words // _COLUMNS))


@dataclass(frozen=True, eq=False)
class Case:
    """One request that can be prepared again.

    given: its inputs. fresh: prepares the request for the decoder. own: calls `within` with the
    inputs that the model's own `generate` prepared, and returns its result.
    """

    backbone: Backbone
    given: Mapping[str, Any]
    fresh: Callable[[], Prepared]
    own: Callable[[Callable[[Prepared], Any]], tuple[Any, Any]]


# -- shapes ----------------------------------------------------------------------------------------


def shape_of(backbone: Backbone, inputs: Mapping[str, Any], how: Any) -> Any:
    """Return a key that is equal for all inputs with the same way through the model.

    Lengths count by powers of two. Flags, modes, token types and image tokens count by value, and
    by whether they stand in several places. how: the way in which the inputs are answered.
    """
    readings = backbone.readings
    if readings.marks is None:
        readings.marks = frozenset(special_ids(backbone.model))
    marks = readings.marks
    return how, tuple(sorted((name, _look(name, value, marks)) for name, value in inputs.items()))


def _look(name: str, value: Any, marks: Set[int]) -> str:
    if not isinstance(value, Tensor):
        plain = isinstance(value, (bool, int, float, str, type(None)))
        return repr(value) if plain else type(value).__name__
    sizes = [size.bit_length() for size in value.shape]
    more: Any = None
    if not value.is_floating_point() and value.numel():
        if name.endswith("ids") and "type" not in name:
            rows = value.reshape(-1, value.shape[-1]).tolist()
            held = sorted(marks & {token for row in rows for token in row})
            more = [(mark, min(2, max(_runs(row, mark) for row in rows))) for mark in held]
        elif value.numel() <= 2:
            more = value.tolist()
        elif int(value.max()) - int(value.min()) < 8:
            more = torch.unique(value).tolist()
    return f"{value.dtype} {sizes} {more}"


def _runs(row: Sequence[int], mark: int) -> int:
    """In how many places a mark stands in a row of tokens, once or several times."""
    return sum(a == mark != b for a, b in pairwise([*row, -1]))


# -- reading ---------------------------------------------------------------------------------------


@contextmanager
def untouched(backbone: Backbone) -> Iterator[None]:
    """Run the model itself, one thread at a time, on copies of its buffers; attributes that it sets
    on its modules are removed afterwards."""
    model, tower = backbone.model, backbone.tower
    inside = {id(vars(part)) for top in (backbone.stack, backbone.head) for part in top.modules()}
    apart = set() if tower is None else {*tower.tower.modules()}  # it does not run, and is compared
    with _LOCKS.setdefault(model, threading.RLock()), torch.inference_mode():
        own = [
            (vars(module), dict(vars(module)), module._buffers, dict(module._buffers))
            for module in model.modules()
            if module not in apart
        ]
        copies: dict[int, Tensor] = {}  # as some write into theirs
        for _, _, buffers, held in own:
            for name, value in held.items():
                if value is not None:
                    buffers[name] = copies.setdefault(id(value), value.clone())
        try:
            yield
        finally:
            for now, before, buffers, held in own:
                changed = [n for n in {*now, *before} if now.get(n, own) is not before.get(n, own)]
                changed = [name for name in changed if "output_capturing" not in name]
                backbone.readings.kept |= bool(changed) and id(now) in inside
                for name in changed:
                    if name in before:
                        now[name] = before[name]
                    else:
                        del now[name]
                buffers.update(held)


def has_own_loop(model: Any) -> bool:
    """Return True if the model's class replaces the loop that chooses tokens, or the update of its
    arguments between two steps."""
    kind: Any = type(model)
    step = kind._update_model_kwargs_for_generation.__module__
    return kind._sample is not GenerationMixin._sample or not step.startswith("transformers.")


def has_own_generate(model: Any) -> bool:
    """Return True if the model's class replaces `generate`."""
    return not str(getattr(model.generate, "__module__", "")).startswith("transformers.")


def own_model(backbone: Backbone) -> Any:
    """Return the model itself, with the engine of its vision tower if that has one."""
    if backbone.tower is None:
        return backbone.model
    root = twin(backbone.model)
    graft(root, str(backbone.family.vision), backbone.tower)
    for path, part in backbone.tower.beside.items():
        graft(root, path, part)
    return root


def read(prepared: Prepared, answers: Tensor, step: int) -> Tensor:
    """Return the logits [B, N, C] from which a model chooses the tokens [B, N] of an answer, by its
    own calls on its own cache, `step` tokens a call after the prompt."""
    model, kw, ids = prepared.model, dict(prepared.arguments), prepared.ids
    encoded = model.config.is_encoder_decoder
    given = model.prepare_inputs_for_generation(
        ids, is_first_iteration=True, next_sequence_length=None, **kw
    )
    if all(given.get(name) is None for name in CACHE_NAMES):
        given = {**given, cache_name(kw): prepared.cache}
    out = model(**given, return_dict=True)
    part = columns(out.logits.shape[-1])
    made = [out.logits[:, -1:, part].float()]
    for more in torch.split(answers[:, :-1], step, 1):
        count = more.shape[1]
        several = {"num_new_tokens": count} if count > 1 else {}
        kw = model._update_model_kwargs_for_generation(
            out, kw, is_encoder_decoder=encoded, **several
        )
        ids = torch.cat([ids, more.to(ids)], 1)
        given = model.prepare_inputs_for_generation(ids, next_sequence_length=count, **kw)
        given.pop("logits_to_keep", None)
        out = model(**given, return_dict=True)
        made.append(out.logits[:, -count:, part].float())
    return torch.cat(made, 1)


Outcome = float | str
"""The largest difference of logits, relative to the largest; or why there is none, in words."""


def difference(case: Case, output: GenerationOutput, kept: Kept, *, exact: bool) -> str | None:
    """Return in words how an answer differs from the model's own; None where it is equal."""
    found = off_by(case, output, kept, exact=exact)
    if isinstance(found, str):
        return found
    right = found <= rounding(case.backbone)
    return None if right else f"its logits are off by {found:.1e} of the largest"


def off_by(case: Case, output: GenerationOutput, kept: Kept, *, exact: bool) -> Outcome:
    """Return the largest difference of an answer's logits from those of the model itself.

    kept: the logits of the answer. exact: whether tokens of exits are the full model's too.
    """
    depths = output.depths.tolist()
    held = {
        (row, place): logits
        for (row, place), logits in kept.logits.items()
        if place < len(depths[row])
        and (depths[row][place] == output.layers or (exact and depths[row][place]))
    }
    if not held:
        return 0.0
    last = max(place for _, place in held) + 1
    answers = output.new_tokens[:, :last]
    if last > 1 and (not case.backbone.tested or _has_hooks(case.backbone.model)):
        return _apart(case, answers, held, 1)
    found = _apart(case, answers, held, last)
    if last == 1 or (isinstance(found, float) and found <= rounding(case.backbone)):
        return found
    # A model may read several tokens in one call otherwise than one by one: the latter is right.
    few = {at: logits for at, logits in held.items() if at[1] < _SLOWLY}
    return _apart(case, answers[:, : max(at[1] for at in few) + 1], few, 1) if few else found


def _has_hooks(model: nn.Module) -> bool:
    """Whether code besides its classes' runs in a model, which may tell a call from another."""
    tables = [vars(module)[table] for module in model.modules() for table in HOOKS[:2]]
    return any(not is_recorder(hook) for table in tables for hook in table.values())


def _apart(
    case: Case, answers: Tensor, held: Mapping[tuple[int, int], Tensor], step: int
) -> Outcome:
    with untouched(case.backbone):
        try:
            theirs, _ = case.own(lambda prepared: read(prepared, answers, max(1, step)))
        except Exception as error:  # whatever a model raises on a call that it does not take
            return f"it cannot be read again ({type(error).__name__}: {str(error)[:160]})"
        return max(
            relative_difference(logits, theirs[row, place].to(logits.device))
            for (row, place), logits in held.items()
        )


def rounding(backbone: Backbone) -> float:
    """Return the largest difference of logits that is rounding."""
    wide = backbone.dtype in (torch.float32, torch.float64)
    exact = wide and torch.get_float32_matmul_precision() == "highest"
    exact = exact and not torch.is_autocast_enabled(backbone.device.type)
    return _WIDE if exact and not scheme(backbone.layers) else _HALF


def tell(backbone: Backbone, why: str) -> None:
    """Warn that from here on answers are written by the model's own forward pass, and why."""
    log.warning(
        "%s: answers to prompts like this one are written by the model's own forward pass, without "
        "exits: read again by the model, an answer was another: %s.",
        backbone.name,
        why,
    )


# -- by the model's own forward pass ---------------------------------------------------------------


def by_model(
    case: Case, streamer: Any = None, seed: int | None = None, observer: Observer | None = None
) -> GenerationOutput:
    """Write the answer as the model's own `generate` does; every token is of full depth."""
    backbone, layers = case.backbone, case.backbone.depth
    drawn: Any = nullcontext() if seed is None else torch.random.fork_rng()

    def write(prepared: Prepared) -> Any:
        told = None if streamer is None else _Told(streamer, layers)
        if told is not None:
            streamer.put(prepared.ids.cpu())
        processors = LogitsProcessorList([_PerRow(prepared, observer)])
        out = prepared.model._sample(
            prepared.ids,
            processors,
            prepared.criteria,
            prepared.config,
            streamer=told,
            **prepared.arguments,
        )
        return SimpleNamespace(prepared=prepared, sequences=getattr(out, "sequences", out))

    with untouched(backbone), drawn:
        if seed is not None:
            torch.manual_seed(seed)
        written, made = case.own(write)
    if not isinstance(made, Tensor):
        raise UnsupportedBackboneError(
            f"{backbone.name} answers by a `generate` of its own, which returned no token ids but "
            f"a {type(made).__name__}.",
            "Call model.generate itself.",
        )
    prompt = written.prepared.ids
    start = prompt.shape[1] if torch.equal(made[:, : prompt.shape[1]], prompt) else 0
    depths = torch.full_like(made[:, start:], layers)
    for row, ids in enumerate(made[:, start:].tolist()):
        sampler = Sampler(written.prepared, min(row, len(prompt) - 1))
        ended = next((n for n, token in enumerate(ids) if sampler.ends(token)), len(ids))
        depths[row, ended + 1 :] = 0
    scores = torch.full(depths.shape, NAN)
    return GenerationOutput(made.clone(), depths, scores, layers, offers=((),) * len(made))


class _PerRow:
    """A request's processors, with rules of their own for each row, and its observer."""

    def __init__(self, prepared: Prepared, observer: Observer | None) -> None:
        self._prompt, self._observer = prepared.ids.shape[1], observer
        self._whole = prepared.processors
        own = any(isinstance(processor, Constraint) for processor in self._whole)
        self._rows = [Sampler(prepared, row) for row in range(len(prepared.ids))] if own else []

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        before = ids[:, self._prompt :].tolist()
        if self._rows:
            pairs = enumerate(zip(self._rows, before, strict=True))
            each = [row.processed(logits[n : n + 1], said) for n, (row, said) in pairs]
            logits = torch.cat(each)
        else:
            logits = self._whole(ids, logits)
        if self._observer is not None:
            for row in range(len(ids)):
                self._observer(row, ids.shape[1] - self._prompt, logits[row : row + 1])
        return logits


class _Told:
    """A streamer of Hugging Face's that tells of depths, too."""

    def __init__(self, streamer: Any, layers: int) -> None:
        self._streamer, self._layers = streamer, layers
        self.end = streamer.end

    def put(self, value: Tensor) -> None:
        self._streamer.put(value)
        if hasattr(self._streamer, "step"):
            depths = torch.full_like(value, self._layers)
            self._streamer.step(value, depths, torch.full(value.shape, NAN))


class Withheld:
    """A streamer's stand-in, which holds tokens back until the answer was read again."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._told: list[tuple[str, tuple[Any, ...]]] = []
        if hasattr(streamer, "step"):
            self.step = lambda *it: self._told.append(("step", it))

    def put(self, value: Tensor) -> None:
        self._told.append(("put", (value,)))

    def end(self) -> None:
        self._told.append(("end", ()))

    def forget(self) -> None:
        self._told.clear()

    def hand_on(self) -> None:
        for name, it in self._told:
            getattr(self._streamer, name)(*it)
        self._told.clear()
