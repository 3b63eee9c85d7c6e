"""Bindings to vLLM's first model runner, the one for processors: worker, runner, scheduler."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.forward_context import get_forward_context, set_forward_context
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingType
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec, UniformTypeKVCacheSpecs
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor import LogitBiasLogitsProcessor, MinTokensLogitsProcessor

from offramp_vllm import tell
from offramp_vllm.adapter import Exported, read_exported
from offramp_vllm.attach import exits_loaded, plain_exits
from offramp_vllm.drafts import ExitDrafts, exits_draft
from offramp_vllm.early import Early, Step
from offramp_vllm.policy import Asked
from offramp_vllm.refuse import WITHOUT, Refused
from offramp_vllm.rows import Flags, Ints, Ragged, fetched, sent, slots_of, verified
from offramp_vllm.settings import features_joined, folder_of, served, watched_share
from offramp_vllm.stages import layers_of, states_like
from offramp_vllm.store import Store
from offramp_vllm.watch import Watch

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker  # type: ignore[assignment]


GRAMMAR = "offramp_grammar"
"""Of a step's plan: what grammars allow in it."""
_KNOWN = {MinTokensLogitsProcessor, LogitBiasLogitsProcessor}
"""Processors that do nothing to requests that do not ask for it."""
AHEAD, QUICK = 7, 0.05
"""How many tokens more the runner may write on its own before it hands them over, and in how many
seconds: what vLLM does between two steps takes longer than a small model's layers below an exit."""


NESTED = 2
"""Calls of which one may be within the other: of tokens that are written ahead, and of those of
them that go deeper."""
WARM = 16
"""Tokens of the call in which parts of the decoder are compiled, where vLLM makes none."""


@dataclass(frozen=True)
class _Request:
    """asked: mode and rule. changed: whether something changes its logits before a token is
    chosen. whole: whether its prompt runs to full depth. greedy: whether no random number is drawn
    for its tokens. ends: tokens after which its answer is over. most: tokens of its answer at most.
    ahead: whether nothing but these ends it."""

    asked: Asked
    changed: bool
    whole: bool
    greedy: bool
    ends: Set[int]
    most: int
    ahead: bool

    @property
    def first(self) -> tuple[float, ...]:
        """Thresholds of the first token: none where the prompt runs to full depth anyway."""
        rule = self.asked.rule
        return rule.off.first if self.whole else rule.first


@dataclass
class _Round:
    """What the first exit drafted of an answer. ids: drafts that are not verified yet. product: of
    the scores of all."""

    ids: list[int]
    product: float = 1.0


