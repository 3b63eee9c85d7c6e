"""Options that commands share; types, defaults and choices come from the dataclasses and the dicts
that they fill."""

from __future__ import annotations

import argparse
import shlex
import typing
from collections.abc import Callable, Collection, Iterable
from dataclasses import MISSING, Field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

from offramp.cli.parser import (
    Flattened,
    Named,
    Parser,
    named,
    one_of,
    or_none,
    seed,
    share,
    threads,
    truth,
    whole,
    whole_numbers,
)
from offramp.engines import AUTO, TORCH, VISION, DecoderEngine, all_engines

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZE = ("int8", "int4")
Options = Callable[[Parser], None]
_SAME: Any = object()
Engines = Literal["none", "plain", "all"]
"""The engines that a command takes: none, those that write many answers at once in PyTorch, all."""
NAMED_EXITS = (
    "folder or hub name of trained exits; or photo, photo-chat or tiny-opt, which ship with "
    "theirs, or tiny-t5, without"
)
"""What a command that takes exits says of them."""
BACKBONE = "hub name or folder of the VLM; or photo, photo-chat, tiny-opt or tiny-t5, which ship"


def add_command(
    commands: Any,
    name: str,
    help: str,
    example: str,
    run: Any,
    options: Options,
    *,
    usual: str = "",
    result: bool = True,
) -> None:
    """Add a command. options: adds its options, at the first use of the command.

    usual: names of the options in `--help`, separated by spaces; "": all. result: whether the
    command prints one, which --json prints as JSON.
    """

    def late(parser: Parser) -> None:
        options(parser)
        _common_options(parser, result=result)
        parser.usage = _usage(parser)
        if usual:
            parser.show_usual([f"--{name}" for name in usual.split()])

    parser: Parser = commands.add_parser(
        name, help=help, description=help, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.example = example
    parser.set_defaults(run=run)
    parser.late = late


def name_first(
    parser: Parser,
    group: Any,
    dest: str,
    old: Iterable[str],
    help: str,
    *,
    required: bool = True,
    **more: Any,
) -> None:
    """Add the model's name as the first word. old: hidden options of earlier versions for the name.
    more: of `add_argument`."""
    word = group.add_argument(dest, nargs="?", metavar="NAME", action=Named, help=help, **more)
    for flag in old:
        group.add_argument(flag, dest=dest, action=Named, help=argparse.SUPPRESS, **more)
    parser.name = word if required else None


def _usage(parser: Parser) -> str:
    """The words that a command needs, in the order in which they are typed."""
    words = []
    for action in parser._actions:
        name = str(action.metavar or action.dest)
        if not action.option_strings:
            several = f"{name} [{name} ...]" if action.nargs in ("+", "*") else name
            optional = action.nargs in ("?", "*") and action is not parser.name
            words.append(f"[{several}]" if optional else several)
        elif action.required:
            words.append(f"{action.option_strings[0]} {action.metavar or action.dest.upper()}")
    return " ".join(["%(prog)s", *words, "[options]"])


def _common_options(parser: Parser, *, result: bool) -> None:
    """Add the options of every command."""
    group = parser.add_argument_group("every command")
    if result:
        group.add_argument("--json", action="store_true", help="print the result as JSON")
    group.add_argument("--quiet", action="store_true", help="print results and errors only")
    group.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with one option a line, such as steps: 400; the command line wins "
        "(default: none)",
    )


def name_option(
    group: Any,
    flag: str,
    names: Iterable[str],
    help: str,
    *,
    default: str | None = None,
    shown: str | None = None,
    **more: Any,
) -> None:
    """Add an option that takes one of these names. shown: the default in words."""
    names = list(names)
    default_text = default if shown is None else shown
    ending = "" if default_text is None else f" (default: {default_text})"
    group.add_argument(
        flag,
        metavar="NAME",
        default=default,
        choices=names,
        help=f"{help}: {one_of(names)}{ending}",
        **more,
    )


