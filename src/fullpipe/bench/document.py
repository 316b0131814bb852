"""A report as data: headings, sentences, tables and figures, and their two forms, HTML and Markdown. No torch.

The HTML is one file that needs no network: style and script are in it, figures are inline SVG, and a
Content-Security-Policy forbids it to load anything. Tables sort by a click on a column's head.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Cell:
    """text: what is shown. under: a second, smaller line. value: what the column is sorted by (the text, if None)."""

    text: str
    under: str = ""
    value: float | None = None
    best: bool = False


@dataclass(frozen=True, slots=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True, slots=True)
class Prose:
    """A paragraph. `code` marks are set as such. small: a remark."""

    text: str
    small: bool = False


@dataclass(frozen=True, slots=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True, slots=True)
class Tile:
    """A figure worth reading first, with a line of explanation under it."""

    figure: str
    label: str
    note: str


@dataclass(frozen=True, slots=True)
class Tiles:
    tiles: Sequence[Tile]


@dataclass(frozen=True, slots=True)
class Grid:
    """A table. Columns whose cells have values are aligned right."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True, slots=True)
class Picture:
    """name: of its file, without suffix. svg: one <svg> element. caption: what to see in it."""

    name: str
    svg: str
    caption: str


@dataclass(frozen=True, slots=True)
class Verbatim:
    text: str


@dataclass(frozen=True, slots=True)
class Folded:
    """Shown when asked for. in_markdown: whether the Markdown has it at all."""

    summary: str
    blocks: Sequence[Block]
    in_markdown: bool = True


Block = Heading | Prose | Bullets | Tiles | Grid | Picture | Verbatim | Folded


@dataclass(slots=True)
class Document:
    title: str
    blocks: list[Block] = field(default_factory=list)

    def pictures(self) -> list[Picture]:
        return list(_pictures(self.blocks))


def _pictures(blocks: Sequence[Block]) -> Iterator[Picture]:
    for block in blocks:
        if isinstance(block, Picture):
            yield block
        elif isinstance(block, Folded):
            yield from _pictures(block.blocks)


# ---- HTML ------------------------------------------------------------------------------------------------