class ExitRunner:
    """Goes in front of vLLM's model runner: exits are loaded, kept states live beside the cache,
    and each step knows its requests' rules."""

    exported: Exported
    early: Early
    _builders: list[Any]
    _within = 0
    _stepping = False
    _sampled: Tensor | None = None
    _begun = 0.0
    _ahead: list[Step]
    _drafts_at_most = 0
    _put_off: Mapping[str, int] = {}
    _over: dict[str, list[int]]
    _offers: dict[str, list[Any]]
    _grammar: Any = None

    def load_model(self, *args: Any, **kw: Any) -> None:
        me: Any = self
        with exits_loaded(self.exported), plain_exits(me.vllm_config, self.exported):
            super().load_model(*args, **kw)  # type: ignore[misc]
        if me.lora_config:
            _check_adapters(me)
        self.early = Early(me.model, self.exported, me.vllm_config)
        _check_alike(self.early, self.exported)
        if isinstance(getattr(me, "drafter", None), ExitDrafts):
            me.drafter.runner = self
            self.early.draft_on()

    @property
    def _like(self) -> dict[str, Tensor]:
        me: Any = self
        return states_like(me.model, me.dtype, me.device)

    @property
    def _axes(self) -> int:
        me: Any = self
        return 3 if me.uses_mrope else 1

    def state_share(self) -> float:
        """Share of the memory for a token's keys and values that is left where its states and flags
        are kept too."""
        me: Any = self
        keys = sum(s.page_size_bytes / s.block_size for s in me.get_kv_cache_spec().values())
        states = Store.bytes_a_slot(len(self.exported.depths), self._like, self._axes)
        return float(keys / (keys + states))

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kw: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kw)  # type: ignore[misc]
        me: Any = self
        _check_cache(me)
        self._group = _group_of(me, self.early)
        size = me.input_batch.block_table[self._group].block_size
        spec = kv_cache_config.kv_cache_groups[self._group].kv_cache_spec
        slots = kv_cache_config.num_blocks * spec.block_size
        assert slots % size == 0
        self.early.store = Store(slots, len(self.exported.depths), self._like, self._axes)

    def initialize_metadata_builders(self, *args: Any, **kw: Any) -> None:
        """Builders keep plans and buffers of the call that they were last asked about, and the
        step's call goes on after a ragged one. So ragged calls have builders of their own, and so
        have those within a call that is one itself."""
        super().initialize_metadata_builders(*args, **kw)  # type: ignore[misc]
        me: Any = self
        theirs, self._builders = me.attn_groups, []
        try:
            for _ in range(NESTED):
                me.attn_groups = [[copy.copy(one) for one in groups] for groups in theirs]
                super().initialize_metadata_builders(*args, **kw)  # type: ignore[misc]
                self._builders.append(me.attn_groups)
        finally:
            me.attn_groups = theirs

    def execute_model(self, scheduler_output: Any, *args: Any, **kw: Any) -> Any:
        grammar = getattr(scheduler_output, GRAMMAR, None)
        self._grammar = grammar and (grammar, scheduler_output.scheduled_spec_decode_tokens)
        self._drafts_at_most = scheduler_output.num_spec_tokens_to_schedule
        self._stepping, self._begun = True, time.perf_counter()
        self._over, self._offers = {}, {}
        try:
            return super().execute_model(scheduler_output, *args, **kw)  # type: ignore[misc]
        finally:
            self._stepping = False

    def _prepare_inputs(self, *args: Any, **kw: Any) -> Any:
        prepared = super()._prepare_inputs(*args, **kw)  # type: ignore[misc]
        self._sampled = None if prepared[1] is None else prepared[0]
        return prepared

    def _model_forward(self, *args: Any, **kw: Any) -> Any:
        self.early.step = self._step() if self._stepping else None
        return super()._model_forward(*args, **kw)  # type: ignore[misc]

    def sample_tokens(self, grammar_output: Any) -> Any:
        me: Any = self
        step, ids = self.early.step, list(me.input_batch.req_ids)
        off = [] if step is None else [ids[row] for row in step.off.tolist()]
        self._put_off = {one: self._put_off.get(one, 0) + 1 for one in off}
        # As vLLM drops what it samples for a prompt that is not whole yet.
        if step is not None:
            me.discard_request_mask.np[step.off] = True
        self._ahead = []
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        self.early.step = None
        if step is not None and hasattr(output, "req_ids"):
            moved = dict.fromkeys(off, -1)
            depths = [step.depths.tolist(), *(one.depths.tolist() for one in self._ahead)]
            if self._ahead:
                last = self._ahead[-1].off.tolist()
                self._put_off = {ids[row]: 1 for row in last}
                moved = {one: len(self._ahead) - (row in last) for row, one in enumerate(ids)}
            output.offramp_moved = moved
            told = dict(zip(ids, zip(*depths, strict=True), strict=True))
            for one, drafts in self._over.items():
                said = len(output.sampled_token_ids[ids.index(one)])
                told[one] = (*told[one] * said, *[self.exported.depths[0]] * len(drafts))
            output.offramp_depths, output.offramp_over = told, self._over
            output.offramp_offers = self._offers
        return output

    def _sample(self, logits: Any, drafted: Any) -> Any:
        """What vLLM's sampler that verifies gives, without its copies of the logits: where nothing
        is drafted by the plain sampler, and where all is greedy by comparison."""
        me: Any = self
        step, batch = me.early.step, me.input_batch.sampling_metadata
        if step is not None and step.tokens is not None:
            columns = [step.tokens, *self._go_ahead(step)]
            tokens = torch.stack(columns, 1).int()
            return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=None)
        if drafted is not None and not drafted.max_spec_len:
            drafted = None
        if drafted is None or not self._plain(batch):
            return super()._sample(logits, drafted)  # type: ignore[misc]
        counts = torch.tensor(drafted.num_draft_tokens, device=logits.device)
        tokens = verified(logits.argmax(-1), drafted.draft_token_ids, counts)
        return SamplerOutput(sampled_token_ids=tokens.int(), logprobs_tensors=None)

    def _plain(self, batch: Any) -> bool:
        """Return True if every request is greedy and none asks for probabilities, changed
        logits or a budget of thoughts."""
        me: Any = self
        budgets = batch.thinking_budget_state_holder
        return bool(
            batch.all_greedy
            and _known_processors(batch)
            and batch.max_num_logprobs is None
            and not batch.logprob_token_ids
            and not any(self._request(one).changed for one in me.input_batch.req_ids)
            and (budgets is None or not budgets.has_tracked_requests())
        )

    def _go_ahead(self, step: Step) -> Iterator[Tensor]:
        """The tokens [R] of further steps of the same requests, while none is over or put off and
        all of it is quick: without vLLM's own work between two steps."""
        me: Any = self
        count, ids = len(step.seq_lens), me.input_batch.req_ids
        known = [self._request(one) for one in ids]
        if len(step.slots) > count or not all(one.ahead for one in known):
            return  # the first tokens of prompts are handed over at once
        lengths = [len(me.requests[one].output_token_ids) + 1 for one in ids]
        room = min(one.most - length for one, length in zip(known, lengths, strict=True))
        room = min(room, AHEAD, me.max_model_len - int(step.seq_lens.max()) - 1)
        if not step.asks.all():
            return
        rows, again = np.arange(count), step.again.clip(max=0)
        rules = [one.asked.rule.thresholds for one in known]
        with set_forward_context(None, me.vllm_config, count, slot_mapping={}):
            while len(self._ahead) < room and not len(step.off) and self._is_quick():
                token = step.tokens
                assert token is not None
                said = fetched(token).tolist()
                if any(t in one.ends for t, one in zip(said, known, strict=True)):
                    break
                place = step.seq_lens
                with self._attending(Ragged(rows, place, place + 1)) as (slots, _):
                    step = replace(
                        step,
                        starts=np.arange(count + 1),
                        seq_lens=place + 1,
                        slots=slots,
                        thresholds=_by_exit(rules),
                        sampled=None,
                        again=again,
                        tokens=None,
                        said=[],
                        read=False,
                        ran=False,
                    )
                    me.early.step = step
                    states = me.early.forward(token, self._positions(rows, place), None, None)
                    me.early.compute_logits(states)
                self._ahead.append(step)
                assert step.tokens is not None
                yield step.tokens

    def _is_quick(self) -> bool:
        me: Any = self
        quick = time.perf_counter() - self._begun < QUICK
        if get_tp_group().world_size == 1:
            return quick
        return bool(fetched(_agreed(torch.tensor([quick], device=me.device).to(torch.uint8)))[0])

    def drafts(self, sampled: Sequence[Sequence[int]], lengths: Any) -> list[list[int]]:
        """What the full model is to verify after the new tokens of each request: what is left of
        the round before, or what the first exit says while it is sure and the answer may go on.
        Drafts that end an answer, and are trusted, are taken. lengths: tokens of each request, the
        new ones included."""
        me: Any = self
        step, early, ids = me.early.step, me.early, me.input_batch.req_ids
        made, room = [list[int]() for _ in sampled], dict[int, int]()
        for row, new in enumerate(sampled):
            most = 0 if step is None or not new else self._room(row, int(lengths[row]), new[-1])
            left = self._left(row, new)
            if most and left:
                made[row] = left[: self._drafts_at_most]
            elif most:
                room[row] = most
        if not room:
            return made
        rows = np.array([*room], dtype=np.int64)
        place = np.array([int(lengths[row]) - 1 for row in room], dtype=np.int64)
        token = torch.tensor([sampled[row][-1] for row in room], device=me.device)
        if early.drafted is not None:
            at = (step.starts[1:] - step.seq_lens)[rows] + place - 1
            early.drafted = early.drafted.index_select(0, sent(at, early.drafted))
        with set_forward_context(None, me.vllm_config, len(room), slot_mapping={}):
            rounds = self._draft_on(rows, self._drafted(rows, token, place), place + 1, room)
        for row, one in rounds.items():
            if self._takes(row, one):
                self._over[ids[row]] = one.ids
                continue
            made[row] = one.ids[: self._drafts_at_most]
            if self._may_take(row):
                me.requests[ids[row]].offramp_round = one
        return made

    def _opening(self, rows: Ints, logits: Tensor) -> Flags:
        """Whether drafts that begin with what the first exit says of first tokens [A, S] end the
        answers of requests [A], and are trusted."""
        me: Any = self
        step, early, ids = me.early.step, me.early, me.input_batch.req_ids
        taken = np.zeros(len(rows), dtype=np.bool_)
        room = {row: self._room(row, int(step.seq_lens[row])) for row in rows.tolist()}
        at = np.flatnonzero([self._may_take(row) and room[row] > 0 for row in room])
        if not len(at):
            return taken
        call, own = early.drafted, rows[at]
        if call is not None:
            early.drafted = call.index_select(0, sent(step.last[own], call))
        said = logits.index_select(0, sent(at, logits))
        rounds = self._draft_on(own, said, step.seq_lens[own], room)
        early.drafted = call
        for place, (row, one) in zip(at, rounds.items(), strict=True):
            taken[place] = self._takes(row, one)
            if taken[place]:
                self._over[ids[row]] = one.ids[1:]  # vLLM samples the first of them
            else:
                me.requests[ids[row]].offramp_round = one
        return taken

    def _draft_on(
        self, rows: Ints, logits: Tensor, place: Ints, room: Mapping[int, int]
    ) -> dict[int, _Round]:
        """Drafts of requests [N], the first by logits [N, S]. place: of that [N]. room: how many a
        request may get."""
        me: Any = self
        early = me.early
        known = {row: self._request(me.input_batch.req_ids[row]) for row in rows.tolist()}
        rounds = {row: _Round([]) for row in rows.tolist()}
        sure = torch.ones(len(rows), device=me.device)
        while True:
            sure, token = sure * early.score(logits), early.head.likeliest(logits)
            # In one tensor, so that the host waits once.
            both = torch.stack([token.double(), sure.double()])
            words, products = fetched(_agreed(both)).tolist()
            going = []
            for at, row in enumerate(rows.tolist()):
                one = rounds[row]
                if products[at] < known[row].asked.rule.drafts:
                    continue
                one.ids.append(int(words[at]))
                one.product = products[at]
                if len(one.ids) < room[row] and one.ids[-1] not in known[row].ends:
                    going.append(at)
            if not going:
                return rounds
            kept = sent(np.array(going), token)
            rows, place = rows[going], place[going]
            token, sure = token.index_select(0, kept), sure.index_select(0, kept)
            if early.drafted is not None:
                early.drafted = early.drafted.index_select(0, kept)
            logits, place = self._drafted(rows, token, place), place + 1

    def _drafted(self, rows: Ints, token: Tensor, place: Ints) -> Tensor:
        """What the first exit says [N, S] after tokens [N] of requests, drafting on."""
        me: Any = self
        with self._attending(Ragged(rows, place, place + 1)):
            logits: Tensor = me.early.draft(token, self._positions(rows, place), me.early.drafted)
        return logits

    def _room(self, row: int, length: int, newest: int = -1) -> int:
        """How many drafts a request may get after so many tokens."""
        me: Any = self
        one = me.input_batch.req_ids[row]
        known = self._request(one)
        if one in self._over or newest in known.ends or known.asked.rule.trust is None:
            return 0
        left = min(known.most - len(me.requests[one].output_token_ids), me.max_model_len - length)
        if self._may_take(row):  # the last draft is not fed by one that runs the layers below it
            return max(0, min(known.asked.rule.longest, left - 1) + (me.early.drafted is None))
        return max(0, min(self._drafts_at_most, left - 1))

    def _left(self, row: int, new: Sequence[int]) -> list[int]:
        """The drafts of a request's round that its new tokens leave: none after another token."""
        me: Any = self
        request = me.requests[me.input_batch.req_ids[row]]
        left: list[int] = getattr(request, "offramp_round", _Round([])).ids
        for token in new:
            left = left[1:] if left[:1] == [token] else []
        request.offramp_round = _Round(left)
        return left

    def _may_take(self, row: int) -> bool:
        me: Any = self
        takes = self._request(me.input_batch.req_ids[row]).asked.rule.takes
        return takes and me.early.on and _known_processors(me.input_batch.sampling_metadata)

    def _takes(self, row: int, made: _Round) -> bool:
        """Whether drafts end a request's answer and are trusted. At a trust above 1, by which none
        are, what they offer is told."""
        me: Any = self
        one = me.input_batch.req_ids[row]
        known = self._request(one)
        trust = known.asked.rule.trust
        ends = bool(made.ids) and made.ids[-1] in known.ends
        if not ends or trust is None or not self._may_take(row):
            return False
        if trust > 1:
            ids = *me.requests[one].output_token_ids, *made.ids
            self._offers[one] = [{"trust": made.product, "tokens": ids}]
        return made.product >= trust

    def _positions(self, rows: Ints, places: Ints) -> Tensor:
        """Positions [N] of tokens after the prompt; [3, N] where they are of time, height and
        width."""
        me: Any = self
        if not me.uses_mrope:
            return torch.from_numpy(places).to(me.device)
        ids = me.input_batch.req_ids
        more = [me.requests[ids[row]].mrope_position_delta or 0 for row in rows.tolist()]
        return torch.from_numpy(places + np.array(more)).to(me.device).expand(3, -1).contiguous()

    def _step(self) -> Step:
        me: Any = self
        count, batch = me.input_batch.num_reqs, me.input_batch
        ids = batch.req_ids
        known = [self._request(one) for one in ids]
        partial = me.discard_request_mask.np[:count].copy()
        rules = [
            r.asked.rule.thresholds if me.requests[one].output_token_ids else r.first
            for one, r in zip(ids, known, strict=True)
        ]
        waits = [r.asked.rule.waits and not r.whole for r in known]
        starts = me.query_start_loc.np[: count + 1].astype(np.int64)
        blocks = batch.block_table[self._group]
        name = me.attn_groups[self._group][0].layer_names[0]
        slots = get_forward_context().slot_mapping[name][: starts[-1]]
        changed = any(r.changed for r in known)
        asked = [r.asked.rule for r in known]
        drafted = any(r.takes or (r.trust is not None and self._drafts_at_most > 0) for r in asked)
        drafting = drafted and exits_draft(me.vllm_config)
        leaving = self.early.on and any(r.is_on for r in asked)
        greedy = leaving and not _drafts(me.vllm_config) and self._plain(batch.sampling_metadata)
        may = me.speculative_config is None or exits_draft(me.vllm_config)
        again = np.array(
            [
                self._put_off.get(one, 0) if may and r.asked.rule.is_on and r.greedy else -1
                for one, r in zip(ids, known, strict=True)
            ]
        )
        return Step(
            starts=starts,
            seq_lens=me.optimistic_seq_lens_cpu[:count].numpy().astype(np.int64),
            slots=slots.long(),
            table=blocks.get_numpy_array()[:count],
            block_size=blocks.block_size,
            asks=~partial,
            waits=partial & np.array(waits),
            thresholds=_by_exit(rules),
            allowed=self._allowed if changed else None,
            deeper=self._attending,
            sampled=self._sampled,
            layers=self.exported.layers,
            exits=drafting or leaving,
            again=np.where(partial, -1, again),
            greedy=greedy,
            taken=self._opening,
        )

    def _request(self, one: str) -> _Request:
        """What is known of a request, which keeps it."""
        me: Any = self
        request, config = me.requests[one], me.vllm_config
        found: _Request | None = getattr(request, "offramp", None)
        if found is None:
            params = request.sampling_params
            found = _known(served(config, self.exported.rule, params.extra_args), params)
            # Where features of images join further states, offramp too reads the prompt whole.
            if request.mm_features and features_joined(config.model_config.hf_config):
                found = replace(found, whole=True)
            request.offramp = found
        return found

    def _allowed(self, rows: Tensor, logits: Tensor) -> Tensor:
        """Logits [A, V] as vLLM's own processors leave them, before noise is added."""
        me: Any = self
        batch = me.input_batch
        batch.update_async_output_token_ids()
        whole = logits.new_zeros((batch.num_reqs, logits.shape[1]), dtype=torch.float32)
        whole.index_copy_(0, rows, logits.float())
        if self._grammar is not None:
            self._forbid(whole)
        made = me.sampler.apply_logits_processors(whole, batch.sampling_metadata, False)
        return made.index_select(0, rows)

    def _forbid(self, logits: Tensor) -> None:
        """Set what the grammar of a request's answer does not allow to -inf [R, V]."""
        me: Any = self
        grammar, drafts = self._grammar
        bits, place = grammar.grammar_bitmask, 0
        for one in grammar.structured_output_request_ids:
            row = me.input_batch.req_id_to_index.get(one)
            if row is not None:
                may = np.unpackbits(bits[place].view(np.uint8), bitorder="little")
                allowed = torch.from_numpy(may[: logits.shape[1]].astype(bool)).to(logits.device)
                logits[row].masked_fill_(~allowed, float("-inf"))
            place += 1 + len(drafts.get(one, ()))

    @contextmanager
    def _attending(self, call: Ragged) -> Iterator[tuple[Tensor, Ints]]:
        """Attention of a ragged call in place of the step's: query starts, lengths, block tables
        and slots of its own, of which those that states are kept by are given, as a tensor and on
        the host."""
        me: Any = self
        which, places = call.tokens()
        device = me.device
        offsets = torch.from_numpy(call.offsets.astype(np.int32))
        ends = torch.from_numpy(call.ends.astype(np.int32))
        at = torch.from_numpy(places).to(device)
        rows = torch.from_numpy(call.rows).to(device)
        attention: dict[str, Any] = {}
        slots: dict[str, Tensor] = {}
        own = at, places
        for number, groups in enumerate(self._builders[self._within]):
            blocks = me.input_batch.block_table[number]
            table = blocks.get_device_tensor(me.input_batch.num_reqs)
            known = slots_of(blocks.get_numpy_array(), which, places, blocks.block_size)
            mapped = torch.from_numpy(known).to(device)
            common = CommonAttentionMetadata(
                query_start_loc=offsets.to(device),
                query_start_loc_cpu=offsets,
                seq_lens=ends.to(device),
                num_reqs=len(call.rows),
                num_actual_tokens=len(which),
                max_query_len=int((call.ends - call.starts).max()),
                max_seq_len=int(call.ends.max()),
                block_table_tensor=table.index_select(0, rows),
                slot_mapping=mapped,
                causal=True,
                positions=at,
                is_prefilling=torch.zeros(len(call.rows), dtype=torch.bool),
                seq_lens_cpu_upper_bound=ends,
            )
            own = (mapped, known) if number == self._group else own
            for group in groups:
                made = group.build_metadata(common)
                attention |= dict.fromkeys(group.layer_names, made)
                slots |= dict.fromkeys(group.layer_names, mapped)
        context = get_forward_context()
        before = context.attn_metadata, context.slot_mapping
        context.attn_metadata, context.slot_mapping = attention, slots
        self._within += 1
        try:
            with self._adapted(which):
                yield own
        finally:
            self._within -= 1
            context.attn_metadata, context.slot_mapping = before

    @contextmanager
    def _adapted(self, which: Ints) -> Iterator[None]:
        """LoRA adapters of tokens [T] by their requests, in place of the step's."""
        me: Any = self
        batch = me.input_batch
        if not me.lora_config:
            yield
            return
        before = me.lora_manager._adapter_manager._last_mapping
        of_requests = batch.request_lora_mapping[: batch.num_reqs]
        tokens = tuple(of_requests[which].tolist())
        asked = {*batch.lora_id_to_lora_request.values()}
        me._set_active_loras(tuple(of_requests.tolist()), tokens, asked)
        try:
            yield
        finally:
            me.lora_manager.set_active_adapters(asked, before)


