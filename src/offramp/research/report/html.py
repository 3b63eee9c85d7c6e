"""One self-contained HTML page: its style, and the pieces it is made of.

Nothing on it is fetched. Every text is escaped here, so that an answer may hold anything. Light or
dark as the reader's system is; tables scroll inside their own box, never the page.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

STYLE = """\
:root{color-scheme:light dark;--ground:#f6f7f9;--panel:#fff;--ink:#1b2027;--soft:#5b6572;
--line:#dfe3e8;--mark:#1f6fb2;--good:#16794f;--bad:#b3401f}
@media (prefers-color-scheme:dark){:root{--ground:#0f1216;--panel:#171b21;--ink:#e4e8ee;
--soft:#9aa5b3;--line:#2b323c;--mark:#6db3ee;--good:#5ac796;--bad:#f08f6c}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.55 system-ui,-apple-system,
"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere}
main,header,footer{max-width:72rem;margin:0 auto;padding:0 1rem}
header{padding-top:2rem}
h1{font-size:clamp(1.5rem,5vw,2.25rem);line-height:1.15;margin:0 0 .4rem;letter-spacing:-.02em}
h2{font-size:1.3rem;line-height:1.25;margin:0 0 .75rem;letter-spacing:-.01em}
h3{font-size:1rem;margin:1.5rem 0 .5rem}
h2+h3,h3:first-child{margin-top:0}
p{margin:.25rem 0 .75rem;max-width:46rem}
.soft,figcaption,dt,caption{color:var(--soft)}
a{color:var(--mark)}
nav ul{display:flex;flex-wrap:wrap;gap:.25rem 1.1rem;list-style:none;margin:1rem 0 0;padding:0;
font-size:.9rem}
nav a{display:inline-block;padding:.3rem 0;text-decoration:none}
nav a:hover,nav a:focus-visible{text-decoration:underline}
section{background:var(--panel);border:1px solid var(--line);border-radius:14px;
padding:clamp(1rem,3vw,1.75rem);margin:1.25rem 0;scroll-margin-top:1rem}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,8.25rem),1fr));
gap:.6rem;margin:0 0 .5rem}
@media (min-width:40rem){.cards{grid-template-columns:repeat(auto-fill,minmax(10.5rem,1fr))}}
.cards div{border:1px solid var(--line);border-radius:10px;padding:.65rem .8rem}
.cards dt{font-size:.85rem;line-height:1.35}
.cards dd{margin:0}
.big{font-size:1.5rem;font-weight:650;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.range{display:inline-block;line-height:1.35;font-size:.82rem;color:var(--soft);font-variant-numeric:tabular-nums}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));
gap:1.25rem 2rem;align-items:start}
figure{margin:0;min-width:0}
figure svg{display:block;width:100%;max-width:36rem;height:auto}
figcaption{font-size:.85rem;line-height:1.45;margin-top:.35rem;max-width:36rem}
.scroll{overflow-x:auto;max-width:100%;border:1px solid var(--line);border-radius:10px;
margin:.5rem 0 1rem}
summary{cursor:pointer;font-size:.9rem;color:var(--mark);padding:.3rem 0}
.scroll:focus-visible{outline:2px solid var(--mark)}
table{border-collapse:collapse;font-size:.88rem;width:100%;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:.6rem .8rem;font-size:.85rem}
th,td{padding:.45rem .8rem;text-align:right;white-space:nowrap;border-top:1px solid var(--line)}
thead th{border-top:0;color:var(--soft);font-weight:600}
caption+thead th{border-top:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}
tbody th{font-weight:500;white-space:normal;min-width:8rem}
.words td,.words th{text-align:left;white-space:normal;min-width:7rem}
.answers{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr));gap:.9rem}
.answer{border:1px solid var(--line);border-radius:12px;padding:.9rem;min-width:0}
.answer img{float:right;width:5.5rem;height:auto;border-radius:8px;margin:0 0 .5rem .75rem}
.answer p{margin:.15rem 0 .4rem;font-size:.92rem}
.answer .said{line-height:2}
.label{font-size:.75rem;color:var(--soft);display:block;line-height:1.3}
.t{display:inline-block;border-radius:5px;padding:0 .3rem;margin:0 .12rem .12rem 0;line-height:1.5;
border:1px solid color-mix(in srgb,currentColor 22%,transparent);white-space:pre-wrap}
.t sub{font-size:.62em;opacity:.85;margin-left:.2em;vertical-align:baseline}
.legend{margin:.25rem 0 1rem;font-size:.85rem}
.same{color:var(--good)}.changed{color:var(--bad)}
.tag{font-size:.78rem;font-weight:600}
footer{padding-bottom:2.5rem;font-size:.85rem}
@media print{section{break-inside:avoid}nav{display:none}}
"""


@dataclass(frozen=True)
class Section:
    """A part of the page; `body` is HTML."""

    name: str
    title: str
    body: str


def document(title: str, intro: str, sections: Sequence[Section], ending: str) -> str:
    """The whole page. `title` and `intro` are text, `ending` is HTML."""
    links = "".join(f'<li><a href="#{s.name}">{escape(s.title)}</a></li>' for s in sections)
    parts = "\n".join(
        f'<section id="{s.name}">\n<h2>{escape(s.title)}</h2>\n{s.body}\n</section>'
        for s in sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>
{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="soft">{escape(intro)}</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{_own_ids(parts)}
</main>
<footer>{ending}</footer>
</body>
</html>
"""


