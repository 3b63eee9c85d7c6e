"""What evaluation harnesses ask of a model, answered by the batch engine.

The harness's own classes are thin (`offramp.integrations.lm_eval_model`, `lmms_eval_model`): they
only unpack their requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from offramp.adapter import Adapter
from offramp.data.image import open_rgb
from offramp.errors import InputError
from offramp.models.input_processor import InputProcessor
from offramp.serving.batch_engine import BatchEngine
from offramp.serving.engine_config import EngineConfig
from offramp.serving.loading import load_served

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
        model, processor = load_served(adapter, **more)
        self.backbone = model.backbone if isinstance(model, Adapter) else model
        self.encoder = InputProcessor(self.backbone, processor)
        self._mode = mode
        if slots is None:
            slots = batch_size if str(batch_size).isdecimal() else 8
        config = EngineConfig(int(slots or 0), int(limit))
        self._engine = BatchEngine(model, self.encoder, config, queue=max(64, 4 * config.slots))

    def answers(self, asked: Iterable[Ask]) -> list[HarnessAnswer]:
        """The answers, in order; many are under way at once."""
        under_way = [self._submit(ask) for ask in asked]
        return [self._answer(handle, stops) for handle, stops in under_way]

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


def no_loglikelihood() -> InputError:
    """What a harness is told that asks for log-likelihoods."""
    return InputError(
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
    temperature = float(left.pop("temperature", 0.0))
    samples = bool(left.pop("do_sample", temperature > 0)) and temperature > 0
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
