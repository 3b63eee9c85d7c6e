"""Early exits inside vLLM. `register` is the plug-in that vLLM loads in each of its processes; it
does nothing until a server is started with {"offramp": {"exits": FOLDER}} as additional
configuration."""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncIterator
from typing import Any

__all__ = ["register"]

log = logging.getLogger("vllm.offramp")
VERSIONS = (0, 32), (0, 34)
"""Of vLLM: from, and up to but not including."""


def register() -> None:
    """Put the plug-in where vLLM reads its arguments, starts its engine, takes a request and hands
    an answer out. May be called again. In a vLLM where that cannot be, servers that ask for exits
    are refused, and all others are as they were."""
    try:
        problem = _version_problem()
        if problem is None:
            _put()
    except Exception as error:  # a name that moved must not end vLLM's commands
        what = f"{type(error).__name__}: {error}".replace("\n", " ")
        problem = f"This vLLM is laid out otherwise ({what[:200]})."
    if problem is not None:
        _refuse_exits(problem)


def _version_problem() -> str | None:
    from vllm import __version__, version

    found = tuple(version.__version_tuple__[:2])
    least, below = VERSIONS
    if found == (0, 0) or least <= found < below:  # 0.0: a development tree
        return None
    return f"This is vLLM {__version__}, and exits run in {least[0]}.{least[1]} up to 0.33."


def _put() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.core import DPEngineCoreProc, EngineCore, EngineCoreProc
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    _wrap(EngineArgs, "create_engine_config", _configured)
    # In a server this runs in the engine's process, and a process that is spawned loads plug-ins
    # only inside of EngineCore's own __init__.
    _wrap(EngineCore, "__init__", _made)
    _wrap(EngineCoreProc, "run_busy_loop", _begun)
    _wrap(DPEngineCoreProc, "run_busy_loop", _begun)
    _wrap(InputProcessor, "process_inputs", _taken)
    _wrap(OutputProcessor, "process_outputs", _handed_out)
    _wrap(OutputProcessor, "add_request", _awaited)
    _wrap(RequestState, "_new_completion_output", _completed)


def _put_in_server() -> None:
    """Of the processes that answer over HTTP alone: importing it takes a while."""
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

    _wrap(OpenAIServingChat, "chat_completion_full_generator", _chatted)
    _wrap(OpenAIServingCompletion, "request_output_to_completion_response", _said)


def _refuse_exits(problem: str) -> None:
    remedy = "Install vLLM 0.32 or 0.33, or serve without exits."
    log.warning("offramp is off. %s\n%s", problem, remedy)
    try:
        from vllm.engine.arg_utils import EngineArgs
    except ImportError:
        return

    def refusing(theirs: Any, arguments: Any, *args: Any, **kw: Any) -> Any:
        from offramp_vllm.refuse import Refused
        from offramp_vllm.settings import wanted

        if wanted(getattr(arguments, "additional_config", None)) is not None:
            raise Refused(problem, remedy)
        return theirs(arguments, *args, **kw)

    if hasattr(EngineArgs, "create_engine_config"):
        _wrap(EngineArgs, "create_engine_config", refusing)


def _wrap(owner: type, name: str, ours: Any) -> None:
    theirs = owner.__dict__[name]
    if getattr(theirs, "offramp", False):
        return

    @functools.wraps(theirs)
    def wrapped(self: Any, *args: Any, **kw: Any) -> Any:
        return ours(theirs, self, *args, **kw)

    wrapped.offramp = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def _configured(theirs: Any, arguments: Any, *args: Any, **kw: Any) -> Any:
    from offramp_vllm.settings import check_made, prepare, tell_guarantees, wanted

    if wanted(arguments.additional_config) is None:
        return theirs(arguments, *args, **kw)
    prepare(arguments)
    config = theirs(arguments, *args, **kw)
    check_made(config)
    tell_guarantees(config)
    _put_in_server()
    return config


def _made(theirs: Any, core: Any, *args: Any, **kw: Any) -> None:
    """An engine in this process is checked once it is made; one of its own, before its loop."""
    from vllm.v1.engine.core import EngineCoreProc

    theirs(core, *args, **kw)
    if not isinstance(core, EngineCoreProc):
        _check(core)


def _begun(theirs: Any, core: Any, *args: Any, **kw: Any) -> Any:
    _check(core)
    return theirs(core, *args, **kw)


def _check(core: Any) -> None:
    from offramp_vllm.adapter import read_exported
    from offramp_vllm.check import check
    from offramp_vllm.settings import folder_of, wanted

    if wanted(core.vllm_config.additional_config) is not None:
        check(core, read_exported(folder_of(core.vllm_config)))


def _taken(
    theirs: Any, processor: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kw: Any
) -> Any:
    """A request that asks for what there is not is told so, before it reaches the engine."""
    from vllm.exceptions import VLLMValidationError

    from offramp_vllm.adapter import read_exported
    from offramp_vllm.refuse import Refused
    from offramp_vllm.settings import folder_of, served, wanted

    config = processor.vllm_config
    extra = getattr(params, "extra_args", None)
    if extra and wanted(config.additional_config) is not None:
        rule = processor.__dict__.get("offramp_rule")
        if rule is None:
            rule = processor.__dict__["offramp_rule"] = read_exported(folder_of(config)).rule
        try:
            served(config, rule, extra)
        except Refused as error:  # a server makes a bad request of this class alone
            raise VLLMValidationError(str(error)) from error
    return theirs(processor, request_id, prompt, params, *args, **kw)


def _depths(processor: Any) -> Any:
    from offramp_vllm.tell import Depths

    return processor.__dict__.setdefault("offramp_depths", Depths())


def _awaited(theirs: Any, processor: Any, request: Any, *args: Any, **kw: Any) -> None:
    theirs(processor, request, *args, **kw)
    processor.request_states[request.request_id].offramp_depths = _depths(processor)


def _handed_out(theirs: Any, processor: Any, outputs: Any, *args: Any, **kw: Any) -> Any:
    depths = _depths(processor)
    depths.gather(outputs)
    made = theirs(processor, outputs, *args, **kw)
    depths.forget(processor.request_states)
    return made


def _completed(theirs: Any, state: Any, *args: Any, **kw: Any) -> Any:
    from vllm.sampling_params import RequestOutputKind

    made = theirs(state, *args, **kw)
    depths = getattr(state, "offramp_depths", None)
    if depths is not None:
        depths.put(state.request_id, made, new=state.output_kind == RequestOutputKind.DELTA)
    return made


async def _chatted(
    theirs: Any, serving: Any, request: Any, results: AsyncIterator[Any], *args: Any, **kw: Any
) -> Any:
    from offramp_vllm.tell import choices

    last: list[Any] = []

    async def seen() -> AsyncIterator[Any]:
        async for one in results:
            last[:] = one.outputs
            yield one

    return choices(await theirs(serving, request, seen(), *args, **kw), last)


def _said(theirs: Any, serving: Any, results: Any, *args: Any, **kw: Any) -> Any:
    from offramp_vllm.tell import choices

    outputs = [output for one in results for output in one.outputs]
    return choices(theirs(serving, results, *args, **kw), outputs)
