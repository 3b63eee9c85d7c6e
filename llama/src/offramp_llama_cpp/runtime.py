"""Generation with the decoder in llama.cpp and all before it in PyTorch."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.executor import Executor
from offramp.core.decoding.plan import Plan
from offramp.core.decoding.policy import ExitPolicy, GenerationOutput, first_token_may_exit
from offramp.core.decoding.reader import PrefillBackend
from offramp.core.decoding.scheduler import AT_ONCE as ASK_AT_ONCE
from offramp.core.decoding.scheduler import Schedule
from offramp.core.decoding.scores import SCORES
from offramp.core.engine.attached import CalledAsModel
from offramp.core.engine.generate import write_answers
from offramp.core.engine.plan import KeptPlans
from offramp.core.errors import InputError, UnsupportedBackboneError, did_you_mean
from offramp.core.executors.prefill import Prepared
from offramp.core.models.as_loaded import still_loaded
from offramp.core.models.backbone import Backbone
from offramp.core.models.intercept import InterceptedModel
from offramp.features.prefix_cache import PrefixCache
from offramp.features.vision_cache import VisionCache
from offramp.serving.torch_host import PreparedHost
from offramp_llama_cpp.architectures import architecture_of
from offramp_llama_cpp.chain import CallSizes
from offramp_llama_cpp.entry import DecoderEntry, Embeddings, PromptEntry
from offramp_llama_cpp.gguf_files import SegmentFiles, read_segments
from offramp_llama_cpp.native.tap import States
from offramp_llama_cpp.opened import OpenedFiles
from offramp_llama_cpp.segment import EngineOptions
from offramp_llama_cpp.self_check import AT_ONCE, check_logits
from offramp_llama_cpp.tensor_reader import TensorHeads


class LlamaCppRuntime(CalledAsModel):
    """An adapter whose decoder runs in llama.cpp, from files that `export_gguf` wrote.

    `generate` takes as many rows as the engine has sequences, and a policy that the files can
    follow. Vision tower, projector and embeddings run in PyTorch, or as the adapter's backbone
    has it (`with_mtmd`). Calls from several threads take turns.

    rows: prompts in one call of `generate`, at most. context: tokens of a prompt with its answer,
    at most.
    """

    def __init__(
        self,
        adapter: Adapter,
        folder: str | Path,
        *,
        engine: EngineOptions | None = None,
        check_digests: bool = True,
    ) -> None:
        """Load the files and try out what the runtime relies on; see `self_check`.

        check_digests: read the files through first, and compare their SHA-256.

        Raises:
            AdapterError: files that are missing, damaged, or of another adapter or backbone.
            InputError: the extra `llama-cpp` is not installed.
            UnsupportedBackboneError: this build of llama.cpp does not do what exits need.
        """
        self._architecture = architecture_of(adapter.backbone)
        self.backbone: Backbone = adapter.backbone
        self.engine: EngineOptions = engine or EngineOptions()
        self.rows: int = self.engine.sequences
        self.context: int = self.engine.context
        self.files: SegmentFiles = read_segments(folder, adapter, check_digests=check_digests)
        self.adapter: Adapter = adapter.of_engine(self.name)  # with what is promised here
        self._embeddings = Embeddings(adapter.backbone)
        self._lock = threading.RLock()
        self._closed = self._lent = self._busy = False
        self._entry: PromptEntry | None = None  # with what is kept of prompts
        self._plans = KeptPlans()
        self._opened = opened = OpenedFiles(self.files, self.engine)
        self._segments = opened.segments
        try:
            probe, self.likeness = self._check()
            opened.join(probe, lambda tokens: self._embeddings.of(tokens, None))
        except BaseException:
            self.close()
            raise
        self._chain = opened.chain

    @property
    def name(self) -> str:
        """The engine, and the number formats of its weights."""
        formats = self.files.formats
        return f"llama.cpp {formats['layers']}, exits {formats['exits']}, head {formats['head']}"

    @property
    def policy(self) -> ExitPolicy:
        return self.adapter.policy

    @property
    def call_sizes(self) -> CallSizes:
        """Return how many tokens share a call above the first exit, and come out as they would
        alone."""
        return self._chain.sizes

    @property
    def packed_bytes(self) -> int:
        """Return the bytes of the weights that our own kernels multiply; 0 where llama.cpp's do."""
        return sum(s.products.bytes for s in self._segments if s.products is not None)

    @property
    def _exits_of(self) -> Adapter:
        return self.adapter

    def _write(
        self,
        inputs: Mapping[str, Any],
        policy: ExitPolicy,
        *,
        vision_cache: VisionCache | None = None,
        prefix_cache: PrefixCache | None = None,
        streamer: Any = None,
        seed: int | None = None,
        **options: Any,
    ) -> GenerationOutput:
        plan = self.plan(policy)
        with self._held(), torch.inference_mode():
            if self._entry is None or self._entry.vision_cache is not vision_cache:
                self._entry = self.entry(vision_cache)
            prepared, prompts = self._entry.read(inputs, options)
            count = None if prefix_cache is None else prefix_cache.count
            executor: Any = plan.executor(count=count)
            rows = len(prompts)
            schedule = ASK_AT_ONCE if rows == 1 else Schedule.of(rows)
            return write_answers(
                plan.decoder(executor, schedule),
                executor,
                prepared,
                plan.rule(),
                given=prompts,
                streamer=streamer,
                seed=seed,
            )

    def plan(self, policy: ExitPolicy | None = None, *, every_mode: bool = False) -> Plan:
        """Return what answers by a policy, or the adapter's, are written by; the newest are kept.

        Raises:
            InputError: the files cannot follow the policy.
        """
        policy = self.policy if policy is None else policy
        make = partial(self._made, policy, every_mode=every_mode)
        return make() if every_mode else self._plans.of(policy, make)

    def _made(self, policy: ExitPolicy, *, every_mode: bool) -> Plan:
        for mode in ("early_exit", "lossless") if every_mode else (policy.own_mode,):
            self._check_policy(policy.in_mode(mode).effective)
        return self._opened.plan(
            policy,
            partial(TensorHeads, self.adapter, policy),
            self._embeddings.of_token,
            first_may_exit=first_token_may_exit(self.backbone, policy),
            every_mode=every_mode,
            table=self._embeddings.table,
        )

    @contextmanager
    def _held(self, *, open: bool = True) -> Iterator[None]:
        """While nothing else is done with llama.cpp. Raise `InputError` where a callback asks for
        it, which would wait for the answer that waits for it; open: or the runtime is closed."""
        with self._lock:
            if self._busy:
                raise InputError(
                    "The runtime was asked for something by a callback of the answer that it is "
                    "writing.",
                    "Ask after the answer, or from another thread.",
                )
            if open:
                self._check_open()
            self._busy = True
            try:
                yield
            finally:
                self._busy = False

    def release_decoder(self) -> int:
        """Free what PyTorch holds of the weights in llama.cpp's files, and return their bytes.

        The adapter and its backbone decode by this runtime alone from here on, and cannot be saved
        or compared with others.
        """
        kept = self._embeddings.kept.data_ptr()
        modules = (self.backbone.layers, self.adapter.exits.modules, self.backbone.head)
        freed = 0
        with still_loaded(self.backbone):
            for parameter in [p for module in modules for p in module.parameters()]:
                if parameter.data_ptr() != kept:
                    freed += parameter.nbytes
                    parameter.data = parameter.data.new_empty(0)
        return freed

    def host(self, policy: ExitPolicy, vision_cache: VisionCache | None = None) -> LlamaCppHost:
        """Return what a batch engine writes with, a slot for each sequence. Nothing else decodes
        from here on.

        Raises:
            InputError: the files cannot follow the policy, in any mode; the runtime is closed.
        """
        plan = self.plan(policy, every_mode=True)
        with self._held():
            self._lent = True
        return LlamaCppHost(self.backbone, plan, self.entry(vision_cache))

    def entry(self, vision_cache: VisionCache | None = None) -> PromptEntry:
        """Return what takes prompts as far as llama.cpp."""
        return PromptEntry(self.backbone, self._architecture, self.engine, vision_cache)

    def close(self) -> None:
        """Give llama.cpp's memory back; the runtime is of no use afterwards.

        Waits for an answer that is being written.

        Raises:
            InputError: a callback of that answer asked for it.
        """
        with self._held(open=False):
            self._opened.close()
            self._closed = True

    def __enter__(self) -> LlamaCppRuntime:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # -- checks -------------------------------------------------------------------------------

    def _check(self) -> tuple[States, float]:
        """Try everything out; states that enter the decoder, and the correlation of the logits of
        some with the backbone's."""
        with torch.inference_mode():
            draw = torch.Generator().manual_seed(0)
            ids = torch.randint(self.backbone.vocabulary, (1, AT_ONCE), generator=draw)
            ids = ids.to(self.backbone.device)
            probe = self._embeddings.of(ids[0].tolist())
            entry = DecoderEntry()
            stack = InterceptedModel(self.backbone, entry).stack
            call = entry.call(lambda: stack(input_ids=ids))
            if not np.array_equal(call.hidden[0].float().cpu(), probe):
                raise UnsupportedBackboneError(
                    f"The decoder of {self.backbone.name} changes its embeddings before it starts.",
                    "Use --engine torch for this backbone.",
                )
            few = AT_ONCE // 4
            hidden = self.backbone.stack(input_ids=ids[:, :few], use_cache=False).last_hidden_state
            expected = self.backbone.logits(hidden[0]).float().cpu().numpy()
        # PaliGemma's wrapper makes the mask; without one its text model may see all of the text.
        causal = getattr(self.backbone.layers[0].self_attn, "is_causal", True)
        ahead = not causal and call.kw.get("attention_mask") is None
        likeness = check_logits(
            self._segments,
            self.backbone.name,
            probe[:few],
            expected,
            self.files.formats["layers"],
            ahead=ahead,
        )
        return probe, likeness

    def _check_open(self) -> None:
        if self._closed:
            raise InputError(
                "The llama.cpp runtime is closed: its memory was given back.",
                "Load it again, or generate inside of the `with` statement.",
            )
        if self._lent:
            raise InputError(
                "The llama.cpp runtime writes for a batch engine.",
                "Submit to the engine, or load another runtime.",
            )

    def _check_policy(self, policy: ExitPolicy) -> None:
        """Raise `InputError` where the files or the runtime cannot follow `policy`."""
        known = (*SCORES,)
        if policy.thresholds and policy.score not in known:
            raise InputError(
                f"The llama.cpp runtime has no score {policy.score!r}: it sees no features.",
                did_you_mean(policy.score, known),
            )
        missing = sorted(set(policy.thresholds) - set(self.files.depths))
        if missing:
            raise InputError(
                f"The policy has thresholds at depths {missing}, where the files have no exit.",
                f"Use {list(self.files.depths)}, or export the others too, with --depths.",
            )
        if policy.thresholds and policy.shortlist != (self.files.shortlist is not None):
            has = "no shortlist" if policy.shortlist else "only a shortlist"
            raise InputError(
                f"The policy has shortlist={policy.shortlist}, and the files' exits have {has}.",
                "Export them from an adapter whose policy is that one, or change the policy.",
            )


class LlamaCppHost(PreparedHost):
    """The host of one batch engine: a sequence of llama.cpp's for each slot; meanwhile the runtime
    itself answers nothing."""

    def __init__(self, backbone: Backbone, plan: Plan, entry: PromptEntry) -> None:
        super().__init__(backbone)
        self.entry: PromptEntry = entry
        self.plan = plan
        self._executor = plan.executor()

    def executor(self) -> Executor:
        return self._executor

    def prepare(
        self, inputs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> tuple[Prepared, PrefillBackend, Any]:
        with torch.inference_mode():
            prepared, [prompt] = self.entry.read(inputs, options)
        reader: Any = self._executor
        return prepared, reader, prompt
