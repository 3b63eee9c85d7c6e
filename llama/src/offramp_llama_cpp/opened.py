"""An export that is loaded and tried out: what both runtimes decode by, with PyTorch before the
decoder or without."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from offramp.core.decoding.plan import Plan
from offramp.core.decoding.policy import ExitPolicy
from offramp.core.decoding.reader import Heads
from offramp_llama_cpp.chain import SegmentChain
from offramp_llama_cpp.drafter import ChainDrafter
from offramp_llama_cpp.gguf_files import SegmentFiles
from offramp_llama_cpp.native.drafts import FeedLoop
from offramp_llama_cpp.native.tap import States
from offramp_llama_cpp.plan import chain_plan
from offramp_llama_cpp.segment import EngineOptions, Segment
from offramp_llama_cpp.self_check import call_sizes
from offramp_llama_cpp.trial import check_survives


class OpenedFiles:
    """The segments of an export and, once they are joined, their chain and the exit that drafts on.

    drafter: None: no exit of the export drafts on.
    """

    chain: SegmentChain
    drafter: ChainDrafter | None = None

    def __init__(self, files: SegmentFiles, engine: EngineOptions) -> None:
        """Load the segments.

        Raises:
            AdapterError: a file that does not load, or that ends its process.
        """
        self.files: SegmentFiles = files
        self.engine: EngineOptions = engine
        self.segments: list[Segment] = []
        try:
            check_survives(files, engine)
            for file, tap in files.taps:
                self.segments.append(Segment(file, engine, tap_layer=tap))
        except BaseException:
            self.close()
            raise

    def join(self, probe: States, embedded: Callable[[Sequence[int]], States]) -> None:
        """Try how many tokens may share a call, and load the exit that drafts on.

        probe: states [T, D] of any tokens. embedded: embeddings [n, E] of tokens, without
        positions.

        Raises:
            UnsupportedBackboneError: this build of llama.cpp does not do what exits need.
        """
        drafts = self.files.drafter is not None
        self.chain = SegmentChain(self.segments, call_sizes(self.segments, probe, drafts=drafts))
        self.drafter = ChainDrafter.load(self.files, self.engine, embedded)

    def plan(
        self,
        policy: ExitPolicy,
        heads: Callable[[tuple[int, ...]], Heads],
        embed: Callable[[int, int], States],
        *,
        first_may_exit: bool,
        every_mode: bool,
        table: States | None = None,
    ) -> Plan:
        """Return the plan of the chain; see `chain_plan`. table: [V, D], what tokens enter the
        chain as, where that depends on nothing else; None: `embed` alone knows."""

        def loop() -> FeedLoop | None:
            if table is None:
                return None
            return self.segments[0].feed_loop(table, self.files.shortlist)

        return chain_plan(
            self.files.cuts[-1],
            policy,
            heads,
            self.chain,
            self.files.depths,
            embed,
            drafter=self.drafter,
            first_may_exit=first_may_exit,
            every_mode=every_mode,
            loop=loop,
        )

    def close(self) -> None:
        """Give llama.cpp's memory back."""
        for segment in self.segments:
            segment.close()
        if self.drafter is not None:
            self.drafter.close()