def field_option(
    group: Any,
    cls: type,
    name: str,
    help: str | None = None,
    *,
    choices: Iterable[str] | None = None,
    default: Any = _SAME,
    shown: str | None = None,
) -> None:
    """Add the option of a dataclass's field: with its type and default, and the "help" and
    "choices" of its metadata unless given here."""
    field = next(field for field in fields(cls) if field.name == name)
    hint = _hints(cls)[name]
    flag = field.metadata.get("flag") or f"--{name.replace('_', '-')}"
    if default is _SAME:
        default = _default_of(field)
    text = help or field.metadata["help"]
    known = choices if choices is not None else field.metadata.get("choices")
    if known is not None:
        shown = shown or field.metadata.get("shown")
        name_option(group, flag, known, text, default=default, shown=shown)
        return
    text = f"{text} (default: {shown or _shown(field, default)})"
    if bool in (hint, *typing.get_args(hint)):
        yes_no = argparse.BooleanOptionalAction
        group.add_argument(flag, action=yes_no, default=default, help=text)
        return
    if "tuple" in str(hint):
        depths_option(group, flag, text, default=default)
        return
    several = {"nargs": "+"} if "Sequence" in str(hint) else {}
    group.add_argument(
        flag,
        **several,
        metavar=field.metadata.get("metavar") or _metavar(hint),
        type=_parser_of(cls, field),
        default=default,
        help=text,
    )


