"""Fields of configurations that are options of the command line too: what they mean stands once."""

from dataclasses import field
from typing import Any


def option(default: Any, help: str, **more: Any) -> Any:
    """A dataclass's field with what `offramp.cli.options.field_option` reads of it.

    more: `choices`; `shown`, the default in words; `metavar`; `parse`, its type on the command
        line; `share`, whether it is a number from 0 to 1; `flag`, where that is not named as the
        field is.
    """
    return field(default=default, metadata={"help": help, **more})
