"""Early exits inside vLLM. `register` is the plug-in that vLLM loads in each of its processes; it
does nothing until a server is started with {"offramp": {"exits": FOLDER}} as additional
configuration."""

from __future__ import annotations

import functools
from typing import Any

__all__ = ["register"]


def register() -> None:
    """Put the plug-in where vLLM reads its arguments, starts its engine, takes a request and hands
    an answer out. May be called again."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import OutputProcessor

    _wrap(EngineArgs, "create_engine_config", _configured)
    _wrap(EngineCore, "__init__", _started)
    _wrap(InputProcessor, "process_inputs", _taken)
    _wrap(OutputProcessor, "process_outputs", _handed_out)


def _wrap(owner: type, name: str, ours: Any) -> None:
    theirs = getattr(owner, name)
    if getattr(theirs, "offramp", False):
        return

    @functools.wraps(theirs)
    def wrapped(self: Any, *args: Any, **kw: Any) -> Any:
        return ours(theirs, self, *args, **kw)

    wrapped.offramp = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def _configured(theirs: Any, arguments: Any, *args: Any, **kw: Any) -> Any:
    from offramp_vllm.settings import check_made, prepare, wanted

    if wanted(arguments.additional_config) is None:
        return theirs(arguments, *args, **kw)
    prepare(arguments)
    config = theirs(arguments, *args, **kw)
    check_made(config)
    return config


def _started(theirs: Any, core: Any, vllm_config: Any, *args: Any, **kw: Any) -> None:
    from offramp_vllm.adapter import read_exported
    from offramp_vllm.check import check
    from offramp_vllm.settings import folder_of, wanted

    theirs(core, vllm_config, *args, **kw)
    if wanted(vllm_config.additional_config) is not None:
        check(core, read_exported(folder_of(vllm_config)))


def _taken(theirs: Any, processor: Any, request_id: str, prompt: Any, params: Any, *args: Any,
           **kw: Any) -> Any:  # fmt: skip
    """A request that asks for what there is not is told so, before it reaches the engine."""
    from vllm.exceptions import VLLMValidationError

    from offramp_vllm.adapter import read_exported
    from offramp_vllm.policy import asked
    from offramp_vllm.refuse import Refused
    from offramp_vllm.settings import folder_of, wanted

    config = processor.vllm_config
    extra = getattr(params, "extra_args", None)
    if extra and wanted(config.additional_config) is not None:
        rule = processor.__dict__.get("offramp_rule")
        if rule is None:
            rule = processor.__dict__["offramp_rule"] = read_exported(folder_of(config)).rule
        try:
            asked(rule, extra, drafts=config.speculative_config is not None)
        except Refused as error:  # a server makes a bad request of this class alone
            raise VLLMValidationError(str(error)) from error
    return theirs(processor, request_id, prompt, params, *args, **kw)


def _handed_out(theirs: Any, processor: Any, outputs: Any, *args: Any, **kw: Any) -> Any:
    from offramp_vllm.tell import Depths

    depths = processor.__dict__.setdefault("offramp_depths", Depths())
    depths.gather(outputs)
    made = theirs(processor, outputs, *args, **kw)
    depths.forget(processor.request_states)
    return made
