"""When tokens exit early, and what a generation returns."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from offramp.core.decoding.confidence import (
    check_levels,
    check_numbers,
    check_score,
    check_thresholds,
    check_trust,
)
from offramp.core.decoding.drafting import DRAFTERS
from offramp.core.errors import InputError, check_known
from offramp.core.plugins import check_registered

if TYPE_CHECKING:
    from torch import Tensor  # policies are read where there is no PyTorch

    from offramp.core.models.backbone import Backbone
    from offramp.core.models.exits import ExitSet

Mode = Literal["full", "early_exit", "lossless"]
MODES: tuple[Mode, ...] = get_args(Mode)
"""Exits are off; end a token; or only draft it, and the full model verifies."""
DRAFT = 0.5
"""Score from which trained exits draft until `calibrate --lossless` finds what is fastest: a token
that is likelier right than wrong."""
AHEAD = 0.1
"""The same of an exit that drafts on: product of the probabilities of a round's drafts. They are
right far oftener than they are held to be (docs/decoding.md)."""


class Thresholds(dict[int, float]):
    """A number for each exit, by depth in ascending order. Immutable. In JSON, depths are text."""

    def __init__(self, by_depth: Mapping[int, float] | Iterable[tuple[int, float]] = ()) -> None:
        super().__init__(sorted(check_numbers(dict(by_depth)).items()))

    @classmethod
    def shared(cls, depths: Sequence[int], value: float) -> Thresholds:
        """Return the same number at each of `depths`."""
        return cls(dict.fromkeys(depths, value))

    @classmethod
    def from_json(cls, value: Mapping[str, float]) -> Thresholds:
        """Return the thresholds that `to_json` wrote."""
        return cls({int(depth): number for depth, number in value.items()})

    def to_json(self) -> dict[str, float]:
        return {str(depth): number for depth, number in self.items()}

    def __str__(self) -> str:
        """Return the thresholds for people: "0.9 at depth 2, 0.6 at depth 4"."""
        return ", ".join(f"{number:g} at depth {depth}" for depth, number in self.items())


_BY_DEPTH = ("thresholds", "drafts", "first")
RETIRED = ("guesses", "weights", "gates")
"""Fields of earlier versions, which gained nothing: guesses between early exits were slower in 14
of 18 loads, gates paid at no exit that shipped, and weights belonged to a score that was never
faster than the largest probability."""
EXACT = "recompute"
"""Keys and values of the layers that a token skipped, as files name them: exact, and the only ones
since approximate ones gained nothing."""
ALL = 1.0
"""Share of the visual tokens that the layers above an exit read, as files name it: all, since
leaving some out lost more quality than it gained time."""


@dataclass(frozen=True)
class ExitPolicy:
    """The policy by which tokens exit early.

    thresholds: by depth, in [0, 1]; a token exits at the first depth where score >= threshold. A
        depth that is missing, or None, is off and costs nothing; at one with 0 every token exits,
        and no score is computed there. Empty: the full model.
    score: a key of `SCORES` (one exit's logits), or a registered one (`register_score`).
    lossless: exits only draft, and the full model verifies (`offramp.core.decoding`): the
        output is the full model's. Thresholds then decide speed, not quality.
    max_draft: longest draft before the full model is asked.
    drafts: thresholds that lossless drafts by, where there are any, instead of `thresholds`, which
        are about final exits; of an exit that drafts on, of the product of a round's drafts.
        `calibrate --lossless` finds the fastest. Or a registered drafter by its name, and the level
        that it takes: {"ngram": 0.0} (`offramp.register_drafter`).
    shortlist: exits read only the tokens of the adapter's shortlist, and can say no others; scores
        are over these (`offramp.features.shortlist`).
    first: by depth; thresholds of an answer's first token, with which the prompt may wait at its
        exit until a later token needs it deeper: exact too. A depth that is missing, or that
        `thresholds` miss, is off. None: those of every token, where the prompt is causal, which the
        backbone's family says (see `resolved`). Empty: prompts run to full depth.
    trust: in place of thresholds: exits draft as in lossless mode, and drafts that end the answer
        are taken unverified if the product of their probabilities is at least `trust`: at 0 all,
        above 1 none. Only plain greedy answers are taken. None: by thresholds.
    Raises:
        InputError: an unknown score, thresholds that are no numbers or outside [0, 1], a trust that
            is no number from 0, or drafts of no token.
    """

    thresholds: Mapping[int, float] = field(default_factory=dict)
    score: str = "max_probability"
    lossless: bool = False
    max_draft: int = 8
    drafts: Mapping[Any, float] = field(default_factory=dict)
    shortlist: bool = False
    first: Mapping[int, float] | None = None
    trust: float | None = None

    def __post_init__(self) -> None:
        check_score(self.score)
        check_trust(self.trust)
        if type(self.max_draft) is not int or self.max_draft < 1:
            raise InputError(
                f"A draft of at most {self.max_draft!r} tokens is no draft.",
                "Give a whole number from 1; 4 to 16 are usual.",
            )
        if self.drafter is not None:
            check_registered("Drafter", "drafters", self.drafter, lambda: DRAFTERS)
        for name in _BY_DEPTH:
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, Thresholds(check_levels(dict(given))))

    @property
    def drafter(self) -> str | None:
        """Name of the registered drafter that lossless drafts by; None: exits draft."""
        return next((name for name in self.drafts if isinstance(name, str)), None)

    @property
    def drafting(self) -> bool:
        """Return True if answers of the policy's own mode are drafted."""
        return self.own_mode == "lossless" or self.trust is not None

    @property
    def exit_in_prefill(self) -> bool:
        """Return True if first tokens may exit in a causal prompt, which then waits at the exit."""
        return self.first is None or bool(self.first)

    @property
    def decides(self) -> tuple[str, str]:
        """Return whether early exit follows trust or thresholds, and these in words, such as
        ("thresholds", "0.9 at depth 2"). Without any the words are empty."""
        if self.trust is not None:
            return "trust", f"{self.trust:g}"
        return "thresholds", str(Thresholds(self.thresholds))

    @property
    def effective(self) -> ExitPolicy:
        """Return the policy with the thresholds in use: where exits draft, `drafts` if given."""
        if not (self.drafting and self.drafts):
            return self
        return replace(self, thresholds={} if self.drafter else self.drafts)

    @property
    def depths(self) -> tuple[int, ...]:
        """Return the depths at which tokens exit or are drafted, ascending."""
        drafting = () if self.drafter else self.drafts
        return tuple(sorted({*self.thresholds, *drafting}))

    @property
    def opening(self) -> Thresholds:
        """The thresholds of an answer's first token, where it may exit."""
        if not self.first:
            return Thresholds(self.thresholds)
        return Thresholds({d: t for d, t in self.first.items() if d in self.thresholds})

    def at(self, thresholds: Mapping[int, float]) -> ExitPolicy:
        """Return the policy with thresholds in place of its own and of its trust. First tokens keep
        their own where these are stricter."""
        if not self.first:
            return replace(self, thresholds=thresholds, trust=None)
        first = {d: max(t, thresholds[d]) for d, t in self.first.items() if d in thresholds}
        if not first:  # none of its depths is left
            first = Thresholds.shared([*thresholds], max(self.first.values()))
        return replace(self, thresholds=thresholds, first=first, trust=None)

    def moved(self, point: Mapping[int, float] | None) -> ExitPolicy:
        """Return the policy at a point of its path (thresholds or trust by depth); None:
        unchanged."""
        if point is None:
            return self
        if self.trust is not None:
            return replace(self, trust=min(point.values()))
        first = self.first and {d: t for d, t in self.first.items() if d in point}
        return replace(self, thresholds=point, first=first)

    @property
    def own_mode(self) -> str:
        """Return the mode of a request that names none: early exit where thresholds or trust are
        known, else lossless where drafts are, else full."""
        if self.lossless:
            return "lossless"
        if self.thresholds or self.trust is not None:
            return "early_exit"
        return "lossless" if self.drafts else "full"

    def asked(
        self,
        mode: str | None,
        thresholds: Mapping[int, float] | None,
        depths: tuple[int, ...],
        point: Mapping[int, float] | None = None,
    ) -> ExitPolicy:
        """Return the policy of a request. Modes are applied to policies here alone.

        mode: of `MODES`; None: the policy's own, or early exit where thresholds are given.
        thresholds: by depth, in place of the policy's. depths: of exits that run. point: see
        `moved`.

        Raises:
            InputError: an unknown mode; exits that are wanted and do not run, or have no
                thresholds; thresholds where no exit runs, or outside [0, 1].
        """
        if point is not None:
            return self.moved(point).asked(mode, thresholds, depths)
        own = mode is None and thresholds is None
        mode = self.own_mode if own else mode or "early_exit"
        check_known("Mode", [mode], MODES)
        if mode == "full" or (own and not depths):
            return FULL
        if not depths and not (mode == "lossless" and self.drafter):
            raise InputError(
                "A request wants exits, and the engine runs none.",
                "Give the engine an adapter whose policy has thresholds, or use mode='full'.",
            )
        if mode == "lossless":
            return self._drafting(True)
        if thresholds is not None:
            return self.at(check_thresholds(dict(thresholds), depths))._drafting(False)
        if not self.thresholds and self.trust is None:
            raise InputError(
                "A request wants to exit early, and these exits have no thresholds.",
                "Find some with `offramp calibrate`, give thresholds, or use mode='lossless'.",
            )
        return self._drafting(False)

    def in_mode(self, mode: str | None) -> ExitPolicy:
        """The same thresholds in one of `MODES`; None: the policy as it is.

        Raises:
            InputError: the mode is not known, or lossless with keys and values that are not exact.
        """
        if mode is None:
            return self
        check_known("Mode", [mode], MODES)
        return FULL if mode == "full" else self._drafting(mode == "lossless")

    def _drafting(self, lossless: bool) -> ExitPolicy:
        return self if self.lossless is lossless else replace(self, lossless=lossless)


def check_policy_depths(policy: ExitPolicy, depths: tuple[int, ...]) -> None:
    """Raise `InputError` where the policy names a depth at which no exit stands."""
    drafts = {} if policy.drafter else policy.drafts
    for thresholds in (policy.thresholds, policy.first or {}, drafts):
        check_thresholds(dict(thresholds), depths)


FULL = ExitPolicy()
"""Every token at full depth."""


def resolved(policy: ExitPolicy, backbone: Backbone) -> ExitPolicy:
    """Return the policy as it runs on this backbone and as adapters store it: first tokens exit
    early only where the prompt is causal."""
    if policy.exit_in_prefill and backbone.family.causal_prompt:
        return policy
    own = policy.first if backbone.is_encoder_decoder else None
    return replace(policy, first=own or {})


def first_token_may_exit(backbone: Backbone, policy: ExitPolicy) -> bool:
    """Return True if an answer's first token may exit early.

    Of a decoder-only model, if the policy allows it and the prompt is causal; of an encoder-decoder
    always, because the first token comes from a step of the decoder.
    """
    in_prompt = policy.exit_in_prefill and backbone.family.causal_prompt
    return backbone.is_encoder_decoder or in_prompt


def shortlist_of_policy(policy: ExitPolicy, exits: ExitSet | None) -> Tensor | None:
    """Return the token ids [S] that exits can say under `policy`; None: all. Raise `InputError`
    where the policy needs a shortlist and the exits have none."""
    if not policy.shortlist:
        return None
    if exits is None or exits.shortlist is None:
        raise InputError(
            "The policy asks for a shortlist, and the adapter has none.",
            "Learn one: offramp train --shortlist 2048; or use a policy with shortlist=False.",
        )
    return exits.shortlist


@dataclass(frozen=True)
class GenerationOutput:
    """The answers of `generate`, with the depth and score of each token.

    sequences: token ids [B, T], prompt included where HF's `generate` includes it.
    depths: decoder layers run for each new token [B, N]; 0 where a finished row is padded.
    scores: confidence [B, N] at the last exit that checked the token (with which it exited, if it
        did); NaN where none did, and at a threshold of 0, where no score is computed.
    layers: depth L of the full model.
    rounds: (drafted, accepted) tokens of each round of drafts that were verified. In lossless mode
        an accepted draft counts at the depth of the exit that wrote it, though the full model
        confirmed it; by trust only drafts that were taken do.
    offers: by trust, of each row all drafts that ended the answer, as of `Sequence.offers`.
    """

    sequences: Tensor
    depths: Tensor
    scores: Tensor
    layers: int
    rounds: tuple[tuple[int, int], ...] = ()
    offers: tuple[tuple[tuple[float, tuple[int, ...]], ...], ...] = ()

    @classmethod
    def of_rows(
        cls,
        ids: Tensor,
        rows: Sequence[Sequence[Any]],
        layers: int,
        rounds: Sequence[Sequence[tuple[int, int]]] = (),
        pad: int = 0,
        offers: Sequence[Sequence[tuple[float, tuple[int, ...]]]] = (),
    ) -> GenerationOutput:
        """Make the output of answers as tokens with their depths and scores, one list a row.

        ids: the prompt's [B, T]. pad: the id that fills up shorter rows.
        """
        import torch

        longest = max(map(len, rows))

        def tensor(name: str, fill: Any, **kw: Any) -> Tensor:
            values = [
                [*(getattr(token, name) for token in row), *[fill] * (longest - len(row))]
                for row in rows
            ]
            return torch.tensor(values, device=ids.device, **kw)

        return cls(
            torch.cat([ids, tensor("token", pad, dtype=ids.dtype)], 1),
            tensor("depth", 0),
            tensor("score", float("nan"), dtype=torch.float32),
            layers,
            tuple(each for row in rounds for each in row),
            tuple(map(tuple, offers)),
        )

    @property
    def new_tokens(self) -> Tensor:
        """The generated ids [B, N]."""
        return self.sequences[:, self.sequences.shape[1] - self.depths.shape[1] :]

    def decode(self, processor: Any, *, skip_special_tokens: bool = True) -> list[str]:
        """The answers as text, one a row, without the spaces around them.

        processor: the model's processor or its tokenizer.
        """
        tokenizer = getattr(processor, "tokenizer", processor)
        texts = tokenizer.batch_decode(self.new_tokens, skip_special_tokens=skip_special_tokens)
        return [text.strip() for text in texts]

    @property
    def mean_depth(self) -> float:
        """Mean depth over all generated tokens, those at full depth included."""
        ran = self.depths[self.depths > 0]
        return float(ran.float().mean()) if ran.numel() else 0.0


def policy_entries(policy: ExitPolicy) -> dict[str, Any]:
    """Return all entries of a policy, as JSON (`offramp.core.storage.schema.Policy`)."""
    return {
        "thresholds": Thresholds(policy.thresholds).to_json(),
        "score": policy.score,
        "kv": EXACT,
        "exit_in_prefill": policy.exit_in_prefill,
        "lossless": policy.lossless,
        "max_draft": policy.max_draft,
        "drafts": Thresholds(policy.drafts).to_json(),
        "shortlist": policy.shortlist,
        "first": Thresholds(policy.first or {}).to_json(),
        "visual_keep": ALL,
        **{name: {} for name in RETIRED},
        **({} if policy.trust is None else {"trust": policy.trust}),
    }


def policy_to_json(policy: ExitPolicy) -> dict[str, Any]:
    """Return a policy as JSON. Without newer fields it equals what earlier versions wrote, because
    attempts and certificates are identified by that text."""
    told = policy_entries(policy)
    del told["visual_keep"]
    return {name: value for name, value in told.items() if name != "first" or policy.first}


def policy_from_json(value: Mapping[str, Any]) -> ExitPolicy:
    """Return the policy that this or an earlier version of `policy_to_json` wrote. Without an entry
    for first tokens, first tokens do not exit. Warn of fields that are no longer read."""
    said = [name for name in RETIRED if value.get(name)]
    exact = {"kv": EXACT, "visual_keep": ALL}
    said += [name for name, only in exact.items() if value.get(name, only) != only]
    if said:
        warnings.warn(
            f"The policy has {' and '.join(said)}, which this version leaves out: they gained "
            "nothing. Its thresholds decide as before; calibrate again where gates, weights, "
            "approximate keys and values or fewer visual tokens did.",
            stacklevel=2,
        )
    first = Thresholds.from_json(value.get("first", {}))
    plain = ("score", "lossless", "max_draft", "shortlist", "trust")
    return ExitPolicy(
        thresholds=Thresholds.from_json(value["thresholds"]),
        drafts={
            name if name.isidentifier() else int(name): level
            for name, level in value.get("drafts", {}).items()
        },
        first=first or (None if value.get("exit_in_prefill", False) else {}),
        **{name: value[name] for name in plain if name in value},
    )
