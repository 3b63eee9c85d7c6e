"""Parts of a decoder that vLLM's own wrapper compiles.

A part is a copy of the decoder that shares its modules, with layers of its own to run and a forward
of its own: Dynamo keeps what it compiled by code object. vLLM drops all guards, so a graph takes
whatever it is given; types and layouts are made the same for every call here. All parts are
compiled in vLLM's profile call, with several rows: Dynamo takes numbers of 0 and 1 for constants.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

log = logging.getLogger("vllm.offramp")


class Part(NamedTuple):
    """Layers [start, end) of a decoder.

    first, last: whether the embeddings come before them, and the norm after. embeds: whether the
    call is given embeddings in place of tokens.
    """

    start: int
    end: int
    first: bool
    last: bool
    embeds: bool

    @property
    def name(self) -> str:
        """The same in every process: vLLM keeps compiled code by it."""
        flags = "".join("fle"[n] for n, on in enumerate(self[2:]) if on)
        return f"offramp_{self.start}_{self.end}{flags and '_'}{flags}"


class Compiled:
    """Compiled parts of a decoder.

    open: whether a part that is not known is compiled.
    """

    def __init__(self, decoder: nn.Module, config: Any, names: Sequence[str]) -> None:
        """config: vLLM's whole. names: of what a decoder is given: ids, positions, state,
        embeddings."""
        self._decoder, self._config, self._names = decoder, config, names
        self._parts: dict[Part, Any] = {}
        self.open = False

    def __contains__(self, part: Part) -> bool:
        return self.open or part in self._parts

    def run(self, part: Part, given: Mapping[str, Any]) -> Any:
        ids, positions = self._names[:2]
        call = dict(given)
        if call.get(ids) is not None:
            call[ids] = None if part.embeds else call[ids].to(torch.int32).contiguous()
        call[positions] = call[positions].to(torch.int64).contiguous()
        if part not in self._parts:
            self._parts[part] = self._made(part)
        return self._parts[part](**call)

    def _made(self, part: Part) -> Any:
        from vllm.compilation.backends import set_model_tag
        from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
        from vllm.config import set_current_vllm_config

        made: Any = object.__new__(self._kind(part))
        held = {name: value for name, value in vars(self._decoder).items() if name != "forward"}
        vars(made).update(held)
        vars(made).update(
            start_layer=part.start,
            end_layer=part.end,
            do_not_compile=False,
            compiled=False,
            aot_compiled_fn=None,
            was_aot_compile_fn_loaded_from_disk=False,
            vllm_config=self._config,
            compilation_config=self._config.compilation_config,
            _compile_tag=part.name,
        )
        with set_current_vllm_config(self._config), set_model_tag(part.name):
            TorchCompileWithNoGuardsWrapper.__init__(made, compile_prefix=part.name)
        return made

    def _kind(self, part: Part) -> type:
        """A class of the decoder's whose forward is a function of its own."""
        from vllm.compilation.decorators import _support_torch_compile
        from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper

        of = type(self._decoder)
        theirs: Any = of.forward
        forward = FunctionType(
            theirs.__code__.replace(),
            theirs.__globals__,
            theirs.__name__,
            theirs.__defaults__,
            theirs.__closure__,
        )
        forward.__kwdefaults__ = theirs.__kwdefaults__
        forward.__annotations__ = theirs.__annotations__
        forward.__qualname__ = f"{theirs.__qualname__}.{part.name}"
        kind = type(of.__name__, (of,), {"forward": forward, "__module__": of.__module__})
        if not issubclass(of, TorchCompileWithNoGuardsWrapper):
            ids, positions, state, embeds = self._names
            kind = _support_torch_compile(kind, {ids: 0, positions: -1, state: 0, embeds: 0})
        return kind


def compiles(config: Any) -> bool:
    """Whether vLLM is set to compile. config: vLLM's whole."""
    from vllm.config import CompilationMode

    off = (None, CompilationMode.NONE, CompilationMode.STOCK_TORCH_COMPILE)
    return config.compilation_config.mode not in off and config.lora_config is None


def leave_uncompiled(model: nn.Module, decoder: nn.Module) -> None:
    """Have vLLM call a decoder, and what contains it, as they are."""
    for module in model.modules():
        if any(inner is decoder for inner in module.modules()):
            module.do_not_compile = True


def tried(run: Callable[[], Tensor]) -> Tensor | None:
    """What a call that compiles gives; None where the model's code cannot be traced."""
    try:
        return run()
    except Exception as error:  # whatever Dynamo and its backends raise
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        log.warning("Exits run eagerly, since parts of the decoder do not compile: %s", why[:300])
        return None
