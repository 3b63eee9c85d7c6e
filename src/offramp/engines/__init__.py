"""What runs the decoder, by name: an engine is one file with a function `open`, and one line here.

`open(model, *, gguf, context, threads, sequences)` takes an adapter, or a backbone alone, and
returns what generates. gguf: folder of files that `offramp export` wrote; None: there is none.
context: tokens of a prompt and its answer. threads: of the decoder. sequences: answers at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from offramp.adapter.runtime import Asked
from offramp.core.errors import InputError
from offramp.core.plugins import brought, check_registered

TORCH = "torch"
AUTO = "auto"
"""In an engine's place: the fastest one here that keeps the answers (`offramp.engines.auto`)."""
VISION = (AUTO, TORCH, "onnxruntime", "openvino", "openvino-bf16", "onnxruntime-int8")
"""What runs vision towers in every engine; an engine may bring others (`DecoderEngine.towers`)."""
LLAMA_CPP = "llama.cpp"
"""The engine that a folder of files alone names, and that `auto` tries."""


@dataclass(frozen=True)
class DecoderEngine:
    """An engine that runs the decoder.

    home: the module with `open`, or `open` itself. said: text for help. replaces: whether the
    engine decodes in the adapter's place, without PyTorch. reads_files: whether it needs a folder
    of files; `prepare(adapter, folder, format)` writes them, and `is_prepared(folder)` tells
    whether they are complete. together: answers written at the same time, by default. formats:
    number formats of its files. as_in_file: returns a backbone with weights rounded as in files of
    a format. towers: vision engines that it brings: by name, a function of adapter, folder and
    threads that returns an adapter with that tower. said_here: returns a line about this machine,
    for `offramp env`. serves: becomes a server of its own for `offramp serve`, by the command's
    options, and answers nowhere else. asks: opens such a server for an adapter, as `offramp.load`
    returns it, and the options of `offramp calibrate`: a context in which an `Asked` answers.
    """

    home: str | Callable[..., Any]
    said: str = ""
    replaces: bool = False
    reads_files: bool = False
    prepare: Callable[[Any, Path, str], Any] | None = None
    is_prepared: Callable[[Path], bool] | None = None
    together: int = 1
    towers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    said_here: Callable[[], str] | None = None
    formats: tuple[str, ...] = ()
    as_in_file: Callable[[Any, str], Any] | None = None
    serves: Callable[[Any], None] | None = None
    asks: Callable[[Any, Any], AbstractContextManager[Asked]] | None = None

    @property
    def ships(self) -> bool:
        """Return True for an engine of this package, False for one of a plug-in."""
        return isinstance(self.home, str)

    def open(self, model: Any, **sizes: Any) -> Any:
        """Open a model, and return the object that generates with it."""
        made = import_module(self.home).open if isinstance(self.home, str) else self.home
        return made(model, **sizes)


ENGINES = {
    TORCH: DecoderEngine("offramp.engines.plain"),
    "compiled": DecoderEngine(
        "offramp.engines.compiled", "for single answers on a CPU: slow first, then faster"
    ),
    "packed": DecoderEngine(
        "offramp.engines.packed", "weights laid out for a CPU's kernels, for batches"
    ),
    "exact-batches": DecoderEngine(
        "offramp.engines.exact_batches",
        "packed, and a token is the same to the last bit whatever is decoded beside it, in half "
        "precision too; prompts are read one at a time",
    ),
}
"""The engines of this package and those registered; installed packages offer others."""


def all_engines() -> dict[str, DecoderEngine]:
    """Return all engines by name; a line of the log says why an installed one fails."""
    brought("engines")
    return dict(ENGINES)


def register_engine(name: str, open: Callable[..., Any], said: str = "", **more: Any) -> None:
    """Register an engine under a name for `offramp.load`, the command line and the server.

    open: gets the adapter, and returns the object that generates. said and more: fields of
    `DecoderEngine`.

    Raises:
        InputError: the name is that of a built-in engine.
    """
    if name in ENGINES and ENGINES[name].ships:
        raise InputError(f"{name!r} is an engine that ships.", "Choose another name.")
    ENGINES[name] = DecoderEngine(open, said, **more)


def engine_named(name: str) -> DecoderEngine:
    """Return the engine of a name, plug-ins included. Raise `InputError` for an unknown one."""
    check_registered("Engine", "engines", name, lambda: ENGINES)
    return ENGINES[name]


def check_asked(
    engine: str, gguf: Any, quantize: str | None = None, vision: str = TORCH, *, asks: bool = False
) -> None:
    """Raise `InputError` where an engine and its options do not fit, before a model loads. asks:
    whether an engine that only serves may be asked."""
    named = LLAMA_CPP if engine == AUTO and gguf is not None else engine
    if named != AUTO and engine_named(named).serves and not (asks and engine_named(named).asks):
        raise InputError(
            f"{named} answers in a server alone.",
            f"Start one: offramp serve NAME --engine {named}.",
        )
    if named != AUTO and engine_named(named).reads_files != (gguf is not None):
        raise InputError(
            "--engine llama.cpp and --gguf FOLDER go together.",
            "Write the folder: offramp export FOLDER --gguf q8_0 --out FOLDER.",
        )
    if gguf is not None and quantize is not None:
        raise InputError(
            f"--quantize {quantize} is for PyTorch; llama.cpp's files hold the weights.",
            "Leave it out, and choose their format: offramp export --gguf q4_1.",
        )
    if vision in VISION:  # or every package's engine would be imported to look for it
        return
    brings = [name for name, one in all_engines().items() if vision in one.towers]
    if brings and named not in brings:
        raise InputError(
            f"--vision {vision} sees for --engine {brings[0]} alone.",
            f"Give --engine {brings[0]} and --gguf FOLDER, or another of {', '.join(VISION[1:])}.",
        )
