"""What runs the decoder, by name: an engine is one file with a function `open`, and one line here.

`open(model, *, gguf, context, threads, sequences)` takes an adapter, or a backbone alone, and
returns what generates. gguf: folder of files that `offramp export` wrote; None: there is none.
context: tokens of a prompt and its answer. threads: of the decoder. sequences: answers at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from offramp.errors import InputError
from offramp.plugins import check_registered

TORCH = "torch"
AUTO = "auto"
"""In an engine's place: the fastest one here that keeps the answers (`offramp.engines.auto`)."""
MTMD = "mtmd"
"""Of vision engines: what runs a tower that `offramp export --vision` wrote."""


@dataclass(frozen=True)
class Engine:
    """home: module of `open`; or `open` itself. said: what there is to know of the engine.
    replaces: whether it decodes in the adapter's place, and not in PyTorch."""

    home: str | Callable[..., Any]
    said: str = ""
    replaces: bool = False

    @property
    def ships(self) -> bool:
        """Return True for an engine of this package, False for one of a plug-in."""
        return isinstance(self.home, str)

    def open(self, model: Any, **sizes: Any) -> Any:
        """Open a model, and return what generates with it."""
        made = import_module(self.home).open if isinstance(self.home, str) else self.home
        return made(model, **sizes)

    def prepare(self, model: Any, folder: Path, numbers: str) -> None:
        """Write the files that the engine reads, in a number format, where it reads some."""
        assert isinstance(self.home, str)
        import_module(self.home).prepare(model, folder, numbers)


ENGINES = {
    TORCH: Engine("offramp.engines.plain"),
    "compiled": Engine(
        "offramp.engines.compiled", "for single answers on a CPU: slow first, then faster"
    ),
    "packed": Engine("offramp.engines.packed", "weights laid out for a CPU's kernels, for batches"),
    "exact-batches": Engine(
        "offramp.engines.exact_batches",
        "packed, and a token is the same to the last bit whatever is decoded beside it, in half "
        "precision too; prompts are read one at a time",
    ),
    "llama.cpp": Engine("offramp.engines.llama_cpp", "needs --gguf", replaces=True),
    "cuda-graphs": Engine("offramp.engines.cuda_graphs", "needs a GPU", replaces=True),
}
"""The engines that ship; others come by `register_engine`."""


def register_engine(
    name: str, open: Callable[..., Any], said: str = "", *, replaces: bool = False
) -> None:
    """Give an engine a name that `offramp.load`, the command line and the server know.

    open: as described above. said, replaces: as of `Engine`.

    Raises:
        InputError: the name is that of an engine that ships.
    """
    if name in ENGINES and ENGINES[name].ships:
        raise InputError(f"{name!r} is an engine that ships.", "Choose another name.")
    ENGINES[name] = Engine(open, said, replaces)


def engine_named(name: str) -> Engine:
    """The engine of a name, those of plug-ins included. Raise `InputError` for an unknown one."""
    check_registered("Engine", name, lambda: ENGINES)
    return ENGINES[name]


def check_asked(engine: str, gguf: Any, quantize: str | None = None) -> None:
    """Raise `InputError` where an engine and what goes with it do not fit, before a model loads."""
    if engine != AUTO:
        engine_named(engine)
    if engine != AUTO and (engine == "llama.cpp") != (gguf is not None):
        raise InputError(
            "--engine llama.cpp and --gguf FOLDER go together.",
            "Write the folder: offramp export FOLDER --gguf q8_0 --out FOLDER.",
        )
    if gguf is not None and quantize is not None:
        raise InputError(
            f"--quantize {quantize} is for PyTorch; llama.cpp's files hold the weights.",
            "Leave it out, and choose their format: offramp export --gguf q4_1.",
        )