def _agreed(tokens: Tensor) -> Tensor:
    """What the first rank of tensor parallel has found."""
    group = get_tp_group()
    return tokens if group.world_size == 1 else group.broadcast(tokens, src=0)


def _by_exit(rules: Sequence[Sequence[float]]) -> list[NDArray[np.float32]]:
    """Thresholds of each exit [E][R], of those of each request."""
    return [*np.array(rules, dtype=np.float32).T]


def _drafts(config: VllmConfig) -> bool:
    return config.speculative_config is not None


def _known_processors(batch: Any) -> bool:
    return all(type(one) in _KNOWN for one in batch.logitsprocs.non_argmax_invariant)


def _known(wanted: Asked, params: Any) -> _Request:
    changed = bool(
        params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
        or params.min_tokens
        or params.allowed_token_ids
        or params.bad_words
        or params.structured_outputs is not None
    )
    greedy = params.sampling_type == SamplingType.GREEDY
    rule, plain = wanted.rule, not params.stop and not params.repetition_detection
    # Nothing corrects drafts that are taken: what else decides tokens or ends is the full model's.
    if rule.takes and not (greedy and plain and not changed and params.logprobs is None):
        wanted = Asked(wanted.mode, rule.lossless)
    elif not _scored(params):
        wanted = Asked(wanted.mode, rule.off if rule.trust is None else rule.lossless)
    return _Request(
        wanted,
        changed,
        params.prompt_logprobs is not None,
        greedy=greedy,
        ends=set() if params.ignore_eos else params.all_stop_token_ids,
        most=params.max_tokens,
        # A stream gets each token as it is there.
        ahead=params.output_kind == RequestOutputKind.FINAL_ONLY and plain,
    )


