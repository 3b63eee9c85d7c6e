"""Fields of configurations that are options of the command line too: what they mean stands once."""

from dataclasses import field
from typing import Any


def option(default: Any, help: str, **more: Any) -> Any:
    """Return a dataclass's field with metadata for `offramp.cli.options.field_option`.

    more: `choices`; `shown`: the default in words; `metavar`; `parse`: type on the command line;
    `share`: whether it is a number from 0 to 1; `least`: the least whole number, by default 1;
    `flag`: if it differs from the field's name.
    """
    return field(default=default, metadata={"help": help, **more})
