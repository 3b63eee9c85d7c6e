"""A sliced model as what the application serves: OpenAI's API without PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import numpy as np
from PIL import Image

from offramp.core.decoding.policy import ExitPolicy
from offramp.core.errors import InputError
from offramp.promises.likeness import Alarm, Likeness
from offramp.serving.engine import Engine
from offramp.serving.server.api import protocol
from offramp.serving.server.api.options import (
    Generation,
    NotedLogprobs,
    PlaceLogprobs,
    longest_answer,
    sampled_by,
    seed_of,
)
from offramp.serving.server.api.text import StopStrings
from offramp.serving.server.config import ServerConfig
from offramp.serving.server.served import Inputs, NoPromise
from offramp_llama_cpp.array_reader import Ids
from offramp_llama_cpp.edge.model import SLICED, EdgeModel
from offramp_llama_cpp.edge.sampling import Sampling
from offramp_llama_cpp.edge.vocabulary import Vocabulary
from offramp_llama_cpp.graphs import Array
from offramp_llama_cpp.projector import MARKER


class EdgeServed:
    """The `Served` of a model without PyTorch."""

    smallest: int | None = None
    calibrated: int | None = None
    likeness: Likeness = Likeness({})

    def __init__(self, model: EdgeModel) -> None:
        self._model = model
        self.name: str = model.name
        self.layers: int = model.layers
        self.policy: ExitPolicy = model.policy
        self.limit: int = model.engine.context
        self.places: int = model.engine.sequences
        self.sees: bool = model.reads_images
        self.drafts: bool = bool(model.policy.drafts or model.policy.thresholds or model.drafts_on)
        self.tokenizer: Vocabulary = model.vocabulary
        self.prompts: EdgePrompts = EdgePrompts(model)

    def ends(self, token: int) -> bool:
        return self._model.vocabulary.ends(token)

    def start(self, queue: int, on_round: Callable[[], None]) -> Engine:
        return self._model.start(queue, on_round)

    # -- requests ----------------------------------------------------------------------------------

    def check(self, inputs: Inputs) -> None:
        """Do nothing: a prompt needs no image here."""

    def tokens(self, inputs: Inputs) -> int:
        return len(inputs["prompt"].states)

    def room(self, tokens: int) -> int:
        return self.limit + 1 - tokens  # an answer's last token is never read

    def generation(
        self,
        request: protocol.Sampling,
        config: ServerConfig,
        *,
        prompt: int,
        room: int,
        choice: int,
        constraint: Any,
    ) -> Generation:
        longest = longest_answer(request.longest, room, prompt, config.default_tokens)
        drawn, seed = sampled_by(request), seed_of(request, choice)
        sampling = Sampling(
            *((0.0, 1.0, 0) if drawn is None else (drawn.temperature, drawn.top_p, drawn.top_k)),
            repetition_penalty=request.repetition_penalty,
            seed=seed,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
        )
        wanted = request.top_logprobs_wanted
        noted = None if wanted is None else Noted(wanted)
        options: dict[str, Any] = {"sampling": sampling, "max_new_tokens": longest, "noted": noted}
        if request.ignore_eos:
            options["banned"] = self._model.vocabulary.end_tokens
        if request.stops:
            options["stop"] = StopStrings(self.tokenizer, request.stops).found
        return Generation(options, seed, longest, noted, plain=False)

    def constraint(self, schema: Mapping[str, Any], unwanted: Event) -> Any:
        raise InputError(
            "Answers in JSON are not written without PyTorch.",
            "Leave response_format out, or serve the adapter with PyTorch: offramp serve ADAPTER.",
        )

    # -- what is guaranteed: nothing, as the files hold no calibration -----------------------------

    def stands(self, **_: Any) -> NoPromise:
        return NoPromise(why=SLICED)

    def kind_of(self, asked: str) -> str:
        return ""

    def point_of(self, asked: str) -> None:
        return None

    def promised(self) -> None:
        return None

    def watcher(self, engine: Engine, alarm: Alarm) -> None:
        return None

    def gauges(self) -> Sequence[tuple[str, str, Callable[[], float]]]:
        return ()


class EdgePrompts:
    """The `Prompts` of a model without PyTorch: texts by the file's template and tokenizer, images
    by libmtmd."""

    image_mark = MARKER

    def __init__(self, model: EdgeModel) -> None:
        self._model = model

    @property
    def has_template(self) -> bool:
        return self._model.vocabulary.has_template

    def check_images(self, images: int) -> None:
        if images and not self._model.reads_images:
            raise InputError(
                "This server sees no images.", "Start it with a projector: --mmproj FILE."
            )

    def conversation_text(self, turns: Sequence[Mapping[str, Any]]) -> str:
        if not self.has_template and (len(turns) > 1 or turns[0]["role"] != "user"):
            raise InputError(
                "This model has no chat template, and a conversation of several turns came.",
                "Send one turn of the role 'user', or a text to /v1/completions.",
            )
        return self._model.vocabulary.chat(
            [{"role": turn["role"], "content": _content(turn["content"])} for turn in turns]
        )

    def prompt_text(self, prompt: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        return self.conversation_text([{"role": "user", "content": content}])

    def placed(self, prompt: str, images: int) -> str:
        return MARKER * images + prompt

    def of_text(self, text: str, images: Sequence[Image.Image]) -> Inputs:
        prompt, ids = self._model.prompt_of(text, images)
        return {"prompt": prompt, "ids": ids}

    def of_ids(self, ids: Sequence[int]) -> Inputs:
        prompt, known = self._model.of_ids([*ids])
        return {"prompt": prompt, "ids": known}

    def adds_special_tokens(self, text: str) -> bool:
        return True  # chats are written without them


def _content(parts: Sequence[Mapping[str, str]]) -> str:
    return "".join(part["text"] if part["type"] == "text" else MARKER for part in parts)


@dataclass
class Noted(NotedLogprobs):
    """The `NotedLogprobs` in numpy."""

    _open: dict[int, tuple[Array, Ids | None]] = field(default_factory=dict)

    def note(self, place: int, logits: Array, ids: Ids | None) -> None:
        """Note log-probabilities; see `Notes`."""
        self._open[place] = logits, ids

    def settle(self, token: int) -> None:
        logits, ids = self._open.pop(len(self.places))
        wide = logits.astype(np.float64)
        logs = wide - wide.max()
        logs -= np.log(np.exp(logs).sum())
        best = np.argsort(-logs, kind="stable")[: self.top]
        names = best if ids is None else ids[best]
        top = dict(zip(names.tolist(), logs[best].tolist(), strict=True))
        at = token if ids is None else int(np.flatnonzero(ids == token)[0])
        self.places.append(PlaceLogprobs(float(logs[at]), top))
