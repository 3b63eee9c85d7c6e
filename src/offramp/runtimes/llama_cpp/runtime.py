"""Generation with the decoder in llama.cpp and all before it in PyTorch."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offramp.adapter import Adapter
from offramp.engine.confidence import SCORES, STREAKS
from offramp.engine.decoding.decoder import Decoder
from offramp.engine.generate import exit_rule, write_answers
from offramp.engine.policy import ExitPolicy, GenerationOutput, first_token_may_exit
from offramp.engine.prefill import Prepared, check_inputs, check_options, prepare
from offramp.errors import InputError, UnsupportedBackboneError, did_you_mean
from offramp.models.backbone import Backbone, LayerCall
from offramp.models.intercept import InterceptedModel
from offramp.models.vision_cache import VisionCache
from offramp.runtimes.llama_cpp.architectures import architecture_of
from offramp.runtimes.llama_cpp.chain import CallSizes, SegmentChain
from offramp.runtimes.llama_cpp.executor import ChainExecutor, ChainReader
from offramp.runtimes.llama_cpp.gguf_files import SegmentFiles, read_segments
from offramp.runtimes.llama_cpp.native.tap import States
from offramp.runtimes.llama_cpp.segment import EngineOptions, Segment
from offramp.runtimes.llama_cpp.self_check import AT_ONCE, call_sizes, check_logits


class LlamaCppRuntime:
    """An adapter whose decoder runs in llama.cpp, from files that `export_gguf` wrote.

    `generate` takes and returns what `Adapter.generate` does, for one row. Vision tower, projector
    and embeddings run in PyTorch. Calls from several threads take turns.
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
        architecture_of(adapter.backbone)
        self.adapter = adapter
        self.engine = engine or EngineOptions()
        self.files: SegmentFiles = read_segments(folder, adapter, check_digests=check_digests)
        self._embedding = adapter.backbone.stack.get_input_embeddings()
        self._rows = _plain_rows(self._embedding)
        self._lock = threading.Lock()
        self._segments: list[Segment] = []
        try:
            for place, file in enumerate(self.files.files):
                layers = self.files.cuts[place + 1] - self.files.cuts[place]
                tap = layers - 1 if place < len(self.files.depths) else None
                self._segments.append(Segment(file, self.engine, tap_layer=tap))
            self.likeness, sizes = self._check()
        except BaseException:
            self.close()
            raise
        self._chain = SegmentChain(self._segments, sizes)

    rows = 1
    """Prompts in one call of `generate`."""

    @property
    def name(self) -> str:
        """The engine, and the number formats of its weights."""
        formats = self.files.formats
        return f"llama.cpp {formats['layers']}, exits {formats['exits']}, head {formats['head']}"

    @property
    def backbone(self) -> Backbone:
        return self.adapter.backbone

    @property
    def policy(self) -> ExitPolicy:
        return self.adapter.policy

    @property
    def call_sizes(self) -> CallSizes:
        """How many tokens share a call above the first exit, and come out as they would alone."""
        return self._chain.sizes

    @property
    def packed_bytes(self) -> int:
        """Of the weights that our own kernels multiply; 0 where llama.cpp's do."""
        return sum(s.products.bytes for s in self._segments if s.products is not None)

    def generate(
        self,
        inputs: Mapping[str, Any],
        *,
        policy: ExitPolicy | None = None,
        vision_cache: VisionCache | None = None,
        streamer: Any = None,
        seed: int | None = None,
        **options: Any,
    ) -> GenerationOutput:
        """Generate by the adapter's policy, or by another; see `offramp.engine.generate.generate`.

        inputs: of one row.

        Raises:
            InputError: more than one row, a prompt with its answer longer than the context, or a
                policy that the files or the runtime cannot follow.
        """
        config = options.get("generation_config")
        asked = {**inputs, **{name: value for name, value in options.items() if value is not None}}
        check_options(lambda name: asked.get(name, getattr(config, name, None)))
        check_inputs(inputs, self.backbone.model)
        policy = (self.policy if policy is None else policy).effective
        self._check_policy(policy)
        entry = DecoderEntry()
        intercepted = InterceptedModel(self.backbone, entry)
        if vision_cache is not None:
            intercepted.remember_images(self.backbone, vision_cache)
        with self._lock, torch.inference_mode():
            prepared = prepare(intercepted.model, inputs, **options)
            check_options(lambda name: getattr(prepared.config, name, None))
            prompt = self._prompt(entry, prepared.model, prepared.ids, prepared.arguments)
            self._check_room(len(prompt), prepared.ids, prepared.criteria)
            return self._write(prompt, prepared, policy, streamer, seed)

    def release_decoder(self) -> int:
        """Free what PyTorch holds of the weights in llama.cpp's files, and return their bytes.

        The adapter and its backbone decode by this runtime alone from here on, and cannot be saved
        or compared with others.
        """
        kept = self._embedding.weight.data_ptr()
        modules = (self.backbone.layers, self.adapter.exits.modules, self.backbone.head)
        freed = 0
        for parameter in [p for module in modules for p in module.parameters()]:
            if parameter.data_ptr() != kept:
                freed += parameter.nbytes
                parameter.data = parameter.data.new_empty(0)
        return freed

    def close(self) -> None:
        """Give llama.cpp's memory back; the runtime is of no use afterwards."""
        for segment in self._segments:
            segment.close()

    def __enter__(self) -> LlamaCppRuntime:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # -- one generation -----------------------------------------------------------------------

    def _write(
        self,
        prompt: States,
        prepared: Prepared,
        policy: ExitPolicy,
        streamer: Any,
        seed: int | None,
    ) -> GenerationOutput:
        stand, depths = self.files.depths, policy.depths
        # Guesses fall with whom they wait: what they change must be speed alone.
        exact = policy.lossless or bool(policy.guesses) or not depths
        self._chain.reset([i for i, depth in enumerate(stand) if depth not in depths], exact=exact)
        executor = ChainExecutor(self._chain, stand, depths, prompt, self._token_states)
        asker = ChainReader(self.adapter, policy, depths)
        return write_answers(
            Decoder(self.backbone, executor, asker),
            executor,
            prepared,
            exit_rule(self.backbone, policy, asker),
            streamer=streamer,
            seed=seed,
            first_exits=first_token_may_exit(self.backbone, policy),
        )

    def _token_states(self, token: int) -> States:
        """The states [1, D] that enter the decoder for a token of text."""
        if self._rows is not None:
            return self._rows[token : token + 1]
        return self._embed(torch.tensor([[token]], device=self.backbone.device))

    def _embed(self, ids: Tensor) -> States:
        """The states [T, D] that enter the decoder for ids [1, T] of text."""
        return np.asarray(self._embedding(ids)[0].float().cpu().numpy())

    def _prompt(
        self, entry: DecoderEntry, model: Any, ids: Tensor, prepared: dict[str, Any]
    ) -> States:
        """The states [T, D] that enter the decoder for a prepared prompt, padding left out."""
        if len(ids) != 1:
            raise InputError(
                f"The llama.cpp runtime writes one answer at a time, and {len(ids)} rows came.",
                "Call generate once for each row.",
            )
        inputs = model.prepare_inputs_for_generation(
            ids, is_first_iteration=True, next_sequence_length=None, **prepared
        )
        states = entry.states(lambda: model(**inputs, return_dict=True))[0]
        mask = prepared.get("attention_mask")
        if mask is not None and mask.shape[-1] == len(states):
            states = states[mask[0].bool()]
        return np.asarray(states.float().cpu().numpy())

    # -- checks -------------------------------------------------------------------------------

    def _check(self) -> tuple[float, CallSizes]:
        """Try everything out; the correlation with the backbone's logits, and sizes of calls."""
        with torch.inference_mode():
            draw = torch.Generator().manual_seed(0)
            ids = torch.randint(self.backbone.vocabulary, (1, AT_ONCE), generator=draw)
            ids = ids.to(self.backbone.device)
            probe = self._embed(ids)
            entry = DecoderEntry()
            stack = InterceptedModel(self.backbone, entry).stack
            if not np.array_equal(
                entry.states(lambda: stack(input_ids=ids))[0].float().cpu(), probe
            ):
                raise UnsupportedBackboneError(
                    f"The decoder of {self.backbone.name} changes its embeddings before it starts.",
                    "Use --engine torch for this backbone.",
                )
            few = AT_ONCE // 4
            hidden = self.backbone.stack(input_ids=ids[:, :few], use_cache=False).last_hidden_state
            expected = self.backbone.logits(hidden[0]).float().cpu()
        sizes = call_sizes(self._segments, probe)
        layers = self.files.formats["layers"]
        return check_logits(self._segments, self.backbone, probe[:few], expected, layers), sizes

    def _check_policy(self, policy: ExitPolicy) -> None:
        """Raise `InputError` where the files or the runtime cannot follow `policy`."""
        known = (*SCORES, *STREAKS)
        if policy.thresholds and policy.score not in known:
            raise InputError(
                f"The llama.cpp runtime has no score {policy.score!r}: it sees no features.",
                did_you_mean(policy.score, known),
            )
        if policy.kv != "recompute":
            raise InputError(
                f"The llama.cpp runtime does not know the KV policy {policy.kv!r}.",
                "Use kv='recompute'.",
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

    def _check_room(self, prompt: int, ids: Tensor, criteria: Any) -> None:
        longest = criteria.max_length
        new = 1 if longest is None else max(1, longest - ids.shape[1])
        if prompt + new - 1 > self.engine.context:
            raise InputError(
                f"A prompt of {prompt} tokens and an answer of {new} are longer than the context "
                f"of {self.engine.context}.",
                "Load the runtime with a longer one (--context), or lower max_new_tokens.",
            )


def _plain_rows(embedding: nn.Module) -> States | None:
    """The embeddings [V, D] themselves, where looking them up is all that is done."""
    weight = embedding.weight if type(embedding) is nn.Embedding else None
    if weight is None or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    return np.asarray(weight.detach().numpy())


class _Entered(Exception):
    """Raised out of the decoder's first layer, once it is known what enters it."""


class DecoderEntry:
    """Stands before the decoder's layers, and keeps what enters the first."""

    def __init__(self) -> None:
        self._states: Tensor | None = None

    def layer(self, call: LayerCall) -> Any:
        self._states = call.hidden
        raise _Entered

    def states(self, call: Callable[[], Any]) -> Tensor:
        """What enters the decoder [B, T, D] in `call`, which is not run further."""
        with contextlib.suppress(_Entered):
            call()
        states, self._states = self._states, None
        assert states is not None
        return states
