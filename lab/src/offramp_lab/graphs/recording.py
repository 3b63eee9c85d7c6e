"""A fixed series of kernels over fixed memory, recorded once and launched at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from offramp.core.errors import UnsupportedBackboneError

Program = Callable[[], None]
"""Reads and writes buffers that stay where they are; takes and returns nothing."""

WARM_UPS = 3
"""Runs before a program is recorded, in which libraries choose their kernels."""


class Recorder:
    """Records programs as CUDA graphs that share their scratch memory. On other devices a program
    is run as it is, over the same buffers."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.records: bool = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self.records else None

    def record(self, program: Program) -> Program:
        """Return what does the same as `program`, which is run a few times.

        Raises:
            UnsupportedBackboneError: it asks the GPU for something in between.
        """
        if not self.records:
            return program
        main = torch.cuda.current_stream(self._device)
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(main)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    program()
            main.wait_stream(side)
            with torch.cuda.graph(graph, pool=self._pool):
                program()
        except RuntimeError as error:
            raise UnsupportedBackboneError(
                "The decoder cannot be recorded as a CUDA graph "
                f"({str(error).strip().splitlines()[0]}).",
                "Use --engine torch for this backbone.",
            ) from error
        return graph.replay


class Mailbox:
    """Brings small results from the device without holding up what is launched behind them.

    Two letters may be under way at once. size: numbers of a letter, as float64.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._sent = 0
        self._boxes: list[tuple[Tensor, torch.cuda.Event]] = []
        if device.type == "cuda":
            event: Callable[[], torch.cuda.Event] = torch.cuda.Event
            self._boxes = [
                (torch.empty(size, dtype=torch.float64, pin_memory=True), event()) for _ in range(2)
            ]

    def send(self, numbers: Tensor) -> Callable[[], list[float]]:
        """Start to bring `numbers`; what is returned waits for them."""
        if not self._boxes:
            values: list[float] = numbers.tolist()
            return lambda: values
        box, event = self._boxes[self._sent % 2]
        self._sent += 1
        box.copy_(numbers, non_blocking=True)
        event.record()

        def read() -> list[float]:
            event.synchronize()
            return box.tolist()

        return read
