"""What the application serves: a model, whichever engine answers for it. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any, Protocol

from PIL import Image

from offramp.core.decoding.policy import ExitPolicy
from offramp.promises.likeness import Alarm, Likeness
from offramp.serving.engine import Engine
from offramp.serving.server.api.options import Generation
from offramp.serving.server.api.protocol import Sampling
from offramp.serving.server.config import ServerConfig

Inputs = Mapping[str, Any]
"""A prompt as the model's engine takes it."""


class Tokenizer(Protocol):
    """The part of Hugging Face's tokenizers that the application asks for."""

    def __len__(self) -> int: ...
    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, Any]: ...
    def decode(
        self, token_ids: Sequence[int], skip_special_tokens: bool = False, **more: Any
    ) -> str: ...


class Prompts(Protocol):
    """Makes the inputs of texts and images; `InputProcessor` is one. Thread-safe.

    image_mark: what stands for an image in a text; None: nothing does. has_template: whether the
    model knows how a conversation is written.
    """

    @property
    def image_mark(self) -> str | None: ...
    @property
    def has_template(self) -> bool: ...
    def check_images(self, images: int) -> None:
        """Raise `InputError` where a prompt cannot have so many images."""
        ...

    def conversation_text(self, turns: Sequence[Mapping[str, Any]]) -> str:
        """Return turns as the model reads them; as of `InputProcessor`."""
        ...

    def placed(self, prompt: str, images: int) -> str:
        """Return a prompt with the placeholders of its images."""
        ...

    def of_text(self, text: str, images: Sequence[Image.Image]) -> Inputs:
        """Return the inputs of a text that has its placeholders already."""
        ...

    def of_ids(self, ids: Sequence[int]) -> Inputs:
        """Return the inputs of token ids."""
        ...

    def adds_special_tokens(self, text: str) -> bool:
        """Return True if the tokenizer adds special tokens to a text."""
        ...


class Standing(Protocol):
    """A guarantee's status, as of `offramp.promises.guarantee.GuaranteeStatus`."""

    @property
    def promise(self) -> Any: ...
    @property
    def why(self) -> str: ...


@dataclass(frozen=True)
class NoPromise:
    """A standing of answers that nothing is said of."""

    promise: None = None
    why: str = ""


class Served(Protocol):
    """A model and the engine that answers for it.

    name: of the backbone. layers: depth of the full model. limit: tokens of a prompt and its
    answer. places: answers under way beside those that wait. policy: of requests that name no mode.
    drafts: whether lossless answers are drafted at all. sees: whether prompts may have images.
    smallest: pixels that each side of a JPEG keeps where it is decoded smaller; None: none is.
    calibrated: tokens of the longest answers that were calibrated; None: of no length. likeness:
    what is kept of the calibrated answers.
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
        """Return the tokens of a prompt."""
        ...

    def room(self, tokens: int) -> int:
        """Return the tokens of the longest answer that fits after a prompt of so many."""
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
        """Return how the answer number `choice` to a prompt is generated.

        prompt: its tokens. room: tokens left after them. constraint: of `constraint`; None: none.
        """
        ...

    def constraint(self, schema: Mapping[str, Any], unwanted: Event) -> Any:
        """Return what lets answers be JSON by a schema. Blocks. unwanted: set once nobody waits.

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
    ) -> Standing:
        """Return what is guaranteed of early answers; what is not given is not compared.

        asked: of `Prompter.question`. longest: tokens its answer may have. plain: whether it is
        decoded greedily, with no rule of its own. thresholds: instead of the adapter's.
        """
        ...

    def kind_of(self, asked: str) -> str:
        """Return the kind of a question among the calibrated ones."""
        ...

    def point_of(self, asked: str) -> Mapping[int, float] | None:
        """Return the point of the calibrated path by which a question of its kind is answered;
        None: that of all."""
        ...

    def promised(self) -> dict[str, Any] | None:
        """Return what is guaranteed, for a model's card."""
        ...

    def watcher(self, engine: Engine, alarm: Alarm) -> Any:
        """Return what watches the guarantee of an engine's answers; None: nothing does. alarm: over
        unlike requests, which is kept and reset with it."""
        ...

    def gauges(self) -> Sequence[tuple[str, str, Callable[[], float]]]:
        """Return further numbers for the metrics: name, text and value."""
        ...