def _scored(params: Any) -> bool:
    """Whether an exit's score is of what may be said: a thinking budget is counted as it is
    applied, so its rows run at full depth."""
    return getattr(params, "thinking_token_budget", None) is None


def _check_adapters(runner: Any) -> None:
    """Have exits and the model read one head: adapters of that are refused as they are loaded."""
    for module in runner.model.modules():
        processor = getattr(module, "logits_processor", None)
        if hasattr(processor, "base_layer"):
            module.logits_processor = processor.base_layer
    manager = runner.lora_manager
    theirs = manager._load_adapter

    def load(request: Any) -> Any:
        adapter = theirs(request)
        heads = [name for name in adapter.loras if name.endswith("lm_head")]
        if heads:
            raise Refused(
                f"The adapter {request.lora_name} changes {heads[0]}, which exits read too.",
                "Train adapters of the decoder's layers, or serve it without exits.",
            )
        return adapter

    manager._load_adapter = load


def _check_cache(runner: Any) -> None:
    """Raise `Refused` where the cache may forget places that still wait."""
    longest = runner.model_config.max_model_len
    for group in runner.kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        if isinstance(spec, UniformTypeKVCacheSpecs):
            specs = list(spec.kv_cache_specs.values())
        else:
            specs = [spec]
        for one in specs:
            short = isinstance(one, SlidingWindowSpec) and one.sliding_window < longest
            if short or not isinstance(one, FullAttentionSpec | SlidingWindowSpec):
                raise Refused(
                    f"Keys of kind {type(one).__name__} are not kept for all of an answer, and "
                    "tokens that left early need them later.",
                    "Give --max-model-len of the window, or serve it without exits.",
                )


