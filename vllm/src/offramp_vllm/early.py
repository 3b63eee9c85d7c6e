"""A decoder's step with early exits: all rows run to the first exit, and those that are not certain
go on, with what waits of their requests, in one ragged call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from offramp_vllm.adapter import Exported
from offramp_vllm.compiled import Compiled, compiles, leave_uncompiled, tried
from offramp_vllm.drafts import Join
from offramp_vllm.kernels import Keys, product_of, take_kernels
from offramp_vllm.rows import (
    Flags,
    Ints,
    Ragged,
    fetched,
    first_waiting,
    leaves,
    put_off,
    rounds,
    sent,
    slots_of,
)
from offramp_vllm.scores import SCORES
from offramp_vllm.stages import Stages, decoder_of, layers_of
from offramp_vllm.store import Store


@dataclass
class Step:
    """What a step needs to know of its R requests, and what it decided.

    All of the host, but where a tensor is said. starts: where each request's tokens begin in the
    call, and their number [R + 1]. seq_lens: all tokens of each request [R], those of the call
    included. slots: of the call's tokens, a tensor [T]. table: block table [R, N] of blocks of
    `block_size`. asks: whether a token is to be chosen after the request's last one [R]. waits:
    whether the request's rows stay where they are [R]: a prompt that is not whole yet. thresholds:
    of each exit [E][R]; NaN: none leaves. allowed: takes rows [A] and the logits [A, V] to those
    that may be said; None: nothing changes them. deeper: a context in which attention is that of a
    ragged call; gives its tokens' slots, as a tensor and on the host. sampled: the call's rows
    whose logits vLLM asks for [N], a tensor; None: the last of each request. exits: whether an exit
    is asked or drafts in this step; if not, none runs. again: for each request [R] how often its
    token has been put off; -1: its token may not be. greedy: whether of the logits nothing but the
    likeliest tokens is wanted. taken: drafts on after what the first exit says [A, S] of first
    tokens [A], and returns whether the drafts end the answer and are taken [A].

    tokens: the likeliest [R], a tensor, -1 where put off; None: vLLM gets logits. depths: layers
    run for each request's next token [R]. off: requests whose token is put off [O]. said: rows [A]
    that left, with what they may say: ids' logits. read: whether vLLM has asked for the logits.
    ran: whether the decoder ran here, and not by code of vLLM's that was compiled before.
    """

    starts: Ints
    seq_lens: Ints
    slots: Tensor
    table: Ints
    block_size: int
    asks: Flags
    waits: Flags
    thresholds: Sequence[NDArray[np.float32]]
    allowed: Callable[[Tensor, Tensor], Tensor] | None
    deeper: Callable[[Ragged], AbstractContextManager[tuple[Tensor, Ints]]]
    sampled: Tensor | None
    layers: int
    exits: bool
    again: Ints
    greedy: bool
    taken: Callable[[Ints, Tensor], Flags]
    tokens: Tensor | None = None
    depths: Ints = field(init=False)
    off: Ints = field(init=False)
    said: list[tuple[Ints, Tensor]] = field(default_factory=list)
    read: bool = False
    ran: bool = False

    def __post_init__(self) -> None:
        self.depths = np.full_like(self.seq_lens, self.layers)
        self.off = np.zeros(0, dtype=np.int64)

    @property
    def last(self) -> Ints:
        """The call's row of each request's last token [R]."""
        return self.starts[1:] - 1

    def asked(self, place: int) -> Ints:
        """The requests whose token an exit may write [A]."""
        return np.flatnonzero(self.asks & ~np.isnan(self.thresholds[place]))

    @property
    def begins(self) -> Ints:
        """The place of each request's first token in the call [R]."""
        return self.seq_lens - self.starts[1:] + self.starts[:-1]

    @property
    def whole(self) -> Ragged:
        """The call itself."""
        return Ragged(np.arange(len(self.seq_lens)), self.begins, self.seq_lens)