def _own_ids(parts: str) -> str:
    """The plots with ids of their own: each was made as if it stood alone."""
    count = iter(range(10**6))

    def renamed(match: re.Match[str]) -> str:
        before = f"p{next(count)}-"
        svg = re.sub(r' id="', f' id="{before}', match[0])
        svg = re.sub(r'href="#', f'href="#{before}', svg)
        return re.sub(r"url\(#", f"url(#{before}", svg)

    return re.sub(r"<svg.*?</svg>", renamed, parts, flags=re.DOTALL)


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def heading(text: str) -> str:
    return f"<h3>{escape(text)}</h3>"


def figures(plots: Iterable[tuple[str, str]], beside: str = "") -> str:
    """Plots (SVG) with their captions (text), and some HTML, side by side where there is room."""
    each = [f"<figure>{svg}<figcaption>{escape(text)}</figcaption></figure>" for svg, text in plots]
    return f'<div class="figures">{"".join(each)}{beside and f"<div>{beside}</div>"}</div>'


def folded(summary: str, html: str) -> str:
    """What is shown on demand."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def cards(entries: Iterable[tuple[str, str, str]]) -> str:
    """Headline numbers: what it is, the number, and its interval or a remark."""
    each = [
        f'<div><dt>{escape(what)}</dt><dd><span class="big">{escape(number)}</span>'
        f'<br><span class="range">{escape(remark)}</span></dd></div>'
        for what, number, remark in entries
    ]
    return f'<dl class="cards">{"".join(each)}</dl>'


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table in a box of its own that scrolls. The first cell of a row names the row."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f'<table class="{kind}"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


# -- numbers ---------------------------------------------------------------------------------------

_NOT_FRACTIONS = ("CIDEr", "mean_rank")


def percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}%"


def metric(name: str, value: float | None, *, signed: bool = False) -> str:
    """A metric as it is usually written: a fraction as a percentage, another as it is."""
    if value is None:
        return "-"
    sign = "+" if signed else ""
    return f"{value:{sign}.3f}" if name in _NOT_FRACTIONS else f"{100 * value:{sign}.2f}%"


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def between(estimate: Mapping[str, Any], form: Any = percent) -> str:
    """The interval of an estimate; "" where it has none."""
    if estimate.get("low") is None or estimate.get("high") is None:
        return ""
    return f"{form(estimate['low'])} to {form(estimate['high'])}"


def with_interval(estimate: Mapping[str, Any] | None, form: Any = percent) -> str:
    """ "value (low to high)"."""
    if not estimate:
        return "-"
    ends = between(estimate, form)
    return f"{form(estimate.get('value'))} ({ends})" if ends else str(form(estimate.get("value")))
