"""Confidence scores, heads, drafters and kinds of exit of others, registered by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from offramp.core.decoding.confidence import FEATURE_SCORES, HEADS
from offramp.core.decoding.drafting import DRAFTERS
from offramp.core.decoding.scores import SCORES
from offramp.core.errors import InputError, did_you_mean
from offramp.core.models.exit_kinds import BUILT_IN, EXIT_KINDS, ExitKind

if TYPE_CHECKING:
    from torch import Tensor, nn

    from offramp.core.decoding.drafting import Drafter
    from offramp.core.decoding.executor import Executor
    from offramp.core.models.backbone import Backbone

ROUNDING = 1e-3
"""By which a score may miss [0, 1]: half precision's."""
_BUILT_IN = frozenset(SCORES)
_REGISTRIES: dict[str, dict[str, Any]] = {"logits": SCORES, "check": FEATURE_SCORES}


def register_score(name: str, score: Callable[..., Any], *, reads: str = "logits") -> None:
    """Register a confidence score under a name for policies, calibration and the command line.

    score: returns [B] in [0, 1], larger is safer. Its argument depends on `reads`:

    - "logits": one exit's logits [B, V].
    - "check": an `ExitCheck`: `state`, `entry`, `features` and, one decoder layer before the entry,
    `previous`, all [B, D]; `logits` [B, V], `depth`, `position` [B] in the answer from 0,
    `previous_token` [B]; `exits`. Calibration then decodes instead of replaying.

    Raises:
        InputError: the name is a built-in score's, or `reads` is none of these. At its first use:
            the score does not return [B] in [0, 1].
    """
    if name in _BUILT_IN:
        raise InputError(f"{name!r} is a built-in score.", "Register yours under another name.")
    if reads not in _REGISTRIES:
        raise InputError(f"A score cannot read {reads!r}.", did_you_mean(str(reads), _REGISTRIES))
    first = _FirstScores(name)

    def of_logits(logits: Tensor) -> Tensor:
        return first(score(logits), logits.shape[:-1])

    def of_check(check: Any) -> Tensor:
        return first(score(check), check.entry.shape[:1])

    _REGISTRIES[reads][name] = of_logits if reads == "logits" else of_check


def register_heads(name: str, heads: Callable[..., Any]) -> None:
    """Register a subclass of `ExitHeads` under a name for a policy's `score`: for confidence that
    needs more than one exit of one token.

    Calibration decodes with such heads instead of replaying scores.

    Raises:
        InputError: the name is a built-in score's.
    """
    if name in _BUILT_IN:
        raise InputError(f"{name!r} is a built-in score.", "Register yours under another name.")
    HEADS[name] = heads


def register_exit(
    name: str, build: Callable[[Backbone, int, Sequence[int]], nn.Module], *, entries: int = 1
) -> None:
    """Register a kind of exit under a name for training, adapters and the command line.

    build, entries: see `ExitKind`.

    Raises:
        InputError: the name is a built-in kind's, or there are no entries.
    """
    if name in BUILT_IN or entries < 1:
        raise InputError(
            f"Exits of kind {name!r} with {entries} cache entries cannot be registered.",
            f"Use another name than {', '.join(sorted(BUILT_IN))}, and at least one entry.",
        )
    EXIT_KINDS[name] = ExitKind(build, entries)


def register_drafter(name: str, make: Callable[[Executor, int], Drafter]) -> None:
    """Register a drafter under a name for a policy's `drafts`: `ExitPolicy(drafts={name: 0.0})`.

    make: gets an executor and the depth L of its model; see `Drafter`, and
    `offramp.extend.TextDrafts` for drafters that need the text alone.

    Raises:
        InputError: the name is not a word.
    """
    if not name.isidentifier():
        raise InputError(f"A drafter cannot be called {name!r}.", "Give a word: my_drafter.")
    DRAFTERS[name] = make


class _FirstScores:
    """Looks at the first scores that a registered one gives: at each token's it would cost time."""

    def __init__(self, name: str) -> None:
        self._name, self._seen = name, False

    def __call__(self, scores: Tensor, shape: Sequence[int]) -> Tensor:
        """`scores`; raise `InputError` where they are not of this shape and in [0, 1], to
        rounding."""
        if self._seen:
            return scores
        found: Any = getattr(scores, "shape", None)
        if found is None or tuple(found) != tuple(shape):
            what = type(scores).__name__ if found is None else f"shape {list(found)}"
            raise InputError(
                f"The score {self._name!r} gave {what} for {list(shape)} tokens.",
                f"Return a tensor of shape {list(shape)}, a number for each token.",
            )
        outside = scores[~((scores >= -ROUNDING) & (scores <= 1 + ROUNDING))]
        if len(outside):
            raise InputError(
                f"The score {self._name!r} gave {float(outside[0]):g}, outside [0, 1].",
                "Scale it: 0 where nothing is sure, 1 where all is.",
            )
        self._seen = True
        return scores
