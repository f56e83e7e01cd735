"""One self-contained HTML page: headings, text, tables and figures, with nothing to fetch.

    page = Page("Where bits go", "model M over text T")
    page.section("Heads")
    page.table(["layer", "head", "error"], [["0", "1", "0.031"]])
    page.figure(heat_map(...), "Error by layer and head")
    path.write_text(page.html(), encoding="utf-8")

All text is escaped. Figures of matplotlib are embedded as SVG in data URIs, which keeps their identifiers separate.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1e21; background: #fff; max-width: 72rem;
  margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
.subtitle, figcaption, .note { color: #5b6168; }
figcaption { width: min-content; min-width: 100%; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; border-bottom: 2px solid #ccc; vertical-align: bottom; }
tr.strong td { font-weight: 600; background: #f2f7ff; }
/* Small figures are placed side by side. */
figure { margin: .8rem .8rem .8rem 0; display: inline-block; vertical-align: top; max-width: 100%; }
figure img { max-width: 100%; height: auto; }
figcaption, .note, .below { font-size: .87rem; }
figcaption, .note { max-width: 60rem; }
.below { color: #5b6168; font-weight: 400; }
"""


class Page:
    """A page, written from top to bottom.

    Args:
        title, subtitle: the subject of the page; the model, text and machine.
    """

    def __init__(self, title: str, subtitle: str = ""):
        self._title, self._parts = title, [f"<h1>{escape(title)}</h1>"]
        if subtitle:
            self._parts.append(f'<p class="subtitle">{escape(subtitle)}</p>')

    def section(self, title: str) -> None:
        """Start a section."""
        self._parts.append(f"<h2>{escape(title)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{escape(text)}</p>")

    def note(self, text: str) -> None:
        """A paragraph in small print, for methods and omissions."""
        self._parts.append(f'<p class="note">{escape(text)}</p>')

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, strong: Sequence[int] = ()) -> None:
        """Cells of text, in which lines after the first are small; the first column is the name of the row.

        `strong`: indices of highlighted rows.
        """
        head = "".join(f"<th>{_cell(name)}</th>" for name in columns)
        lines = []
        for index, row in enumerate(rows):
            mark = ' class="strong"' if index in strong else ""
            lines.append(f"<tr{mark}>{''.join(f'<td>{_cell(text)}</td>' for text in row)}</tr>")
        body = "\n".join(lines)
        self._parts.append(
            f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
        )

    def figure(self, figure: Figure, caption: str) -> None:
        """A matplotlib figure; the caption is also its alternative text."""
        image = f'<img alt="{escape(caption)}" src="{_data_uri(figure)}">'
        self._parts.append(f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>")

    def html(self) -> str:
        """The whole page."""
        body = "\n".join(self._parts)
        return (
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self._title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
        )


def _cell(text: str) -> str:
    first, *below = escape(text).split("\n")
    return "".join([first, *(f'<div class="below">{line}</div>' for line in below)])


def _data_uri(figure: Figure) -> str:
    from matplotlib import rc_context

    drawing = io.BytesIO()
    # Reproducible output: identifiers from a fixed salt, and no date.
    with rc_context({"svg.hashsalt": "turboattention"}):
        figure.savefig(drawing, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(drawing.getvalue()).decode()