def _group_of(runner: Any, early: Early) -> int:
    """The cache group of the decoder's first layer, by whose slots states are kept."""
    first = layers_of(early.decoder)[0]
    names = {m.layer_name for m in first.modules() if hasattr(m, "layer_name")}
    for number, group in enumerate(runner.kv_cache_config.kv_cache_groups):
        if names & set(group.layer_names):
            return number
    raise Refused("The decoder's first layer has no attention with a cache.", WITHOUT)


def _check_alike(early: Early, exported: Exported) -> None:
    """Raise `Refused` where vLLM built an exit otherwise than the layer that it is a copy of."""
    layers = layers_of(early.decoder)
    for place, copied in enumerate(exported.copied):
        ours, theirs = _kind_of(layers[exported.layers + place]), _kind_of(layers[copied])
        if ours != theirs:
            raise Refused(
                f"vLLM builds the exit at depth {exported.depths[place]} unlike layer {copied}, of "
                "which it is a copy.",
                "Serve it without exits: its class tells layers apart by their number.",
            )


def _kind_of(layer: Any) -> list[Any]:
    found: list[Any] = [type(layer)]
    for module in layer.modules():
        found.append(type(module))
        window = getattr(getattr(module, "impl", None), "sliding_window", None)
        found.append(window)
    return found