def to_html(document: Document) -> str:
    headings = [block for block in document.blocks if isinstance(block, Heading) and block.level == 2]
    links = "".join(f'<a href="#{_anchor(one.text)}">{html.escape(one.text)}</a>' for one in headings)
    body = "\n".join(_html(block) for block in document.blocks)
    return _PAGE.format(title=html.escape(document.title), style=_STYLE, script=_SCRIPT, links=links, body=body)


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            anchor = f' id="{_anchor(text)}"' if level == 2 else ""
            return f"<h{level}{anchor}>{_inline(text)}</h{level}>"
        case Prose(text, small):
            return f'<p class="small">{_inline(text)}</p>' if small else f"<p>{_inline(text)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>"
        case Tiles(tiles):
            return '<div class="tiles">' + "".join(map(_tile, tiles)) + "</div>"
        case Grid():
            return _html_grid(block)
        case Picture(_, svg, caption):
            return f"<figure>{svg}<figcaption>{_inline(caption)}</figcaption></figure>"
        case Verbatim(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Folded(summary, blocks):
            return (f"<details><summary>{_inline(summary)}</summary>" + "\n".join(map(_html, blocks)) + "</details>")


def _tile(tile: Tile) -> str:
    return (f'<div class="tile"><b>{html.escape(tile.figure)}</b><span>{_inline(tile.label)}</span>'
            f"<small>{_inline(tile.note)}</small></div>")


def _html_grid(grid: Grid) -> str:
    numeric = _numeric(grid)
    heads = "".join(f'<th scope="col"{_side(is_number)}><button type="button">{_inline(column)}</button></th>'
                    for column, is_number in zip(grid.columns, numeric))
    rows = "\n".join("<tr>" + "".join(map(_html_cell, row, numeric)) + "</tr>" for row in grid.rows)
    caption = f"<caption><span>{_inline(grid.caption)}</span></caption>" if grid.caption else ""
    return (f'<div class="scroll"><table>{caption}<thead><tr>{heads}</tr></thead>\n<tbody>{rows}</tbody></table></div>')


def _numeric(grid: Grid) -> list[bool]:
    return [any(row[index].value is not None for row in grid.rows) for index in range(len(grid.columns))]


def _side(is_number: bool) -> str:
    return ' class="n"' if is_number else ""


def _html_cell(cell: Cell, is_number: bool) -> str:
    text = _inline(cell.text)
    value = "" if cell.value is None else f' data-v="{cell.value!r}"'
    under = f"<small>{_inline(cell.under)}</small>" if cell.under else ""
    return f"<td{_side(is_number)}{value}>{f'<b>{text}</b>' if cell.best else text}{under}</td>"


def _inline(text: str) -> str:
    """Escaped; what stands between backquotes as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _anchor(text: str) -> str:
    return re.sub(r"\W+", "-", text.lower()).strip("-")


# ---- Markdown --------------------------------------------------------------------------------------------


def to_markdown(document: Document) -> str:
    parts = [f"# {_mark(document.title)}", *(_markdown(block) for block in document.blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_mark(text)}"
        case Prose(text):
            return _mark(text)
        case Bullets(items):
            return "\n".join(f"- {_mark(item)}" for item in items)
        case Tiles(tiles):
            return "\n".join(f"- **{_mark(tile.figure)}** {_mark(tile.label)} ({_mark(tile.note)})" for tile in tiles)
        case Grid():
            return _markdown_grid(block)
        case Picture(name, _, caption):
            return f"![{_mark(caption)}](figures/{name}.svg)"
        case Verbatim(text):
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
            return f"{fence}\n{text.rstrip()}\n{fence}"
        case Folded(summary, blocks, in_markdown):
            inner = "\n\n".join(map(_markdown, blocks))
            return f"<details><summary>{html.escape(summary)}</summary>\n\n{inner}\n\n</details>" if in_markdown else ""


def _markdown_grid(grid: Grid) -> str:
    lines = [[_mark(column) for column in grid.columns],
             ["---:" if is_number else "---" for is_number in _numeric(grid)],
             *([_markdown_cell(cell) for cell in row] for row in grid.rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"**{_mark(grid.caption)}**\n\n{table}" if grid.caption else table


def _markdown_cell(cell: Cell) -> str:
    text = f"**{_mark(cell.text)}**" if cell.best else _mark(cell.text)
    return f"{text} ({_mark(cell.under)})" if cell.under else text


def _mark(text: str) -> str:
    """What Markdown would take for its own signs is escaped, but for the backquotes of code."""
    pieces = re.split(r"(`[^`]+`)", " ".join(text.split()))
    return "".join(piece.replace("|", r"\|") if piece.startswith("`") else re.sub(r"([\\*_|<\[\]#])", r"\\\1", piece)
                   for piece in pieces)


# ---- the page --------------------------------------------------------------------------------------------

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<nav>{links}</nav>
<main>
<h1>{title}</h1>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""

_STYLE = """
:root { --ink: #1b1f24; --paper: #ffffff; --soft: #59636e; --line: #d8dee4; --tint: #f4f6f8; --accent: #b4470f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e8ee; --paper: #14181d; --soft: #9aa5b1; --line: #313842; --tint: #1d232a; --accent: #f0803c; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", "Liberation Sans", Arial, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1rem 1.5rem 5rem; }
nav { position: sticky; top: 0; z-index: 1; display: flex; gap: .2rem 1.2rem; overflow-x: auto; padding: .6rem 1.5rem;
  background: var(--paper); border-bottom: 1px solid var(--line); font-size: .875rem; white-space: nowrap; }
nav a { color: var(--soft); text-decoration: none; }
nav a:hover, nav a:focus-visible { color: var(--accent); }
h1 { font-size: 2rem; line-height: 1.2; margin: 1.5rem 0 .5rem; }
h2 { font-size: 1.45rem; margin: 3.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line);
  scroll-margin-top: 2.5rem; }
h3 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; scroll-margin-top: 3rem; }
p, ul { max-width: 46rem; margin: .5rem 0; }
.small, figcaption, caption, td small, .tile small { color: var(--soft); font-size: .85rem; }
code, pre { font-family: ui-monospace, "DejaVu Sans Mono", Consolas, monospace; font-size: .86em; }
code { background: var(--tint); padding: .05em .3em; border-radius: 3px; overflow-wrap: anywhere; }
pre { background: var(--tint); padding: .8rem 1rem; border-radius: 6px; overflow-x: auto; white-space: pre-wrap; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .9rem; margin: 1.3rem 0; }
.tile { background: var(--tint); border-left: 3px solid var(--accent); border-radius: 4px; padding: .7rem 1rem; }
.tile b { display: block; font-size: 1.9rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span, .tile small { display: block; }
.scroll { overflow-x: auto; margin: 1.1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .35rem; }
caption span { display: inline-block; max-width: 60rem; }
th, td { padding: .38rem .5rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { padding: 0; border-bottom: 2px solid var(--line); vertical-align: bottom; }
th button { all: unset; box-sizing: border-box; display: block; width: 100%; padding: .38rem .5rem; cursor: pointer;
  font-weight: 600; }
th button:hover { color: var(--accent); }
th button:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.n { text-align: right; }
td { white-space: nowrap; }
td small { display: block; }
tbody tr:hover { background: var(--tint); }
figure { margin: 1.4rem 0; }
figure svg { display: block; max-width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
figcaption { max-width: 46rem; margin-top: .3rem; }
details { margin: .9rem 0; }
summary { cursor: pointer; color: var(--soft); }
summary:hover { color: var(--accent); }
@media print { nav { display: none; } }
"""

_SCRIPT = """
"use strict";
// A cell is sorted by its data-v when it has one, else by its text; cells without a number come last.
const key = cell => cell.dataset.v === undefined ? cell.textContent.trim() : Number(cell.dataset.v);
function compare(a, b) {
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return typeof a === "number" ? a - b : a.localeCompare(b, "en", {numeric: true});
}
function sort(head) {
  const body = head.closest("table").tBodies[0], column = head.cellIndex;
  const first = head.classList.contains("n") ? "descending" : "ascending";
  const other = first === "ascending" ? "descending" : "ascending";
  const order = head.getAttribute("aria-sort") === first ? other : first;
  for (const one of head.parentNode.cells) one.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const rows = [...body.rows].map(row => [key(row.cells[column]), row]);
  rows.sort(([a], [b]) => typeof a === typeof b ? sign * compare(a, b) : compare(a, b));
  body.append(...rows.map(([, row]) => row));
}
document.addEventListener("click", event => {
  const head = event.target.closest("th");
  if (head) sort(head);
});
"""
