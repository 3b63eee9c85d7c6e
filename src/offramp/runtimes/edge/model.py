"""A sliced model that answers: `EdgeModel`."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offramp.engine.confidence import check_thresholds
from offramp.engine.decoding.decoder import Decoder
from offramp.engine.decoding.executor import check_context
from offramp.engine.decoding.plan import Plan
from offramp.engine.decoding.sequence import Token
from offramp.engine.policy import ExitPolicy, check_exact, policy_from_json
from offramp.errors import AdapterError, InputError
from offramp.runtimes.edge.images import ImageReader
from offramp.runtimes.edge.rounds import Gone, Job, OnText, Rounds, closed
from offramp.runtimes.edge.sampling import Sampler, Sampling
from offramp.runtimes.edge.vocabulary import TextStream, Vocabulary
from offramp.runtimes.llama_cpp.array_reader import ArrayHeads
from offramp.runtimes.llama_cpp.chain import SegmentChain
from offramp.runtimes.llama_cpp.drafter import ChainDrafter
from offramp.runtimes.llama_cpp.gguf_files import read_segments
from offramp.runtimes.llama_cpp.gguf_header import Header, read_header
from offramp.runtimes.llama_cpp.native.tap import States
from offramp.runtimes.llama_cpp.packages import import_gguf, import_llama_cpp
from offramp.runtimes.llama_cpp.plan import chain_plan
from offramp.runtimes.llama_cpp.projector import MARKER
from offramp.runtimes.llama_cpp.prompt import Prompt
from offramp.runtimes.llama_cpp.segment import EMBEDDING_SCALE, EngineOptions, Segment
from offramp.runtimes.llama_cpp.self_check import AT_ONCE, call_sizes
from offramp.runtimes.llama_cpp.trial import check_survives

Message = dict[str, str]

_LONGEST = 256
"""Tokens of an answer whose length nobody says."""


@dataclass(frozen=True)
class Answer:
    """finish: "stop" at the model's end or a stop string, "length" at the most tokens.

    prompt_tokens: of text and images.
    """

    text: str
    steps: tuple[Token, ...]
    layers: int
    prompt_tokens: int
    finish: str

    @property
    def mean_depth(self) -> float:
        return float(np.mean([step.depth for step in self.steps])) if self.steps else 0.0


class EdgeModel:
    """What `offramp slice` wrote, without PyTorch.

    Any thread may ask: `EngineOptions.sequences` answers are written at once, in calls that they
    share, each as it is written alone; others wait.

    layers: of the whole decoder.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        mmproj: str | Path | None = None,
        engine: EngineOptions | None = None,
        check_digests: bool = True,
    ) -> None:
        """mmproj: the projector's file, for images; None: text alone.

        Raises:
            AdapterError: files that are missing, damaged, or that hold no tokenizer.
            InputError: the packages gguf and llama-cpp-python are not installed.
            UnsupportedBackboneError: this build of llama.cpp does not do what exits need.
        """
        self.engine = engine or EngineOptions()
        self.files = read_segments(folder, check_digests=check_digests)
        self.name = str(self.files.said["offramp.backbone"])
        self.layers, self.reads_images = self.files.cuts[-1], mmproj is not None
        self.policy = policy_from_json(json.loads(self.files.said["offramp.policy"]))
        ids = self.files.shortlist
        self._shortlist = None if ids is None else np.asarray(ids, dtype=np.int64)
        self._lock = threading.Lock()  # of what reads prompts
        self._segments: list[Segment] = []
        self._drafter: ChainDrafter | None = None
        self._images: ImageReader | None = None
        self._closed = False
        self._shared: Plan | None = None
        self._rounds = Rounds(self._decoder, self.engine.sequences)
        try:
            check_survives(self.files, self.engine)
            for file, tap in self.files.taps:
                self._segments.append(Segment(file, self.engine, tap_layer=tap))
            first, last = self._segments[0], self._segments[-1]
            self._causal = not first.looks_ahead and first.features == 0
            header = read_header(self.files.files[-1])
            lib = import_llama_cpp().llama_cpp
            self.vocabulary = Vocabulary(
                lib, last.model, header.said.get("tokenizer.chat_template")
            )
            self._embeddings = _Embeddings(header, last.width)
            if mmproj is not None:
                features = sum(segment.features for segment in self._segments)
                self._images = ImageReader(
                    mmproj, last, self.files.files[-1], features, self.engine
                )
            draw = np.random.default_rng(0).integers(self.vocabulary.size, size=AT_ONCE)
            probe = self._embeddings.of(draw.tolist())
            drafts = self.files.drafter is not None
            sizes = call_sizes(self._segments, probe, drafts=drafts)
            self._chain = SegmentChain(self._segments, sizes)
            self._drafter = ChainDrafter.load(self.files, self.engine, self._embeddings.of)
        except BaseException:
            self.close()
            raise

    def answer(
        self,
        prompt: str | Sequence[Message],
        images: Sequence[str | Path] = (),
        *,
        max_new_tokens: int | None = 128,
        mode: str | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        thresholds: dict[int, float] | None = None,
        on_text: OnText | None = None,
        gone: Gone | None = None,
    ) -> Answer:
        """Answer a text, or a chat by the file's template.

        images: files; where the prompt has no `MARKER` they stand before it, or before the last
            message of a chat.
        max_new_tokens: None: 256, or as many as the context has room for.
        mode: None: the policy's own.
        thresholds: by depth, in place of the adapter's. stop: strings that end the answer, and are
            left out of it. on_text: is told what is written, as soon as its letters are whole.
        gone: whether nobody waits any more; it is asked now and then.

        Raises:
            CancelledError: `gone` said so.
            InputError: a prompt with its answer longer than the context, images without a
                projector, or a mode or option that does not run here.
            DataError: an image cannot be read.
        """
        if max_new_tokens is not None and max_new_tokens < 1:
            raise InputError(f"{max_new_tokens} tokens are no answer.", "Ask for 1 or more.")
        policy = self._policy_of(mode, thresholds)
        with self._lock:
            if self._closed:
                raise closed()
            read, ids = self._prompt(self._text(prompt, images), images)
        rows = len(read.states)
        if max_new_tokens is None:
            max_new_tokens = max(1, min(_LONGEST, self.engine.context + 1 - rows))
        check_context(rows, max_new_tokens, self.engine.context)
        stream, ended = TextStream(self.vocabulary, stop), False

        def settled(token: int) -> bool:
            nonlocal ended
            ended = self.vocabulary.ends(token)
            if not ended:
                job.tell(stream.add(token))
            return stream.ended

        sampler = Sampler(
            sampling or Sampling(), self.vocabulary.size, ids,
            most=max_new_tokens, ends=self.vocabulary.ends, on_token=settled,
        )  # fmt: skip
        job = self._job(read, policy, sampler, mode, thresholds)
        steps = tuple(self._rounds.write(job, on_text, gone))
        if (rest := stream.close()) and on_text is not None:
            on_text(rest)
        finish = "stop" if stream.ended or ended else "length"
        return Answer(stream.text, steps, self.layers, rows, finish)

    def close(self) -> None:
        """Give the memory back, once the answers that are being written are done."""
        with self._lock:
            self._closed = True
        self._rounds.close()
        if self._images is not None:
            self._images.close()
        for segment in self._segments:
            segment.close()
        if self._drafter is not None:
            self._drafter.close()

    def __enter__(self) -> EdgeModel:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # -- one answer -----------------------------------------------------------------------------

    def _policy_of(self, mode: str | None, thresholds: dict[int, float] | None) -> ExitPolicy:
        policy = self.policy.asked(mode, thresholds, self.files.depths)
        for at in (policy.thresholds, policy.first, policy.drafts):
            check_thresholds(dict(at), self.files.depths)
        check_exact(policy, "llama.cpp")
        return policy

    def _plan(self, policy: ExitPolicy) -> Plan:
        """The plan of a policy; where there are several slots, of the model's own in every mode."""
        shared = self._chain.slots > 1
        if shared and self._shared is not None and self._shared.policy == self.policy:
            return self._shared

        def embed(token: int, position: int) -> States:
            return self._embeddings.of([token])

        plan = chain_plan(
            self.layers, self.policy if shared else policy,
            lambda depths: ArrayHeads(self.policy, self._shortlist),
            self._chain, self.files.depths, embed, drafter=self._drafter,
            first_may_exit=policy.exit_in_prefill and self._causal, every_mode=shared,
        )  # fmt: skip
        if shared:
            self._shared = plan
        return plan

    def _job(
        self,
        prompt: Prompt,
        policy: ExitPolicy,
        sampler: Sampler,
        mode: str | None,
        thresholds: dict[int, float] | None,
    ) -> Job:
        plan = self._plan(policy)
        rule = plan.rule(mode, thresholds) if plan is self._shared else plan.rule()
        return Job(prompt, sampler, policy, rule)

    def _decoder(self, policy: ExitPolicy) -> Decoder:
        """For an answer under a policy; where there are several slots, for any that may join."""
        plan = self._plan(policy)
        return plan.decoder(plan.executor())

    def _text(self, prompt: str | Sequence[Message], images: Sequence[Any]) -> str:
        markers = MARKER * len(images)
        if isinstance(prompt, str):
            return prompt if MARKER in prompt else markers + prompt
        messages = [dict(message) for message in prompt]
        if not all(isinstance(m.get(key), str) for m in messages for key in ("role", "content")):
            raise InputError(
                "A message has no role or no content.",
                'Give {"role": "user", "content": "..."} for each.',
            )
        if messages and not any(MARKER in m["content"] for m in messages):
            messages[-1]["content"] = markers + messages[-1]["content"]
        return self.vocabulary.chat(messages)

    def _prompt(self, text: str, images: Sequence[str | Path]) -> tuple[Prompt, list[int]]:
        if not images:
            ids = self.vocabulary.tokens(text)
            read = Prompt(self._embeddings.of(ids)), ids
        elif self._images is None:
            raise InputError(
                "Images were given, and no projector reads them.", "Name its file: --mmproj FILE."
            )
        else:
            axes = self._segments[0].axes
            read = self._images.prompt(text, images, self._embeddings.of, axes)
        if not len(read[0].states):
            raise InputError("The prompt is empty.", "Give a text.")
        return read


class _Embeddings:
    """Rows of the embeddings as the file holds them, made numbers when they are looked up."""

    def __init__(self, header: Header, width: int) -> None:
        place = header.tensors.get("token_embd.weight")
        if place is None or place.shape[0] != width:
            raise AdapterError(f"{header.path} holds no embeddings.", "Slice the file again.")
        self._rows = header.rows("token_embd.weight")
        self._scale = np.float32(header.said.get(EMBEDDING_SCALE, 1.0))
        gguf = import_gguf()
        self._quants, self._type = gguf.quants, gguf.GGMLQuantizationType(place.kind)

    def of(self, tokens: Sequence[int]) -> States:
        """The states [T, D] that enter the decoder."""
        if not tokens:
            return np.zeros((0, 0), dtype=np.float32)
        rows = self._quants.dequantize(np.ascontiguousarray(self._rows[[*tokens]]), self._type)
        states = np.asarray(rows, dtype=np.float32)
        return states if self._scale == 1.0 else states * self._scale
