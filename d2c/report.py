"""One self-contained HTML page: no script, no network, pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from formats.files import write_bytes

_SHOWN = 72
"""Side of a small picture on the screen, in px, if it is not larger itself."""
_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881;--quiet:#5a5a5a;--all:#1b6ca8;--some:#b8452f}
@media (prefers-color-scheme:dark){:root{--quiet:#a9a9a9;--all:#6cb4ea;--some:#f08a72}}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid var(--line)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;white-space:nowrap;padding:.3rem .6rem;border-bottom:1px solid var(--line)}
th:first-child,td:first-child,.words td{text-align:left}tbody th{font-weight:normal}.words td{white-space:normal}
caption{text-align:left;color:var(--quiet);padding-bottom:.4rem}
.wide{overflow-x:auto;margin:1rem 0}figure{margin:1rem 0}figcaption{color:var(--quiet);font-size:.9rem}
img{max-width:100%;image-rendering:pixelated;background:#fff}
svg{width:100%;max-width:46rem;height:auto}svg text{font-size:11px;fill:currentColor}
pre{background:var(--soft);padding:.8rem;overflow-x:auto;font-size:.85rem}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(18rem,1fr));gap:1rem}
.sheet{display:flex;flex-wrap:wrap;gap:3px;padding:0;margin:.3rem 0;list-style:none}.sheet img{display:block}
.sheet .two{display:flex;gap:1px;margin-right:7px}.sheet .two img+img{outline:2px solid var(--some);outline-offset:-2px}
details{border:1px solid var(--line);border-radius:6px;padding:.4rem .8rem;margin:.5rem 0}
summary{cursor:pointer}h3{font-size:1rem;margin:1rem 0 .2rem}
.note{border-left:4px solid var(--some);padding:.1rem .8rem;margin:1rem 0}
"""


def page(title: str, sections: Sequence[str]) -> str:
    """The whole document."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><main><h1>{escape(title)}</h1>{''.join(sections)}</main></body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A headed part of the page."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


@dataclass(frozen=True)
class Thumbnail:
    """A small picture: the bytes of a WebP file of ``side`` x ``side`` px, and its text alternative."""

    data: bytes
    side: int
    alt: str


def text(words: str) -> str:
    """A paragraph."""
    return f"<p>{escape(words)}</p>"


def note(words: str) -> str:
    """A paragraph that must not be overlooked."""
    return f'<p class="note">{escape(words)}</p>'


def details(summary: str, *parts: str) -> str:
    """What is shown when somebody asks for it."""
    return f"<details><summary>{escape(summary)}</summary>{''.join(parts)}</details>"


def heading(title: str) -> str:
    """The title of a part of a section."""
    return f"<h3>{escape(title)}</h3>"


def code(lines: Sequence[str]) -> str:
    """Command lines."""
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool = False) -> str:
    """A table; the first column names the row. ``words``: cells are text, not numbers; ``header`` may be empty."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    kind = ' class="words"' if words else ""
    return (
        # Whoever uses no mouse must be able to scroll what is too wide.
        f'<div class="wide" role="region" aria-label="{escape(caption)}" tabindex="0">'
        f"<table{kind}><caption>{escape(caption)}</caption>"
        + (f"<thead><tr>{head}</tr></thead>" if header else "")
        + f"<tbody>{body}</tbody></table></div>"
    )


def chart(svg: str, caption: str) -> str:
    """A chart with its caption."""
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def picture(png: Path, caption: str) -> str:
    """A PNG, inlined; the caption is also its text alternative."""
    data = base64.b64encode(png.read_bytes()).decode("ascii")
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def sheet(caption: str, thumbnails: Sequence[Thumbnail]) -> str:
    """Small pictures in rows."""
    return _sheet(caption, [_small(thumbnail) for thumbnail in thumbnails])


def pairs(caption: str, thumbnails: Sequence[tuple[Thumbnail, Thumbnail]]) -> str:
    """Small pictures two by two; the second of each pair has a frame."""
    return _sheet(caption, [f'<span class="two">{_small(one)}{_small(other)}</span>' for one, other in thumbnails])


def _sheet(caption: str, items: Sequence[str]) -> str:
    inside = "".join(f"<li>{item}</li>" for item in items)
    return f'<figure><figcaption>{escape(caption)}</figcaption><ul class="sheet">{inside}</ul></figure>'


def _small(thumbnail: Thumbnail) -> str:
    # Pictures of few pixels are enlarged by a whole number, so that all of their pixels are of one size.
    side = max(1, _SHOWN // thumbnail.side) * thumbnail.side
    data, alt = base64.b64encode(thumbnail.data).decode("ascii"), escape(thumbnail.alt)
    return (
        f'<img src="data:image/webp;base64,{data}" width="{side}" height="{side}" alt="{alt}" title="{alt}" '
        'loading="lazy">'
    )


def side_by_side(*figures: str) -> str:
    """Figures beside each other where the window is wide enough."""
    return f'<div class="pair">{"".join(figures)}</div>'


def write(path: Path, html: str) -> None:
    """Write the page, whole or not at all."""
    write_bytes(path, html.encode())
