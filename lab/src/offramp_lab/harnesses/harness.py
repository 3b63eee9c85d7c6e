"""What evaluation harnesses ask of a model, answered by the batch engine.

The harness's own classes are thin (`offramp_lab.harnesses.lm_eval_model`, `lmms_eval_model`): they
only unpack their requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from offramp.core.errors import InputError, OfframpError
from offramp.core.models.backbone import Backbone
from offramp.engines.loading import load
from offramp.features.input_processor import InputProcessor
from offramp.inputs.image import open_rgb
from offramp.serving.batch_engine import BatchEngine
from offramp.serving.engine_config import EngineConfig

LONGEST = 256
"""Tokens of an answer, where the task says nothing."""


@dataclass(frozen=True)
class Ask:
    """One request. turns: as of `InputProcessor.conversation_text`, or a text. options: the
    harness's generation options."""

    turns: Sequence[Mapping[str, Any]] | str
    images: Sequence[Any]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class HarnessAnswer:
    """An answer, and how many tokens it took."""

    text: str
    tokens: int


class HarnessModel:
    """An adapter behind a harness. adapter: as `offramp serve` takes it. batch_size: the harness's,
    the number of slots where it is a number. mode: how exits are used; None: as the adapter's
    policy says. slots: requests at once. limit: tokens of a prompt and its answer.

    Raises:
        AdapterError: there is no such adapter.
        InputError: slots or limit is no number.
    """

    def __init__(
        self,
        adapter: str,
        batch_size: int | str | None = None,
        *,
        mode: str | None = None,
        slots: int | str | None = None,
        limit: int | str = 2048,
        **more: Any,
    ) -> None:
        opened = load(adapter, **{"engine": "torch", "vision": "torch", **more})
        model = opened.adapter if opened.has_exits else opened.adapter.backbone
        self.backbone: Backbone = opened.adapter.backbone
        self.encoder: InputProcessor = opened.encoder
        self._mode = mode
        if slots is None:
            slots = batch_size if str(batch_size).isdecimal() else 8
        config = EngineConfig(_number("slots", slots or 0), _number("limit", limit))
        self._most = max(64, 4 * config.slots)
        self._engine = BatchEngine(model, self.encoder, config, queue=self._most)

    def answers(self, asked: Iterable[Ask]) -> Iterator[tuple[int, HarnessAnswer]]:
        """The answers with the places of their requests, in order, each once it is there; many are
        under way at once.

        Raises:
            OfframpError: requests were refused; the first one's, once the others are answered.
        """
        under_way: deque[tuple[int, Future[Any], tuple[str, ...]]] = deque()
        refused: list[OfframpError] = []

        def first() -> Iterator[tuple[int, HarnessAnswer]]:
            place, handle, stops = under_way.popleft()
            try:
                answer = self._answer(handle, stops)
            except OfframpError as error:
                refused.append(error)
            else:
                yield place, answer

        for place, ask in enumerate(asked):
            try:
                under_way.append((place, *self._submit(ask)))
            except OfframpError as error:
                refused.append(error)
            if len(under_way) >= self._most:
                yield from first()
        while under_way:
            yield from first()
        if refused:
            raise refused[0]

    def close(self) -> None:
        self._engine.close()

    def _submit(self, ask: Ask) -> tuple[Future[Any], tuple[str, ...]]:
        images = [_opened(image) for image in ask.images]
        if isinstance(ask.turns, str):
            text = self.encoder.placed(ask.turns, len(images))
        else:
            text = self.encoder.conversation_text(ask.turns)
        options, stops = generation_options(ask.options)
        inputs = self.encoder.of_text(text, images)
        handle = self._engine.submit(inputs, mode=self._mode, wait=True, **options)
        return handle, stops

    def _answer(self, handle: Future[Any], stops: tuple[str, ...]) -> HarnessAnswer:
        output = handle.result().output
        [text] = self.encoder.texts(output.new_tokens)
        for stop in stops:
            text = text.split(stop)[0] if stop else text
        return HarnessAnswer(text.strip(), int(output.depths.shape[1]))


def _number(name: str, value: int | str) -> int:
    """An argument of the harness, which gives texts."""
    try:
        return int(value)
    except ValueError as error:
        raise InputError(f"{name} is {value!r}.", "Give a whole number.") from error


class Harnessed:
    """What all harnesses' classes are made of, before the harness's own. arguments: as of
    `HarnessModel`. batch_size and device are the harness's; the first is the number of slots."""

    def __init__(
        self,
        adapter: str,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__()
        self.name = adapter
        self.harness: HarnessModel = HarnessModel(adapter, batch_size, device=device, **arguments)

    def loglikelihood(self, requests: list[Any]) -> Any:
        """Raise `InputError`."""
        raise InputError(
            "Log-likelihoods are not defined where tokens exit at depths of their own.",
            "Choose generation tasks; `offramp eval` ranks candidate answers.",
        )


def generation_options(asked: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Hugging Face's options and the stop strings, of a harness's.

    Raises:
        InputError: beams, or an option that is not known.
    """
    left = {name: value for name, value in asked.items() if value is not None}
    until = left.pop("until", ())
    stops = (until,) if isinstance(until, str) else tuple(until)
    named = ("max_new_tokens", "max_gen_toks", "max_tokens")
    lengths = [int(left.pop(name)) for name in named if name in left]
    options: dict[str, Any] = {"max_new_tokens": lengths[0] if lengths else LONGEST}
    asks = left.pop("do_sample", None)
    temperature = float(left.pop("temperature", 1.0 if asks else 0.0))
    samples = temperature > 0 and (asks is None or bool(asks))
    options["do_sample"] = samples
    beams = int(left.pop("num_beams", 1))
    if beams != 1:
        raise InputError(f"A task asks for {beams} beams.", "Set num_beams=1 in --gen_kwargs.")
    if samples:
        options |= {"temperature": temperature, "top_k": int(left.pop("top_k", 0))}
        options["top_p"] = float(left.pop("top_p", 1.0))
    for unused in ("top_p", "top_k", "image_aspect_ratio", "use_cache"):
        left.pop(unused, None)
    if left:
        raise InputError(
            f"A task asks for {', '.join(sorted(left))}, which is not supported.",
            "Take it out of the task, or of --gen_kwargs.",
        )
    return options, stops


def _opened(image: Any) -> Image.Image:
    """What a task gives for an image."""
    return open_rgb(Path(image) if isinstance(image, str) else image, "The task's image")
