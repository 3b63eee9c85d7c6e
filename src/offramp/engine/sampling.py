"""The tokens of one generation so far, and the rules for the next: HF's, as it prepared them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.engine.policy import GenerationOutput
from offramp.engine.prefill import Prepared


class SequenceState:
    """Chooses, emits and stops as HF's `generate` would.

    ids: token ids so far [B, T]. unfinished: rows [B] still being written. trace: for each emitted
    token the rows it was live in, their depths and their scores, [B] each.
    """

    def __init__(self, prepared: Prepared, streamer: Any = None) -> None:
        """streamer: Hugging Face's; if it has `step`, that is told of each token's depth too."""
        ids, config, criteria = prepared.ids, prepared.config, prepared.criteria
        self.ids = ids
        self.samples = bool(config.do_sample)
        self.unfinished = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        self.trace: list[tuple[Tensor, Tensor, Tensor]] = []
        self._processors, self._criteria, self._streamer = prepared.processors, criteria, streamer
        self._step = getattr(streamer, "step", None)
        eos = [c.eos_token_id for c in criteria if hasattr(c, "eos_token_id")]
        self._eos: Tensor | None = eos[0].to(ids.device) if eos else None
        self._pad: Tensor | None = config._pad_token_tensor
        if streamer is not None:
            streamer.put(ids.cpu())

    @property
    def live(self) -> int:
        """How many rows are unfinished."""
        return int(self.unfinished.sum())

    @property
    def written(self) -> Tensor:
        """Rows [B] whose next token matters. Without an end token HF writes on in finished rows."""
        return self.unfinished if self._eos is not None else torch.ones_like(self.unfinished)

    def process(self, logits: Tensor, ids: Tensor | None = None) -> Tensor:
        """Logits [B, V] after HF's processors and warpers, float32, for the token after `ids`."""
        ids = self.ids if ids is None else ids
        # A copy: a processor may write into what it is given.
        return self._processors(ids, logits.to(ids.device, torch.float32, copy=True))  # type: ignore[no-any-return]

    def draw(self, scores: Tensor) -> Tensor:
        """Tokens [B]: sampled, or the largest."""
        if self.samples:
            return torch.multinomial(scores.softmax(-1), 1).squeeze(1)
        return scores.argmax(-1)

    def choose(self, logits: Tensor) -> Tensor:
        """The next token [B] for raw logits [B, V]."""
        return self.draw(self.process(logits))

    def emit(self, tokens: Tensor, depths: Tensor, scores: Tensor) -> None:
        """Write one token [B] for each row; finished rows get padding instead."""
        if self._eos is not None and len(tokens) > 1:
            assert self._pad is not None
            tokens = torch.where(self.unfinished, tokens, self._pad)
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        self.trace.append((self.unfinished, depths, scores))
        self._tell(tokens, depths, scores)
        self.unfinished = self.unfinished & ~self._criteria(self.ids, None)

    def _tell(self, tokens: Tensor, depths: Tensor, scores: Tensor) -> None:
        if self._streamer is not None:
            self._streamer.put(tokens.cpu())
        if self._step is not None:
            self._step(tokens, depths, scores)

    def would_end(self, ids: Tensor) -> bool:
        """Whether writing `ids` [B, T] would finish a row, by its end token or by length."""
        longest = self._criteria.max_length
        if longest is not None and ids.shape[1] >= longest:
            return True
        if self._eos is None:
            return False
        return bool((torch.isin(ids[:, -1], self._eos) & self.unfinished).any())

    def end(self) -> None:
        """Tell the streamer that nothing more comes."""
        if self._streamer is not None:
            self._streamer.end()

    def output(self, layers: int, rounds: Sequence[tuple[int, int]] = ()) -> GenerationOutput:
        """What was written. layers: depth of the full model. rounds: of drafts."""
        live, depths, scores = (torch.stack(column, 1) for column in zip(*self.trace, strict=True))
        return GenerationOutput(
            self.ids,
            torch.where(live, depths, 0),
            torch.where(live, scores.float(), float("nan")),
            layers,
            tuple(rounds),
        )

    def constraints(self, ids: Callable[[], Tensor]) -> Callable[[Tensor], Tensor] | None:
        """The processors that say what may come (minimum length, repetition penalty, the user's
        own), without the warpers that only shape sampling (temperature, top-k, top-p, ...).

        ids: returns the tokens so far [B, T] at the time of the call.
        """
        hard = [p for p in self._processors if not type(p).__name__.endswith("Warper")]
        if not hard:
            return None
        chain = type(self._processors)(hard)
        return lambda logits: chain(ids(), logits.to(torch.float32, copy=True))


class ActiveRows:
    """Which rows of a batch are still generated: picks them, and puts results back in place.

    total: rows of the batch.
    rows: their indices [b], or None while all are.
    """

    def __init__(self) -> None:
        self.total: int | None = None
        self.rows: Tensor | None = None

    def keep(self, written: Tensor, live: int) -> Tensor | None:
        """Keep the rows `written` [B] alone, the last one in any case.

        live: how many are unfinished; compared first, for `written` costs a transfer. Returns
        which of those kept so far stay, None where all do.
        """
        self.total = len(written)
        count = self.total if self.rows is None else len(self.rows)
        if live == count:
            return None
        stay = self.pick(written).nonzero()[:, 0]
        if len(stay) in (0, count):
            return None
        self.rows = stay if self.rows is None else self.rows[stay]
        return stay

    def pick(self, value: Tensor) -> Tensor:
        """The kept rows of all [B, ...]."""
        return value if self.rows is None else value[self.rows.to(value.device)]

    def pick_arguments(self, kw: dict[str, Any]) -> dict[str, Any]:
        """A stack's arguments for the kept rows: of tensors and masks, what has all rows."""
        if self.rows is None:
            return kw
        picked = dict(kw)
        for name, value in kw.items():
            dim = -2 if name == "position_ids" else 0  # these may have an axis before the rows
            if isinstance(value, dict):
                picked[name] = self.pick_arguments(value)
            elif isinstance(value, Tensor) and value.dim() > 1 and value.shape[dim] == self.total:
                picked[name] = value.index_select(dim, self.rows)
        return picked

    def spread(self, value: Tensor, fill: float) -> Tensor:
        """Back to all rows [B, ...]; those that are not kept are `fill`."""
        if self.rows is None:
            return value
        assert self.total is not None
        whole = value.new_full((self.total, *value.shape[1:]), fill)
        return whole.index_copy_(0, self.rows, value)

    def gathered(self, whole: Any) -> Any:
        """A function of the kept rows' logits [b, V] out of one of all rows', `whole`."""
        if self.rows is None or whole is None:
            return whole
        return lambda logits: whole(self.spread(logits, 0.0))[self.rows]
