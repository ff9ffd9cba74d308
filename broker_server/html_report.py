"""Reports as one HTML page that holds all of itself and needs no network: its tables, its style."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #1a1a1a; background: #fff }
.wide { overflow-x: auto; margin: 1.5em 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap }
caption { text-align: left; font-weight: 600; padding: .4em 0 }
th, td { padding: .25em .7em; border-bottom: 1px solid #8886; text-align: right }
th:first-child { text-align: left; position: sticky; left: 0; background: #fff }
svg { max-width: 100%; height: auto; display: block }
svg text { font: 11px system-ui, sans-serif; fill: currentColor }
svg.plot { background: #fff; color: #000 }
svg .grid { stroke: #8884; fill: none }
figcaption { font-weight: 600 } figure { margin: 2em 0 } code { overflow-wrap: anywhere }
@media (prefers-color-scheme: dark) { body, th:first-child { color: #e6e6e6; background: #161616 } }
"""


@dataclass(frozen=True)
class Table:
    """Text in rows; the first cell of a line says what the line is about."""

    caption: str
    head: Sequence[str]
    lines: Sequence[Sequence[str]] = field(default_factory=list)


def as_html(table: Table) -> str:
    """A table that a screen reader can read, and that scrolls by itself where it is too wide."""
    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in table.head)
    lines = "".join(
        f'<tr><th scope="row">{html.escape(line[0])}</th>' + "".join(f"<td>{html.escape(text)}</td>" for text in line[1:]) + "</tr>\n"
        for line in table.lines
    )
    caption = html.escape(table.caption)
    body = lines or f'<tr><td colspan="{len(table.head)}">none</td></tr>'
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{caption}"><table><caption>{caption}</caption>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"
    )


def page(title: str, body: str) -> str:
    """A whole page; the title is text, the body HTML."""
    name = html.escape(title)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Regrow: {name}</title><style>{STYLE}</style></head>\n<body><h1>{name}</h1>\n{body}</body></html>\n"
    )
