"""How closely a guarantee is watched."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from offramp.common.options import option
from offramp.core.errors import InputError, check_known

ACTIONS = ("lossless", "full", "warn")
"""What answers are once the promise is broken: lossless, the full model's, or as before."""


@dataclass(frozen=True)
class WatchConfig:
    """Settings of the watch.

    share: of requests that the full model answers too. level: probability, at most, that a promise
    that holds is ever called broken. slack: factor on the promised risk for the alarm: 1 for a risk
    that is at most the promised one at each time; 2 or 3 where that holds only on average, as under
    bursts of one user or a daily cycle. action: of `ACTIONS`. keep: folder for images, prompts and
    answers of watched requests, on which thresholds can be calibrated; only with the users'
    consent. backlog: watched requests that may wait for the full model; others are skipped.
    deadline: seconds of waiting for a free slot, after which a watched request takes a slot like a
    user's. a_client: largest share of the backlog, and of the draws while others ask too, for one
    client. state: file that keeps the state over a restart. frequencies: for a guarantee of
    `cider_drop`, captions of other images, which weigh the words of judged answers. watchers:
    replicas that share the level, each with its own watch.

    Raises:
        InputError: a number outside its range, an unknown action, a file that is not there.
    """

    share: float = option(
        0.01,
        "share of requests that the full model answers too, in slots that nobody needs or after "
        "the deadline; 0: none",
        share=True,
    )
    level: float = option(
        0.01, "how often, at most, a guarantee that holds is ever called broken", share=True
    )
    slack: float = option(
        1.0,
        "raise the alarm at this many times the guaranteed risk; 2 or 3 where the risk comes in "
        "bursts",
    )
    action: str = option(
        "lossless", "what answers are once the guarantee is broken", choices=ACTIONS
    )
    keep: Path | None = option(
        None,
        "folder for images and prompts of watched requests, for `offramp calibrate`; only with the "
        "consent of those who ask",
    )
    backlog: int = 32
    deadline: float = option(
        30.0, "longest wait for a free slot in seconds; then the full model's answer takes one"
    )
    a_client: float = 0.5
    state: Path | None = option(
        None,
        "file that keeps what was learnt over a restart",
        shown="one of this adapter in ~/.local/state/offramp",
    )
    frequencies: Path | None = option(
        None,
        "of a guarantee of cider_drop, captions of other images (JSON Lines) as for `offramp "
        "calibrate`, so that people's captions count by POST /v1/watch/answer",
    )
    watchers: int = 1

    def __post_init__(self) -> None:
        if not (0 < self.share <= 1 and 0 < self.level < 1):
            raise InputError(
                f"A share of {self.share} watched at level {self.level} tells nothing.",
                "Give numbers above 0 and below 1, such as 0.01 and 0.01.",
            )
        finite = math.isfinite(self.slack) and math.isfinite(self.deadline)
        if not (finite and self.slack >= 1 and self.deadline >= 0 and self.watchers >= 1):
            raise InputError(
                f"A watch with slack {self.slack}, a deadline of {self.deadline} seconds and "
                f"{self.watchers} watchers cannot run.",
                "Give a finite slack and a number of watchers from 1, and a finite deadline from "
                "0.",
            )
        if not 0 < self.a_client <= 1:
            raise InputError(
                f"A client's share of {self.a_client} is none.", "Give one up to 1, such as 0.5."
            )
        check_known("Action", [self.action], ACTIONS)
        if self.frequencies is not None and not self.frequencies.is_file():
            raise InputError(
                f"There is no file {self.frequencies} of captions to weigh words by.",
                "Name one, as --watch frequencies=captions.jsonl, or leave it out.",
            )