class Head:
    """What exits say: logits of the shortlist's tokens, or of all.

    ids: token ids [S]; None: all. width: D of the states that it reads.
    """

    def __init__(self, model: Any, ids: Tensor | None) -> None:
        """model: vLLM's, whose `compute_logits` is still its own."""
        self._whole, self.ids, self._product = model.compute_logits, ids, None
        parent = _head_parent(model)
        lm_head = None if parent is None else parent.lm_head
        example = _zeros_like_states(model, lm_head)
        self.vocabulary, self.width = int(self._whole(example).shape[-1]), example.shape[-1]
        if ids is None:
            return
        self.ids = ids.to(example.device)
        if lm_head is not None:
            self._take(lm_head, parent.logits_processor, example)

    def _take(self, lm_head: Any, processor: Any, example: Tensor) -> None:
        """Rows of the head alone, where they give what the whole head gives."""
        self._product = product_of(lm_head, self.ids, self.vocabulary)
        if self._product is None:
            return
        self._cap, self._scale = processor.soft_cap, processor.scale
        noise = torch.randn(
            (4, example.shape[1]), generator=torch.Generator().manual_seed(0), dtype=torch.float32
        )
        states = noise.to(example)
        apart = (self(states).float() - self._whole(states)[:, self.ids].float()).abs().max()
        if float(apart) > 0.05 * float(self._whole(states).float().abs().max()):
            self._product = None  # a head that does more than a product

    def __call__(self, states: Tensor) -> Tensor:
        """Logits [A, S] of final states [A, D]."""
        if self.ids is None:
            return self._whole(states)  # type: ignore[no-any-return]
        if self._product is None:
            return self._whole(states)[:, self.ids]  # type: ignore[no-any-return]
        logits = self._product(states)
        if self._cap is not None:
            logits = torch.tanh(logits / self._cap) * self._cap
        return logits * self._scale if self._scale != 1.0 else logits

    def likeliest(self, logits: Tensor) -> Tensor:
        """Tokens [A] of what exits say [A, S]."""
        best = logits.argmax(-1)
        return best if self.ids is None else self.ids[best]

    def whole(self, logits: Tensor) -> Tensor:
        """Logits [A, V] of what exits say [A, S]; those of other tokens are -inf."""
        wide = logits.new_full((len(logits), self.vocabulary), float("-inf"))
        self.put(wide, torch.arange(len(logits), device=logits.device), logits)
        return wide

    def put(self, wide: Tensor, rows: Tensor, logits: Tensor) -> None:
        """Write what exits say [A, S] into rows [A] of logits [N, V]."""
        if self.ids is None:
            wide.index_copy_(0, rows, logits)
        else:
            wide[rows[:, None], self.ids] = logits


