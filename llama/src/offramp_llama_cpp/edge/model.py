"""A sliced model that answers: `EdgeModel`."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from PIL import Image

from offramp.core.decoding.policy import ExitPolicy
from offramp.core.decoding.scheduler import AT_ONCE as ASK_AT_ONCE
from offramp.core.decoding.sequence import Token
from offramp.core.errors import AdapterError, InputError
from offramp.inputs.image import open_rgb
from offramp.serving.core import Core
from offramp.serving.engine import Engine
from offramp.serving.engine_config import EngineConfig
from offramp.serving.server.api.text import StopStrings, TextStream
from offramp_llama_cpp.edge.host import EdgeHost
from offramp_llama_cpp.edge.images import ImageReader
from offramp_llama_cpp.edge.sampling import Sampling
from offramp_llama_cpp.edge.vocabulary import Vocabulary
from offramp_llama_cpp.exit_files import known_policy
from offramp_llama_cpp.gguf_files import SegmentFiles, read_segments
from offramp_llama_cpp.gguf_header import Header, read_header
from offramp_llama_cpp.native.tap import States
from offramp_llama_cpp.opened import OpenedFiles
from offramp_llama_cpp.packages import import_gguf, import_llama_cpp
from offramp_llama_cpp.projector import MARKER
from offramp_llama_cpp.prompt import Prompt, check_context
from offramp_llama_cpp.segment import EMBEDDING_SCALE, EngineOptions
from offramp_llama_cpp.self_check import AT_ONCE

Message = Mapping[str, str]
OnText = Callable[[str], None]

_LONGEST = 256
"""Tokens of an answer whose length nobody says."""
_QUEUE = 64
"""Answers that may wait for a slot; who asks for more waits for a place in the queue."""


SLICED = "sliced files hold no calibration"
"""Why nothing is promised of what they answer early."""


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
    """A model that `offramp export` cut, without PyTorch.

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
        self.engine: EngineOptions = engine or EngineOptions()
        self.files: SegmentFiles = read_segments(folder, check_digests=check_digests)
        self.name: str = str(self.files.said["offramp.backbone"])
        self.layers: int = self.files.cuts[-1]
        self.reads_images: bool = mmproj is not None
        self.policy: ExitPolicy = _policy(self.files)
        self._lock = threading.Lock()  # of what reads prompts
        self._images: ImageReader | None = None
        self._closed = False
        self._engine: Engine | None = None
        self._opened = OpenedFiles(self.files, self.engine)
        self._segments = self._opened.segments
        try:
            last = self._segments[-1]
            header = read_header(self.files.files[-1])
            lib = import_llama_cpp().llama_cpp
            self.vocabulary: Vocabulary = Vocabulary(
                lib, last.model, header.said.get("tokenizer.chat_template")
            )
            self._embeddings = _Embeddings(header, last.width)
            if mmproj is not None:
                features = sum(segment.features for segment in self._segments)
                self._images = ImageReader(
                    mmproj, last, self.files.files[-1], features, self.engine
                )
            draw = np.random.default_rng(0).integers(self.vocabulary.size, size=AT_ONCE)
            self._opened.join(self._embeddings.of(draw.tolist()), self._embeddings.of)
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
    ) -> Answer:
        """Answer a text, or a chat by the file's template.

        images: files; where the prompt has no `MARKER` they stand before it, or before the last
            message of a chat.
        max_new_tokens: None: 256, or as many as the context has room for.
        mode: None: the policy's own.
        thresholds: by depth, in place of the adapter's. stop: strings that end the answer, and are
            left out of it, as outer spaces are. on_text: is told what is written, as soon as its
            letters are whole.

        Raises:
            InputError: a prompt with its answer longer than the context, images without a
                projector, or a mode or option that does not run here.
            DataError: an image cannot be read.
        """
        if max_new_tokens is not None and max_new_tokens < 1:
            raise InputError(f"{max_new_tokens} tokens are no answer.", "Ask for 1 or more.")
        self._check_sees(len(images))
        opened = [open_rgb(Path(image), str(image)) for image in images]
        read, ids = self.prompt_of(self._text(prompt, len(images)), opened)
        rows = len(read.states)
        if max_new_tokens is None:
            max_new_tokens = max(1, min(_LONGEST, self.engine.context + 1 - rows))
        check_context(rows, max_new_tokens, self.engine.context)
        stops = tuple(text for text in stop if text)
        stream = TextStream(self.vocabulary, stops)

        def told(token: Token) -> None:
            piece = stream.put(token.token)
            if piece and on_text is not None:
                on_text(piece)

        steps = self.write(
            read,
            ids,
            max_new_tokens=max_new_tokens,
            mode=mode,
            thresholds=thresholds,
            sampling=sampling,
            stop=StopStrings(self.vocabulary, stops).found if stops else None,
            on_token=None if on_text is None else told,
        )
        for token in () if on_text is not None else steps:
            told(token)
        rest = stream.finish()
        if rest and on_text is not None:
            on_text(rest)
        ended = stream.stopped or self.vocabulary.ends(steps[-1].token)
        return Answer(stream.text, steps, self.layers, rows, "stop" if ended else "length")

    def write(
        self,
        prompt: Prompt,
        ids: Sequence[int] = (),
        *,
        max_new_tokens: int,
        mode: str | None = None,
        thresholds: Mapping[int, float] | None = None,
        sampling: Sampling | None = None,
        stop: Callable[[Sequence[int]], bool] | None = None,
        on_token: Callable[[Token], None] | None = None,
    ) -> tuple[Token, ...]:
        """Write the answer to a prompt whose states are known. ids: of its text. stop: whether the
        answer's tokens end it. on_token: is told of each, in the thread that waits. The rest as of
        `answer`."""
        with self._lock:
            if self._closed:
                raise closed()
            engine = self._engine
            if engine is None or not engine.alive:
                engine = self._start(_QUEUE, lambda: None)
        news: SimpleQueue[Token | None] = SimpleQueue()
        handle = engine.submit(
            {"prompt": prompt, "ids": ids},
            mode=mode,
            thresholds=thresholds,
            on_token=None if on_token is None else news.put,
            wait=True,
            max_new_tokens=max_new_tokens,
            sampling=sampling or Sampling(),
            stop=stop,
        )
        handle.add_done_callback(lambda _: news.put(None))
        try:
            while (token := news.get()) is not None:
                assert on_token is not None
                on_token(token)
        finally:
            engine.cancel(handle)
        return handle.result().tokens

    @property
    def drafts_on(self) -> bool:
        """Return True if an exit drafts on from its own state."""
        return self._opened.drafter is not None

    def start(self, queue: int, on_round: Callable[[], None]) -> Engine:
        """Start an engine of this model, which ends the one before. queue, on_round: as of
        `Engine`."""
        with self._lock:
            if self._closed:
                raise closed()
            if self._engine is not None:
                self._engine.close()
            return self._start(queue, on_round)

    def _start(self, queue: int, on_round: Callable[[], None]) -> Engine:
        # A column more than the context has: an answer's last token is never read.
        slots = self.engine.sequences
        sizes = EngineConfig(
            slots, self.engine.context + 1, schedule=ASK_AT_ONCE if slots == 1 else None
        )
        host = EdgeHost(
            self._opened,
            self.policy,
            self.vocabulary,
            lambda token, position: self._embeddings.of([token]),
        )
        core = Core(host, self.policy, sizes)
        self._engine = Engine(core, queue=queue, on_round=on_round)
        return self._engine

    def close(self) -> None:
        """Give the memory back, once the answers that are being written are done."""
        with self._lock:
            self._closed = True
        if self._engine is not None:
            self._engine.close()
        if self._images is not None:
            self._images.close()
        self._opened.close()

    def __enter__(self) -> EdgeModel:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # -- prompts ---------------------------------------------------------------------------------

    def _text(self, prompt: str | Sequence[Message], images: int) -> str:
        markers = MARKER * images
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

    def prompt_of(self, text: str, images: Sequence[Image.Image]) -> tuple[Prompt, list[int]]:
        """A text with an image at each `MARKER` as the decoder gets it, and the text's ids. Any
        thread may ask.

        Raises:
            InputError: an empty prompt, other images than markers, images without a projector.
        """
        self._check_sees(len(images))
        with self._lock:
            if self._closed:
                raise closed()
            if self._images is not None and images:
                axes = self._segments[0].axes
                return self._images.prompt(text, images, self._embeddings.of, axes)
            return self.of_ids(self.vocabulary.tokens(text))

    def _check_sees(self, images: int) -> None:
        if images and self._images is None:
            raise InputError(
                "Images were given, and no projector reads them.", "Name its file: --mmproj FILE."
            )

    def of_ids(self, ids: list[int]) -> tuple[Prompt, list[int]]:
        """Return the prompt of token ids, as states for the decoder."""
        if not ids:
            raise InputError("The prompt is empty.", "Give a text.")
        return Prompt(self._embeddings.of(ids)), ids


def closed() -> InputError:
    return InputError("The model is closed.", "Load it again.")


def _policy(files: SegmentFiles) -> ExitPolicy:
    """Raise `AdapterError` where it is of a newer version, or damaged."""
    try:
        values = json.loads(files.said["offramp.policy"])
    except (TypeError, ValueError, RecursionError):
        values = None
    return known_policy(values, files.files[0])


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