def become(runner: Any, exported: Exported) -> None:
    """Make a runner of vLLM's, just built, one with exits."""
    kind = type(runner)
    runner.__class__ = type(f"Exit{kind.__name__}", (ExitRunner, kind), {})
    runner.exported = exported


class ExitWorker(PlatformWorker):  # type: ignore[misc, valid-type]
    """vLLM's worker, whose runner has exits."""

    def init_device(self) -> None:
        super().init_device()
        become(self.model_runner, read_exported(folder_of(self.vllm_config)))

    def determine_available_memory(self) -> int:
        room = super().determine_available_memory()
        runner = self.model_runner
        if runner.early.is_to_compile:  # vLLM leaves its warm-up out
            runner._dummy_run(WARM)
        return int(room * runner.state_share())

    def offramp_switch(self, on: bool) -> None:
        """Have tokens leave, or all run to full depth; what is cached serves either."""
        self.model_runner.early.on = on


class ExitScheduler(Scheduler):
    """vLLM's scheduler, which hands depths on, asks again for tokens that were put off, and keeps
    drafts from answers with early exits."""

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self._exported = read_exported(folder_of(self.vllm_config))
        # Of drafts and of tokens that the runner writes on its own keys are written first.
        rule = self._exported.rule
        if exits_draft(self.vllm_config):
            self.num_lookahead_tokens = max(self.num_spec_tokens, rule.longest + 1)
        elif not _drafts(self.vllm_config):
            self.num_lookahead_tokens = AHEAD
        self._asked = partial(served, self.vllm_config, rule)
        self._watch = Watch(
            self._asked,
            watched_share(self.vllm_config),
            priority=self.policy == SchedulingPolicy.PRIORITY,
        )

    def schedule(self, *args: Any, **kw: Any) -> Any:
        """What a grammar allows goes along: exits are scored by what may be said."""
        output = super().schedule(*args, **kw)
        setattr(output, GRAMMAR, super().get_grammar_bitmask(output))
        return output

    def get_grammar_bitmask(self, scheduler_output: Any) -> Any:
        return getattr(scheduler_output, GRAMMAR)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        made = model_runner_output
        for one, drafts in getattr(made, "offramp_over", {}).items():
            # vLLM never proposed them, so it must count none as accepted.
            scheduler_output.scheduled_spec_decode_tokens.pop(one, None)
            made.sampled_token_ids[made.req_id_to_index[one]] += drafts
        ran = [self.requests.get(one) for one in scheduler_output.num_scheduled_tokens]
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        over = [one for one in ran if one is not None and one.is_finished()]
        tell.watched(outputs, {one.request_id: self._watch.same(one) for one in over})
        for again in self._watch.over(over):
            self.add_request(again)
        told = (getattr(made, name, {}) for name in ("offramp_depths", "offramp_offers"))
        tell.attach(outputs, *told)
        for one, tokens in getattr(made, "offramp_moved", {}).items():
            request = self.requests.get(one)
            if request is not None and request.num_computed_tokens:  # not preempted meanwhile
                request.num_computed_tokens += tokens
        return outputs

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        verifies: Callable[[str], bool] = self._verifies
        draft_token_ids.draft_token_ids = [
            drafts if verifies(one) else []
            for one, drafts in zip(
                draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True
            )
        ]
        super().update_draft_token_ids(draft_token_ids)

    def _verifies(self, one: str) -> bool:
        request = self.requests.get(one)
        if request is None or request.sampling_params is None:
            return False
        return self._asked(request.sampling_params.extra_args).rule.trust is not None