class Early:
    """Takes the place of a decoder's forward and of the model's `compute_logits`.

    drafted: what the first exit made of the last call's tokens [T, D], where it drafts on.
    step: of the call to come; None: a call that writes nothing, such as vLLM's memory profile.
    store: of the cache's slots, once there is a cache. on: whether tokens leave at all.
    """

    def __init__(self, model: Any, exported: Exported, config: Any) -> None:
        """config: vLLM's whole."""
        decoder = decoder_of(model, exported.all_layers)
        self.exported, self.most = exported, config.scheduler_config.max_num_batched_tokens
        self.stages, self.decoder = Stages(decoder), decoder
        self.ends = (*exported.depths[1:], exported.layers)
        self.step: Step | None = None
        self.store: Store | None = None
        self.on = True
        self.drafted: Tensor | None = None
        self._join: Join | None = None
        self._keys = Keys.of(layers_of(decoder)[exported.layers])
        self._like: dict[str, Tensor] = {}
        self._score = SCORES[exported.rule.score]
        self._logits = model.compute_logits
        self.head = Head(model, exported.shortlist_ids())
        self._model = model
        decoder.forward = self.forward
        model.compute_logits = self.compute_logits

        self._quantised = config.model_config.quantization is not None
        if compiles(config):  # in vLLM's profile call
            leave_uncompiled(model, decoder)
            self.stages.compiled = Compiled(decoder, config, self.stages.names)
            self.stages.compiled.open = True
        else:
            take_kernels(model, quantised=self._quantised)

    # -- forward ------------------------------------------------------------------------------

    def forward(self, *args: Any, **kw: Any) -> Tensor:
        """Final states [T, D]: of rows that left, as their exit estimates them."""
        given, positions = self.stages.arguments(*args, **kw)
        step, store = self.step, self.store
        if step is None or store is None:
            return self._unwritten(given, positions)
        state = self.stages.begin(given, self.exported.depths[0])
        count, step.ran = len(step.slots), True
        known = slots_of(step.table, *step.whole.tokens(), step.block_size)
        store.begin(step.slots, known, positions.reshape(-1, positions.shape[-1])[:, :count])
        store.put(0, step.slots, {name: part[:count] for name, part in state.items()})
        stay = ~step.waits
        if step.exits:
            if store.gaps:
                self._fill(step, store, 0, np.arange(len(stay)), step.begins)
            hidden = self._first(step, state, positions)
            store.heard[0, known] = 1
        else:
            first_part, store.gaps = next(iter(state.values())), True
            hidden = first_part.new_zeros((len(first_part), self.head.width))
        for place in range(len(self.exported.depths)):
            stay = self._decide(step, place, hidden, stay)
            rows = np.flatnonzero(stay)
            if place == 0 and put_off(stay, step.asks, step.again):
                step.off, rows = rows, rows[:0]
            if not len(rows):
                break
            hidden = self._deeper(step, store, place, rows, positions, known, hidden)
        return hidden

    def _unwritten(self, given: dict[str, Any], positions: Tensor) -> Tensor:
        """All rows at full depth, without a cache; what is to be compiled is compiled here."""
        parts = self.stages.compiled
        if parts is not None and self.is_to_compile and positions.shape[-1] > 1:
            made = tried(lambda: self._everything(given, positions))
            parts.open = False
            if made is not None:
                return made
            self.stages.compiled = None
            take_kernels(self._model, quantised=self._quantised)
        return self._everything(given, positions)

    def _everything(self, given: dict[str, Any], positions: Tensor) -> Tensor:
        """Final states at full depth, after every part that any call may take has run."""
        depths, count = self.exported.depths, positions.shape[-1]
        state = self.stages.begin(given, depths[0])
        if self.is_to_compile:
            ids = torch.zeros(count, dtype=torch.int32, device=positions.device)
            self.stages.begin(self.stages.tokens(ids, positions), depths[0])
        for place, depth in enumerate(depths):
            kept = {name: part.clone() for name, part in state.items()}
            if not place or self.is_to_compile:
                self._exit(place, state, positions)
            if place + 1 < len(depths):
                state = self.stages.between(kept, positions, depth, depths[place + 1])
        return self.stages.finish(kept, positions, depths[-1], self.exported.layers)

    @property
    def is_to_compile(self) -> bool:
        """Whether parts of the decoder wait to be compiled."""
        return self.stages.compiled is not None and self.stages.compiled.open

    def _first(self, step: Step, state: dict[str, Tensor], positions: Tensor) -> Tensor:
        """Final states [T, D] by the first exit; of the other tokens of a prompt than the one that
        is asked it only writes keys and values."""
        if self._keys is None or self._join is not None or len(step.slots) == len(step.seq_lens):
            return self._exit(0, state, positions)
        asked, like = step.asked(0), next(iter(state.values()))
        at, last = self.exported.layers, sent(step.last[asked], like)
        few = {name: part[last] for name, part in state.items()}  # before norms write into it
        self._keys.write(lambda: self.stages.between(state, positions, at, at + 1, eager=True))
        hidden = like.new_zeros((len(like), self.head.width))
        if len(asked):
            place = step.seq_lens[asked]
            with step.deeper(Ragged(asked, place - 1, place)):
                hidden.index_copy_(0, last, self._exit(0, few, positions[..., last]))
        return hidden

    def _exit(self, place: int, state: dict[str, Tensor], positions: Tensor) -> Tensor:
        at = self.exported.layers + place
        if place or self._join is None:
            return self.stages.finish(state, positions, at, at + 1)
        made = self.stages.between(state, positions, at, at + 1)
        self._like, self.drafted = made, self._join.whole(made)
        return self.stages.finish(made, positions, at + 1, at + 1)

    def _decide(self, step: Step, place: int, hidden: Tensor, stay: Flags) -> Flags:
        """Which requests go on [R]; those that leave have said what they say. Here, and nowhere
        else in a step, the host waits for what the device has found."""
        rows = step.asked(place)
        rows = rows[stay[rows]]
        if not len(rows) or not self.on:
            return stay
        logits = self.head(hidden.index_select(0, sent(step.last[rows], hidden)))
        allowed = self._allowed(step, rows, logits)
        score = self._score(allowed)
        may = leaves(score, sent(step.thresholds[place][rows], score))
        if step.allowed is not None:  # an exit that may say nothing leaves nothing
            may &= ~allowed.isneginf().all(-1)
        leaving = fetched(_agreed(may))
        if place == 0:  # a token that was put off has been asked there
            leaving = leaving & (step.again[rows] < 1)
            leaving = leaving | step.taken(rows, logits)
        out = rows[leaving]
        step.said.append((out, logits.index_select(0, sent(np.flatnonzero(leaving), logits))))
        step.depths[out] = self.exported.depths[place]
        stay = stay.copy()
        stay[out] = False
        return stay

    def _allowed(self, step: Step, rows: Ints, logits: Tensor) -> Tensor:
        if step.allowed is None:
            return logits
        whole = step.allowed(sent(rows, logits), self.head.whole(logits))
        return whole if self.head.ids is None else whole[:, self.head.ids]

    def _deeper(
        self,
        step: Step,
        store: Store,
        place: int,
        rows: Ints,
        given: Tensor,
        known: Ints,
        hidden: Tensor,
    ) -> Tensor:
        """Final states [T, D] after the part above an exit has run for requests [G], with what
        waits of them there. given, known: positions and slots of the call. hidden: final states
        before."""
        table, lengths = step.table[rows], step.seq_lens[rows]
        begin = first_waiting(store.level, table, lengths, step.block_size, place + 1)
        if step.exits and place + 1 < len(self.ends):
            self._fill(step, store, place + 1, rows, begin)
        whole = len(rows) == len(step.seq_lens) and given.shape[-1] == len(step.slots)
        if whole and np.array_equal(begin, step.begins):  # the call itself, as it came
            return self._part(step, store, place, step.slots, known, given)
        for part in rounds(Ragged(rows, begin, lengths), self.most):
            with step.deeper(part) as (slots, their):
                final = self._part(step, store, place, slots, their, store.places(slots))
            # The rows of this call among them, and where they stand in it.
            which, places = part.tokens()
            at = step.starts[1:][which] - (step.seq_lens[which] - places)
            own = at >= step.starts[:-1][which]
            taken = final.index_select(0, sent(np.flatnonzero(own), final))
            hidden.index_copy_(0, sent(at[own], hidden), taken)
        return hidden

    def _part(
        self, step: Step, store: Store, place: int, slots: Tensor, known: Ints, positions: Tensor
    ) -> Tensor:
        """Final states [T, D] of slots [T] after the part above an exit, by the next exit. known:
        the slots on the host."""
        state, end = store.at(place, slots), self.ends[place]
        start = self.exported.depths[place]
        store.level[known] = place + 1
        if end == self.exported.layers:
            return self.stages.finish(state, positions, start, end)
        state = self.stages.between(state, positions, start, end)
        store.put(place + 1, slots, state)
        if not step.exits:
            return next(iter(state.values()))
        store.heard[place + 1, known] = 1
        return self._exit(place + 1, state, positions)

    def _fill(self, step: Step, store: Store, place: int, rows: Ints, until: Ints) -> None:
        """Write an exit's keys where calls have left the exit out, for requests [G] up to a place
        [G] of each."""
        if not store.gaps or not until.max():
            return
        begin = first_waiting(store.heard[place], step.table[rows], until, step.block_size, 1)
        some = begin < until
        if not some.any():
            return
        at = self.exported.layers + place
        for part in rounds(Ragged(rows[some], begin[some], until[some]), self.most):
            with step.deeper(part) as (slots, known):
                self.stages.between(store.at(place, slots), store.places(slots), at, at + 1)
            store.heard[place, known] = 1

    def draft_on(self) -> None:
        """Have the first exit's own states kept of each call, if it drafts on from them."""
        weights = self.exported.draft_input()
        if weights:
            self._join = Join(weights, next(self.decoder.parameters()))

    def draft(self, ids: Tensor, positions: Tensor, before: Tensor | None) -> Tensor:
        """Logits [N, S] of the first exit after tokens [N]; `drafted` has what it made of them.
        before: what it made [N, D] of the tokens before; None: it does not draft on from that."""
        if self._join is None or before is None:
            state = self.stages.begin(self.stages.tokens(ids, positions), self.exported.depths[0])
        else:
            state = self._join.parted(
                self._join(self.decoder.embed_input_ids(ids), before), self._like
            )
        return self.head(self._exit(0, state, positions))

    def score(self, logits: Tensor) -> Tensor:
        """How sure an exit is [N] of logits [N, S]."""
        return self._score(logits)

    # -- logits -------------------------------------------------------------------------------

    def compute_logits(self, states: Tensor) -> Tensor | None:
        """Logits [N, V] of the rows that vLLM samples from [N, D]: no head runs twice."""
        step = self.step
        if step is None or step.read:
            return self._logits(states)  # type: ignore[no-any-return]
        step.read = True
        # Else exits would have run as the model's last layers, and all it says would be wrong.
        assert step.ran, "the decoder did not run in parts"
        if step.greedy:
            step.tokens = self._tokens(step, states)
            return step.tokens
        if not step.said:
            return self._logits(states)  # type: ignore[no-any-return]
        request = np.arange(len(step.seq_lens))
        if step.sampled is not None:
            request = np.searchsorted(step.starts, fetched(step.sampled), side="right") - 1
        place = np.zeros_like(step.seq_lens)
        place[request] = np.arange(len(request))
        first = step.said[0][1]
        logits = first.new_full((len(request), self.head.vocabulary), float("-inf"))
        for rows, said in step.said:
            self.head.put(logits, sent(place[rows], logits), said)
        if len(step.off):
            logits.index_fill_(0, sent(place[step.off], logits), 0.0)
        deep = step.depths[request] == step.layers
        deep[place[step.off]] = False
        if deep.any():
            at = sent(np.flatnonzero(deep), logits)
            logits.index_copy_(0, at, self._logits(states.index_select(0, at)).to(logits))
        return logits

    def _tokens(self, step: Step, states: Tensor) -> Tensor:
        """The likeliest token of each request [R], of its last row's final state [R, D]."""
        tokens = torch.full((len(step.seq_lens),), -1, dtype=torch.long, device=states.device)
        deep = step.asks.copy()
        deep[step.off] = False
        for rows, said in step.said:
            tokens.index_copy_(0, sent(rows, tokens), self.head.likeliest(said))
            deep[rows] = False
        if deep.any():
            at = sent(np.flatnonzero(deep), tokens)
            tokens.index_copy_(0, at, self._logits(states.index_select(0, at)).argmax(-1))
        return tokens


def _agreed(leaving: Tensor) -> Tensor:
    """What the first rank of tensor parallel decides; all ranks do the same."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return leaving
    return group.broadcast(leaving.to(torch.uint8), src=0).bool()


def _head_parent(model: nn.Module) -> Any:
    """The module that has the head and what processes its logits; None where there is none."""
    for module in model.modules():
        if hasattr(module, "lm_head") and hasattr(module, "logits_processor"):
            return module
    return None


def _zeros_like_states(model: Any, lm_head: Any) -> Tensor:
    plain = next(p for p in model.parameters() if p.is_floating_point() and p.itemsize > 1)
    width = plain.shape[-1] if lm_head is None else lm_head.embedding_dim
    return torch.zeros((1, width), dtype=plain.dtype, device=plain.device)
