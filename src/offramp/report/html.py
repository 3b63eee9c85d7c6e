"""One self-contained HTML page: templates filled with what the other commands measured.

Nothing on it is fetched. Every text is escaped by the templates, so that an answer may hold
anything. Light or dark as the reader's system is; tables scroll inside their own box, never the
page.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from offramp import __version__


def document(**values: Any) -> str:
    """Return the whole page.

    title, sections: name, title and HTML of each; missing: parts without data, and the commands
    that measure them; sentence: opening line of the page; "": its title.
    """
    return _own_ids(render("page", **values, version=__version__))


def render(template: str, **values: Any) -> Markup:
    """Fill a template of this package; its values are escaped."""
    return Markup(_environment().get_template(f"{template}.html.jinja").render(values))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("offramp.report"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "fine": fine}
    return environment


def _own_ids(page: str) -> str:
    """The plots with ids of their own: each was made as if it stood alone."""
    count = iter(range(10**6))

    def renamed(match: re.Match[str]) -> str:
        before = f"p{next(count)}-"
        svg = re.sub(r' id="', f' id="{before}', match[0])
        svg = re.sub(r'href="#', f'href="#{before}', svg)
        return re.sub(r"url\(#", f"url(#{before}", svg)

    return re.sub(r"<svg.*?</svg>", renamed, page, flags=re.DOTALL)


# -- numbers ---------------------------------------------------------------------------------------

_NOT_FRACTIONS = ("CIDEr", "mean_rank")


def percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}%"


def fine(value: float | None) -> str:
    return percent(value, 2)


def metric(name: str, value: float | None, *, signed: bool = False) -> str:
    """Return a metric in its usual form: a fraction as a percentage, others as they are."""
    if value is None:
        return "-"
    sign = "+" if signed else ""
    return f"{value:{sign}.3f}" if name in _NOT_FRACTIONS else f"{100 * value:{sign}.2f}%"


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def between(estimate: Mapping[str, Any], form: Any = percent) -> str:
    """Return the interval of an estimate; "" where it has none."""
    if estimate.get("low") is None or estimate.get("high") is None:
        return ""
    return f"{form(estimate['low'])} to {form(estimate['high'])}"


def with_interval(estimate: Mapping[str, Any] | None, form: Any = percent) -> str:
    """Return an estimate as "value (low to high)"."""
    if not estimate:
        return "-"
    ends = between(estimate, form)
    return f"{form(estimate.get('value'))} ({ends})" if ends else str(form(estimate.get("value")))
