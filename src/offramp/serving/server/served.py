"""What the application serves: a model, whichever engine answers for it. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any, Protocol

from PIL import Image

from offramp.core.decoding.policy import ExitPolicy
from offramp.promises.likeness import Alarm, Likeness
from offramp.promises.verdict import Status
from offramp.serving.engine import Engine
from offramp.serving.server.api.options import Generation
from offramp.serving.server.api.protocol import Sampling
from offramp.serving.server.config import ServerConfig

Inputs = Mapping[str, Any]
"""A prompt as the model's engine takes it."""


class Tokenizer(Protocol):
    """The part of Hugging Face's tokenizers that the application uses."""

    def __len__(self) -> int: ...
    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, Any]: ...
    def decode(
        self, token_ids: Sequence[int], skip_special_tokens: bool = False, **more: Any
    ) -> str: ...


class Prompts(Protocol):
    """An object that makes the inputs of texts and images, such as `InputProcessor`. Thread-safe.

    image_mark: placeholder of an image in a text; None: there is none. has_template: whether a chat
    template for conversations is there.
    """

    @property
    def image_mark(self) -> str | None: ...
    @property
    def has_template(self) -> bool: ...
    def check_images(self, images: int) -> None:
        """Raise `InputError` where a prompt cannot have so many images."""
        ...

    def conversation_text(self, turns: Sequence[Mapping[str, Any]]) -> str:
        """Return turns as text, as of `InputProcessor`."""
        ...

    def prompt_text(self, prompt: str) -> str:
        """Return a question about an image as text, as of `InputProcessor`."""
        ...

    def placed(self, prompt: str, images: int) -> str:
        """Return a prompt with the placeholders of its images."""
        ...

    def of_text(self, text: str, images: Sequence[Image.Image]) -> Inputs:
        """Return the inputs of a text with placeholders."""
        ...

    def of_ids(self, ids: Sequence[int]) -> Inputs:
        """Return the inputs of token ids."""
        ...

    def adds_special_tokens(self, text: str) -> bool:
        """Return True if the tokenizer adds special tokens to a text."""
        ...


@dataclass(frozen=True)
class NoPromise:
    """The standing of answers without any promise."""

    promise: None = None
    why: str = ""


class Served(Protocol):
    """A model and the engine that answers for it.

    name: of the backbone. layers: depth of the full model. limit: tokens of a prompt and its
    answer. places: answers at the same time, without waiting ones. policy: of requests without a
    mode. drafts: whether lossless answers are drafted at all. sees: whether prompts may have
    images. smallest: pixels a side to which a JPEG may be reduced while decoding; None: full size.
    calibrated: tokens of the longest calibrated answers; None: any length. likeness: of the
    calibrated answers.
    """

    @property
    def name(self) -> str: ...
    @property
    def layers(self) -> int: ...
    @property
    def limit(self) -> int: ...
    @property
    def places(self) -> int: ...
    @property
    def policy(self) -> ExitPolicy: ...
    @property
    def drafts(self) -> bool: ...
    @property
    def sees(self) -> bool: ...
    @property
    def smallest(self) -> int | None: ...
    @property
    def calibrated(self) -> int | None: ...
    @property
    def likeness(self) -> Likeness: ...
    @property
    def prompts(self) -> Prompts: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    def ends(self, token: int) -> bool:
        """Return True if a token ends an answer."""
        ...

    def start(self, queue: int, on_round: Callable[[], None]) -> Engine:
        """Start the engine. queue, on_round: as of `Engine`."""
        ...

    def check(self, inputs: Inputs) -> None:
        """Raise `InputError` where the model needs an image and a prompt has none."""
        ...

    def tokens(self, inputs: Inputs) -> int:
        """Return the number of a prompt's tokens."""
        ...

    def room(self, tokens: int) -> int:
        """Return the most tokens of an answer after a prompt of `tokens` tokens."""
        ...

    def generation(
        self,
        request: Sampling,
        config: ServerConfig,
        *,
        prompt: int,
        room: int,
        choice: int,
        constraint: Any,
    ) -> Generation:
        """Return the settings of answer number `choice` to a prompt.

        prompt: number of its tokens. room: tokens left after the prompt. constraint: of
        `constraint`; None: none.
        """
        ...

    def constraint(self, schema: Mapping[str, Any], unwanted: Event) -> Any:
        """Return a constraint of answers to JSON by a schema. Blocks. unwanted: set to abort.

        Raises:
            InputError: the schema, or any, is not supported, or costs too much.
            CancelledError: `unwanted` was set.
        """
        ...

    def stands(
        self,
        *,
        asked: str | None = None,
        longest: int | None = None,
        plain: bool | None = None,
        thresholds: Mapping[int, float] | None = None,
    ) -> Status:
        """Return what is guaranteed of early answers; missing arguments are not compared.

        asked: of `Prompter.question`. longest: tokens of its answer, at most. plain: whether it is
        greedy and without rules of its own. thresholds: instead of the adapter's.
        """
        ...

    def kind_of(self, asked: str) -> str:
        """Return the kind of a question among the calibrated ones."""
        ...

    def point_of(self, asked: str) -> Mapping[int, float] | None:
        """Return the point of the calibrated path for a question of this kind; None: the common
        one."""
        ...

    def promised(self) -> dict[str, Any] | None:
        """Return the guarantee as fields for a model's card; None without one."""
        ...

    def watcher(self, engine: Engine, alarm: Alarm) -> Any:
        """Return the watch over the guarantee of an engine's answers; None: there is no watch.
        alarm: over unlike requests, kept and reset with the watch."""
        ...

    def gauges(self) -> Sequence[tuple[str, str, Callable[[], float]]]:
        """Return further numbers for the metrics: name, text and value."""
        ...
