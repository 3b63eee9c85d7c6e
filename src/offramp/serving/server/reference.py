"""The API as a page to read: its OpenAPI document, without a script and without another host."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 56rem; padding: 1rem; }
h1, h2 { overflow-wrap: anywhere; }
code { font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
h2 { border-top: 1px solid #8888; margin-top: 2rem; padding-top: 1rem; }
h2 b { border: 1px solid; border-radius: .3rem; font-size: .8em; padding: .1rem .4rem; }
table { border-collapse: collapse; width: 100%; }
td:first-child, th { white-space: nowrap; }
td:first-child code { overflow-wrap: normal; }
th, td { border-bottom: 1px solid #8884; padding: .3rem .6rem .3rem 0; text-align: left;
  vertical-align: top; }
@media (max-width: 36rem) {
  tr { display: block; border-bottom: 1px solid #8884; padding: .3rem 0; }
  td { border: 0; display: block; padding: 0; }
  tr:first-child, td:empty { display: none; }
}
"""
_LIMITS = {
    "minimum": "at least", "maximum": "at most", "exclusiveMinimum": "above",
    "exclusiveMaximum": "below", "minLength": "characters from", "maxLength": "characters up to",
    "minItems": "items from", "maxItems": "items up to", "pattern": "like",
}  # fmt: skip


def reference(document: Mapping[str, Any]) -> str:
    """The page of an OpenAPI document."""
    info = document["info"]
    parts = [*_operations(document["paths"]), *_schemas(document["components"]["schemas"])]
    title = f"{escape(info['title'])} {escape(info['version'])}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{title}: API</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{title}: API</h1>"
        "<p>OpenAI's API, as far as it is listed here; every other field is refused by name. "
        '<a href="openapi.json">openapi.json</a> is the same for programs, '
        '<a href=".">the page</a> tries it.</p>'
        f"{''.join(parts)}</main></body></html>"
    )


def _operations(paths: Mapping[str, Any]) -> Iterator[str]:
    for path, methods in paths.items():
        for method, about in methods.items():
            yield f"<h2><b>{method.upper()}</b> <code>{escape(path)}</code></h2>"
            yield f"<p>{_text(about.get('description') or about['summary'])}</p>"
            content = about.get("requestBody", {}).get("content", {})
            for kind, body in content.items():
                yield f"<p>Takes {_type(body['schema'])} as <code>{escape(kind)}</code>.</p>"


def _schemas(schemas: Mapping[str, Any]) -> Iterator[str]:
    for name, schema in schemas.items():
        fields = schema.get("properties")
        if not fields or name in ("HTTPValidationError", "ValidationError"):  # FastAPI's, not ours
            continue
        yield f'<h2 id="{escape(name)}">{escape(name)}</h2>'
        yield f"<p>{_text(schema.get('description', ''))}</p>"
        yield "<table><tr><th>field</th><th>what it takes</th><th></th></tr>"
        for field, about in fields.items():
            usual = "required" if field in schema.get("required", ()) else _usual(about)
            yield (
                f"<tr><td><code>{escape(field)}</code></td><td>{_type(about)}</td>"
                f"<td>{usual}</td></tr>"
            )
        yield "</table>"


def _text(text: str) -> str:
    """Docstring as HTML."""
    return re.sub("`(.+?)`", r"<code>\1</code>", escape(text))


def _usual(about: Mapping[str, Any]) -> str:
    value = about.get("default")
    return "" if value is None else f"default {_written(value)}"


def _type(about: Mapping[str, Any]) -> str:
    """What a value may be, in words; links to what is described on the page."""
    if "$ref" in about:
        name = escape(about["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    for choice in ("anyOf", "oneOf", "allOf"):
        if choice in about:
            kinds = [part for part in about[choice] if part.get("type") != "null"]
            return " or ".join(map(_type, kinds))
    if "const" in about:
        return _written(about["const"])
    if "enum" in about:
        return " or ".join(map(_written, about["enum"]))
    kind = escape(str(about.get("type", "anything")))
    if kind == "array":
        kind = f"list of {_type(about.get('items', {}))}"
    elif isinstance(about.get("additionalProperties"), Mapping):
        kind = f"object of {_type(about['additionalProperties'])}"
    limits = [f"{words} {_written(about[n])}" for n, words in _LIMITS.items() if n in about]
    return ", ".join([kind, *limits])


def _written(value: Any) -> str:
    """A value as JSON has it; whole numbers as such."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"<code>{escape(json.dumps(value, ensure_ascii=False))}</code>"
