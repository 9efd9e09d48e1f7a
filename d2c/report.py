"""One self-contained HTML page: no script, no network, pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from formats.files import write_bytes

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid var(--line)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;white-space:nowrap;padding:.3rem .6rem;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}
caption{text-align:left;color:gray;padding-bottom:.4rem}
.wide{overflow-x:auto;margin:1rem 0}figure{margin:1rem 0}figcaption{color:gray;font-size:.9rem}
img{max-width:100%;image-rendering:pixelated;background:#fff}
svg{width:100%;height:auto}svg text{font-size:11px;fill:currentColor}
pre{background:var(--soft);padding:.8rem;overflow-x:auto;font-size:.85rem}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(18rem,1fr));gap:1rem}
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


def text(words: str) -> str:
    """A paragraph."""
    return f"<p>{escape(words)}</p>"


def code(lines: Sequence[str]) -> str:
    """Command lines."""
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column names the row."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
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


def side_by_side(*figures: str) -> str:
    """Figures beside each other where the window is wide enough."""
    return f'<div class="pair">{"".join(figures)}</div>'


def write(path: Path, html: str) -> None:
    """Write the page, whole or not at all."""
    write_bytes(path, html.encode())