def settings_option(
    group: Any, flag: str, cls: type, names: Collection[str], help: str, *, first: str = ""
) -> None:
    """Add one option for several fields of a dataclass, as NAME=VALUE,NAME=VALUE; its value has the
    given fields by name. first: the field of a value without a name."""
    known = {field.name: field for field in fields(cls) if field.name in names}

    def parse(text: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for part in text.split(","):
            name, given, value = part.partition("=")
            if not given and first:
                name, given, value = first, "=", part
            name = name.replace("-", "_")
            if not given or name not in known:
                raise argparse.ArgumentTypeError(
                    f"{part[:60]!r} is not of the form NAME=VALUE, with a name of {one_of(known)}"
                )
            try:
                found[name] = _parser_of(cls, known[name])(value)
            except (ValueError, argparse.ArgumentTypeError) as error:
                raise argparse.ArgumentTypeError(f"{name}: {error}") from None
        return found

    told = []
    for name, field in known.items():
        choices = field.metadata.get("choices")
        names = "" if choices is None else f": {one_of(choices)}"
        told.append(f"{name}={_shown(field, _default_of(field))}: {field.metadata['help']}{names}")
    group.add_argument(
        flag,
        metavar="NAME=VALUE,...",
        type=parse,
        default={},
        help=f"{help}; with their defaults, {'; '.join(told)}",
    )


def _default_of(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default


def _shown(field: Field[Any], default: Any) -> str:
    """A default in words."""
    if isinstance(default, bool):
        return str(default).lower()
    number = f"{default:g}" if isinstance(default, float) else default
    return str(field.metadata.get("shown") or ("none" if default in (None, {}, ()) else number))


def depths_option(group: Any, flag: str, help: str, *, default: Any = None) -> None:
    """Add an option that lists depths, as 3,6."""
    group.add_argument(
        flag,
        metavar="N,N",
        type=whole_numbers(1),
        nargs="+",
        action=Flattened,
        default=default,
        help=help,
    )


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def field_options(
    group: Any, cls: type, names: Collection[str] | None = None, **choices: Iterable[str]
) -> None:
    """Add the options of these fields, in their order, with their own help. names: None: all fields
    with help. choices: by field."""
    for field in fields(cls):
        if "help" in field.metadata if names is None else field.name in names:
            field_option(group, cls, field.name, choices=choices.get(field.name))


def filled(arguments: argparse.Namespace, cls: type) -> dict[str, Any]:
    """Return the fields of a dataclass that a command's options set."""
    words = {
        field.name: field.metadata.get("flag", f"--{field.name}")[2:].replace("-", "_")
        for field in fields(cls)
        if "help" in field.metadata
    }
    return {n: getattr(arguments, word) for n, word in words.items() if hasattr(arguments, word)}


def _parser_of(cls: type, field: Field[Any]) -> Callable[[str], Any]:
    """The parser of a field's value."""
    said, hint = field.metadata, _hints(cls)[field.name]
    if (choices := said.get("choices")) is not None:
        return named(choices)
    if (parse := said.get("parse")) is not None or said.get("share"):
        return parse or share
    kinds = set(typing.get_args(hint)) - {type(None)}
    if Path in kinds:
        return Path
    optional = type(None) in typing.get_args(hint)
    kind = kinds.pop() if kinds else hint
    number = seed if field.name == "seed" else whole(said.get("least", 1))
    known: dict[Any, Callable[[str], Any]] = {int: number, float: float, str: str, bool: truth}
    parse = known[kind]
    return or_none(parse) if optional and parse is number else parse


def _metavar(hint: Any) -> str:
    kinds = {"int": "N", "float": "X"}
    return next((shown for kind, shown in kinds.items() if kind in str(hint)), "TEXT")


# -- groups -----------------------------------------------------------------------------------


def model_options(
    parser: Parser, *, adapter: bool | None = None, engines: Engines = "plain", auto: bool = False
) -> None:
    """Add the model's name and the options of its backbone. adapter: whether exits must be named;
    None: the command takes a backbone alone.

    engines: in which the command's adapter may run. auto: as of `engine_option`.
    """
    group = parser.add_argument_group("model")
    if adapter is None:
        name_first(parser, group, "backbone", ("--backbone",), BACKBONE)
        precision_options(group)
    else:
        name_first(parser, group, "adapter", ("--adapter",), NAMED_EXITS, required=adapter)
        adapter_options(parser, group, engines, auto=auto)


def adapter_options(parser: Parser, group: Any, engines: Engines, *, auto: bool = False) -> None:
    """Add the options for loading the named adapter. engines, auto: as of `model_options`."""
    group.add_argument("--backbone", metavar="NAME", help=f"{BACKBONE} (default: the adapter's)")
    precision_options(group, quantize=engines != "none")
    if engines != "none":
        engine_option(parser.add_argument_group("decoder"), engines, auto=auto)


def engine_option(group: Any, engines: Engines = "all", *, auto: bool = False) -> None:
    """Add the option for the decoder's engine, one of these. auto: whether "auto", the fastest, is
    allowed and the default."""
    named = {n: one for n, one in all_engines().items() if engines == "all" or writes_many(n, one)}
    known = ", ".join(f"{n} ({one.said})" if one.said else n for n, one in named.items())
    fastest = f"{AUTO} (the fastest here that keeps the answers, measured once), " if auto else ""
    default = AUTO if auto else TORCH
    group.add_argument(
        "--engine",
        metavar="NAME",
        default=default,
        choices=[*([AUTO] if auto else []), *named],
        help=f"what runs the decoder: {fastest}{known} (default: {default})",
    )


def writes_many(name: str, engine: DecoderEngine) -> bool:
    """Return True for an engine that writes many answers at once in PyTorch."""
    return not engine.replaces and engine.serves is None and name != "compiled"


def runtime_options(parser: Parser, *, sized: bool = True) -> Any:
    """Add the options that belong to --engine. sized: with threads and context; returns the
    group."""
    group = parser.add_argument_group("runtime")
    group.add_argument(
        "--gguf",
        type=Path,
        metavar="FOLDER",
        help="what `offramp export --out` wrote (default: none)",
    )
    if not sized:
        return group
    group.add_argument(
        "--threads",
        type=threads,
        metavar="N",
        help="threads of an engine other than torch (default: as many as PyTorch has)",
    )
    group.add_argument(
        "--context",
        type=whole(1),
        default=2048,
        metavar="N",
        help="longest prompt with its answer, in tokens, of an engine other than torch "
        "(default: 2048)",
    )
    return group


def vision_options(group: Any) -> None:
    """Add the options of how images are read."""
    towers = [tower for engine in all_engines().values() for tower in engine.towers]
    name_option(
        group,
        "--vision",
        (*VISION, *towers),
        "what runs the vision tower on a CPU: in float32; "
        "mtmd: in llama.cpp, from a folder of `offramp export --vision`",
        default=AUTO,
        shown=f"as --engine {AUTO} finds it, else {TORCH}",
    )
    group.add_argument(
        "--shrink-on-load",
        action="store_true",
        help="decode large JPEGs at a half, a quarter or an eighth, twice as large as the model "
        "looks at them or more: faster, and pixels differ by rounding",
    )


def precision_options(group: Any, *, quantize: bool = True) -> None:
    """Add the options for the backbone's revision, precision and device. quantize: whether its
    weights may be rounded."""
    group.add_argument("--revision", help="hub revision of the backbone (default: its newest)")
    name_option(
        group, "--dtype", DTYPES, "precision of the backbone", default="auto", shown="as saved"
    )
    if quantize:
        name_option(
            group,
            "--quantize",
            QUANTIZE,
            "round the decoder layers' weights, for speed on a CPU",
            shown="as saved",
        )
    group.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="such as cpu, cuda or cuda:1 (default: cuda where there is one; cpu for tiny models)",
    )


def data_options(
    parser: Parser, what: str, *, limit: int | None = None, required: bool = True
) -> Any:
    """Add the options that name examples. what: the command's need, in words."""
    group = parser.add_argument_group("data")
    ending = "" if required or "default" in what else " (default: none)"
    group.add_argument(
        "--data",
        required=required,
        nargs="+",
        metavar="FILE",
        help=f"{what}: JSONL file, folder of images, datasets name or folder, or a data set's "
        f"official file (VQA: the questions; annotations beside them are found){ending}",
    )
    group.add_argument(
        "--images", metavar="FOLDER", help="folder of the images (default: that of the data)"
    )
    group.add_argument("--split", help="only this split (Karpathy's files; default there: test)")
    group.add_argument(
        "--group-by",
        default="group",
        metavar="FIELD",
        help="field of the rows that names the document, film, patient or user an image came in, "
        "or 'folder'; whole groups are drawn (default: group, where rows have it)",
    )
    group.add_argument(
        "--prompt",
        help="prompt for captions, or a template with {question} (default: the rows' "
        "own, else 'Caption:' and 'Question: {question} Answer:')",
    )
    group.add_argument(
        "--limit",
        type=whole(1),
        default=limit,
        metavar="N",
        help="sample of this many examples, with all questions about their images (default: "
        f"{limit or 'all'})",
    )
    return group


def measured_options(
    parser: Parser,
    what: str,
    *,
    adapter: bool,
    seen: str,
    allow_seen: bool,
    engines: Engines = "plain",
    auto: bool = False,
) -> None:
    """Add the options for model and data of a command that measures an adapter on unseen images.

    adapter: whether one must be named. seen: steps in which images count as seen. allow_seen:
    whether seen images may be allowed. engines, auto: as of `model_options`.
    """
    model_options(parser, adapter=adapter, engines=engines, auto=auto)
    vision_options(parser.add_argument_group("images"))
    data = data_options(parser, what)
    ways = ("refuse", "leave-out", *(["allow"] if allow_seen else []))
    name_option(data, "--seen", ways, f"images that the exits were {seen} on", default=ways[0])


def threshold_option(parser: Parser) -> Any:
    """Add the option of one threshold for all exits; returns the group."""
    group = parser.add_argument_group("early exit")
    group.add_argument(
        "--threshold",
        type=share,
        metavar="X",
        help="one threshold for all exits (default: the adapter's)",
    )
    return group


LONGEST = 40
"""Tokens of an answer, where nothing says how many."""


def length_option(group: Any, default: int | None = LONGEST, shown: str | None = None) -> None:
    group.add_argument(
        "--max-new-tokens",
        type=whole(1),
        default=default,
        metavar="N",
        help=f"longest answer (default: {shown or default})",
    )


LOADED = (
    "backbone",
    "revision",
    "dtype",
    "quantize",
    "device",
    "engine",
    "gguf",
    "vision",
    "shrink_on_load",
)
"""Options that say how a model is loaded."""
ASKED = ("prompt", "max_new_tokens")
"""Options without which the next command would ask of other prompts, or for longer answers: an
attempt at a guarantee is spent on what is asked."""
DATA = ("images", "split", "group_by")


def asked_again(arguments: argparse.Namespace, *names: str) -> str:
    """Return the given options among these, as words for the next command."""
    given: dict[str, list[str]] = getattr(arguments, "given", {})
    return "".join(f" {shlex.join(given[name])}" for name in names if name in given)


def one_again(arguments: argparse.Namespace) -> str:
    """Return the options for one answer as words, without a template."""
    names = ASKED[1:] if "{" in (arguments.prompt or "") else ASKED
    return f"{asked_again(arguments, *LOADED)} --image dog.jpg{asked_again(arguments, *names)}"


def batch_option(group: Any, default: int, help: str = "examples at once") -> None:
    group.add_argument(
        "--batch-size",
        type=whole(1),
        default=default,
        metavar="N",
        help=f"{help} (default: {default})",
    )
