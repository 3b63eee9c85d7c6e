"""The batch engine in PyTorch: early exits in a continuous batch, from any thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, wait
from typing import Any, cast

from offramp.adapter.adapter import Adapter
from offramp.core.decoding.policy import FULL
from offramp.core.errors import InputError
from offramp.core.models.backbone import Backbone
from offramp.features.cache_salt import salted
from offramp.features.input_processor import InputProcessor
from offramp.features.vision_cache import VisionCache
from offramp.inputs.example import Example
from offramp.serving.core import EngineCore
from offramp.serving.engine import Engine, Prepare, check_sizes
from offramp.serving.engine_config import EngineConfig
from offramp.serving.host import BatchRuntime, is_runtime
from offramp.serving.image_reader import ImageReader
from offramp.serving.request import Handle, Request
from offramp.serving.serial import SerialCore
from offramp.serving.torch_host import checked_inputs

IMAGE_BYTES = 2**28
"""Of the image features that an engine keeps, unless it is given a cache."""


class BatchEngine(Engine):
    """A running engine for many requests; close it, or use it as a context manager.

    model: an adapter, or a backbone alone; a `LlamaCppRuntime`, whose sequences are the slots; or a
    `SerialCore`, which answers one by one. processor: turns examples into inputs; not needed for
    submitted inputs. queue: requests that may wait beside those in slots. workers: threads that
    open images, run the processor and, one at a time, the vision tower. on_round: called in the
    engine's thread after every round, or token of a `SerialCore`, once its requests were told.
    vision_cache: in place of the default of 256 MiB; a `SerialCore` has its own. more: as of
    `EngineCore`.

    Raises:
        InputError: slots that memory does not hold; a policy that cannot be batched.
        UnsupportedBackboneError: a model that is split between processes.
    """

    def __init__(
        self,
        model: Adapter | Backbone | BatchRuntime | SerialCore,
        processor: InputProcessor | None = None,
        config: EngineConfig | None = None,
        *,
        queue: int = 64,
        workers: int = 2,
        on_round: Callable[[], None] | None = None,
        vision_cache: VisionCache | None = None,
        **more: Any,
    ) -> None:
        check_sizes(queue, workers)  # before slots are allocated
        core: EngineCore | SerialCore
        self._images: ImageReader | None = None
        if isinstance(model, SerialCore):
            core = model
            model.between = self._between
        else:
            adapter = model if isinstance(model, Adapter) else None
            if is_runtime(model):
                adapter, config = model.adapter, _sizes(model, config)
            backbone = adapter.backbone if adapter is not None else cast(Backbone, model)
            if backbone.family.vision is not None:
                vision_cache = vision_cache or VisionCache(IMAGE_BYTES)
                self._images = ImageReader(backbone, vision_cache)
            exits, policy = (adapter.exits, adapter.policy) if adapter else (None, FULL)
            if is_runtime(model):
                more.pop("prefix_cache", None)  # it keeps no prompts
                more["host"] = model.host(policy, vision_cache)
            else:
                backbone.check_whole("The batch engine")
                more["vision_cache"] = vision_cache
            core = EngineCore(backbone, exits, policy, config, **more)
        self.processor = processor
        super().__init__(core, queue=queue, workers=workers, on_round=on_round)

    def map(
        self, examples: Iterable[Example], *, ahead: int | None = None, **options: Any
    ) -> Iterator[tuple[Example, Handle]]:
        """Submit examples and yield each with its finished request, in order of completion.

        Examples are taken as places are free, so they may be more than memory holds. ahead:
        requests at the same time, at most (default: twice the slots). options: as of `submit`.
        """
        slots = self.core.config.slots
        most = min(2 * slots if ahead is None else max(1, ahead), slots + self.queue)
        under_way: dict[Handle, Example] = {}
        try:
            for example in examples:
                under_way[self.submit(example, wait=True, **options)] = example
                while len(under_way) >= most:
                    yield from _finished(under_way)
            while under_way:
                yield from _finished(under_way)
        finally:  # a caller that stops iterating wants no more
            for handle in under_way:
                self.cancel(handle)

    def _taken(self, what: Example | Mapping[str, Any]) -> tuple[Mapping[str, Any], Prepare | None]:
        """As of `Engine`: an example, or what a processor returned for one prompt. A worker opens
        an image, runs the processor and, ahead of the decoder, the vision tower."""
        if isinstance(what, Example):
            if self.processor is None:
                raise InputError(
                    "An example was submitted to an engine without a processor.",
                    "Give BatchEngine(..., processor=InputProcessor(backbone, processor)).",
                )
            return {}, lambda request: self._seen(self._processed(what), request)
        inputs = checked_inputs(what)
        if self._images is None or not self._images.wanted(inputs):
            return inputs, None
        return inputs, lambda request: self._seen(request.inputs, request)

    def _processed(self, example: Example) -> Mapping[str, Any]:
        assert self.processor is not None
        return self.processor.prompts([example])

    def _seen(self, inputs: Mapping[str, Any], request: Request) -> Mapping[str, Any]:
        """The inputs, once the vision tower's features of their images are kept."""
        if self._images is not None:
            with salted(request.salt):
                self._images.read(inputs)
        return inputs


def _sizes(runtime: BatchRuntime, config: EngineConfig | None) -> EngineConfig:
    """The sizes of an engine with a slot for each sequence of a runtime.

    Raises:
        InputError: other sizes were asked for.
    """
    rows, context = runtime.rows, runtime.context
    config = config or EngineConfig(slots=rows, limit=context)
    if config.slots != rows or config.limit > context:
        raise InputError(
            f"The engine has {config.slots} slots of {config.limit} tokens, and the llama.cpp "
            f"runtime {rows} sequences of {context}.",
            f"Load it with EngineOptions(context={config.limit}, sequences={config.slots}).",
        )
    return config


def _finished(under_way: dict[Handle, Example]) -> Iterator[tuple[Example, Handle]]:
    """Take those out that are over, one at least."""
    for handle in wait(list(under_way), return_when=FIRST_COMPLETED).done:
        assert isinstance(handle, Handle)
        yield under_way.pop(handle), handle
