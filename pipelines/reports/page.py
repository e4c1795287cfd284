"""A report as one self-contained HTML page: text, tables and pictures, readable on a phone and without a server."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment
from PIL import Image

from autoencoder.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: light-dark(#1f2328, #e3e6e9); --soft: light-dark(#5f6873, #9aa4ae);
  --line: light-dark(#e1e5ea, #363c43); --paper: light-dark(#fff, #15181b); --card: light-dark(#f6f8fa, #1e2226); }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 2rem 1rem 5rem;
  color: var(--ink); background: var(--paper); overflow-wrap: anywhere; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 3rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
nav { display: flex; flex-wrap: wrap; gap: .4rem; margin: 1.2rem 0; }
nav a { padding: .15rem .8rem; border: 1px solid var(--line); border-radius: 1rem; font-size: .9rem;
  color: inherit; text-decoration: none; } nav a:hover { background: var(--card); }
.verdict { margin: .4rem 0; padding: .4rem 1rem; border-left: 4px solid; }
.good { border-color: #2e8b57; } .doubtful { border-color: #d9a514; } .bad { border-color: #c0392b; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.facts div { padding: .6rem .8rem; border-radius: .6rem; background: var(--card); }
.facts dt { font-size: .8rem; color: var(--soft); }
.facts dd { margin: 0; font-size: 1.15rem; line-height: 1.3; font-weight: 600; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: break-word; margin: .6rem 0; }
th, td { padding: .3rem .8rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { vertical-align: bottom; white-space: nowrap; font-size: .85rem; color: var(--soft); }
td:first-child { min-width: 8rem; }
th:first-child, td:first-child { padding-left: 0; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; display: block; border-radius: .3rem; }
figcaption { font-size: .85rem; color: var(--soft); margin-top: .3rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr)); gap: 1rem; }
.plots figure { margin: 0; } .plots img, .plot img { background: #fff; padding: .4rem; border: 1px solid var(--line); }
.plots img { width: 100%; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.2rem, 1fr)); gap: .6rem; }
.tiles figure { margin: 0; max-width: 10rem; } .tiles img { width: 100%; }
details { margin: .8rem 0; border: 1px solid var(--line); border-radius: .6rem; padding: .5rem .8rem; }
summary { cursor: pointer; } pre { overflow-x: auto; font-size: .8rem; line-height: 1.45; }
@media (max-width: 40rem) { th, td { padding: .3rem .4rem; font-size: .8rem; white-space: normal; }
  td:first-child { min-width: 5rem; } .picture figure { overflow-x: auto; } .picture img { max-width: 44rem; } }
@media print { nav { display: none; } }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for kind, content, about in parts %}
{% if kind == "heading" %}<h2 id="part-{{ loop.index }}">{{ content }}</h2>
{% elif kind == "subheading" %}<h3>{{ content }}</h3>
{% elif kind == "contents" %}<nav>
{% for other, name, _ in parts %}{% if other == "heading" %}<a href="#part-{{ loop.index }}">{{ name }}</a>
{% endif %}{% endfor %}</nav>
{% elif kind == "text" %}<p>{{ content }}</p>
{% elif kind == "verdict" %}<p class="verdict {{ about }}">{{ content }}</p>
{% elif kind == "list" %}<ul>{% for item in content %}<li>{{ item }}</li>{% endfor %}</ul>
{% elif kind == "facts" %}<dl class="facts">
{% for name, value in content %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}</dl>
{% elif kind == "table" %}<div class="wide"><table>
{% if about %}<tr>{% for name in about %}<th>{{ name }}</th>{% endfor %}</tr>{% endif %}

{% for row in content %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% elif kind == "details" %}<details><summary>{{ about }}</summary><pre>{{ content }}</pre></details>
{% elif kind in ("plots", "tiles", "plot", "picture") %}<div class="{{ kind }}">
{% for source, caption in content %}<figure><img src="{{ source }}" alt="{{ caption }}">
{% if caption %}<figcaption>{{ caption }}</figcaption>{% endif %}</figure>
{% endfor %}</div>
{% endif %}
{% endfor %}
</body>
</html>
"""


class Page:
    """Parts are shown in the order in which they are added; all text is escaped."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[tuple[str, Any, Any]] = []

    def heading(self, text: str) -> None:
        self._add("heading", text)

    def subheading(self, text: str) -> None:
        self._add("subheading", text)

    def contents(self) -> None:
        """Links to all headings."""
        self._add("contents", None)

    def text(self, text: str) -> None:
        self._add("text", text)

    def verdict(self, text: str, kind: str) -> None:
        """A sentence in a coloured frame; `kind` is good, doubtful or bad."""
        self._add("verdict", text, kind)

    def list(self, items: Sequence[str]) -> None:
        self._add("list", [*items])

    def facts(self, facts: Mapping[str, str]) -> None:
        """Small cards, each a name and a short value."""
        self._add("facts", [*facts.items()])

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Cells are shown as str() gives them: format numbers before. The header may be empty."""
        self._add("table", [*rows], [*header])

    def details(self, summary: str, text: str) -> None:
        """Text as it is, with its line breaks, unfolded by a click on the summary."""
        self._add("details", text, summary)

    def picture(self, image: Image.Image, caption: str) -> None:
        self._add("picture", [(png(image), caption)])

    def tiles(self, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
        """Small pictures side by side, as many as the window has room for; slightly compressed."""
        self._add("tiles", [*zip(map(webp, images), captions, strict=True)])

    def plot(self, figure: Figure, caption: str) -> None:
        """A matplotlib Figure; build it with `Figure()`, not pyplot, so that nothing global is left behind."""
        self._add("plot", [(svg(figure), caption)])

    def plots(self, figures: Sequence[Figure]) -> None:
        """Small figures, two abreast where there is room; at 4.6 inches wide their letters are those of a phone."""
        self._add("plots", [(svg(figure), "") for figure in figures])

    def extend(self, page: Page) -> None:
        """Add the parts of another page."""
        self._parts += page._parts

    def save(self, file: Path) -> None:
        """Write the page, whole or not at all."""
        template = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE)
        write_text(file, template.render(title=self.title, parts=self._parts))

    def _add(self, kind: str, content: Any, about: Any = None) -> None:
        self._parts.append((kind, content, about))


def png(image: Image.Image) -> str:
    """The picture as an address that holds it whole."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return inside("png", file.getvalue())


def webp(image: Image.Image) -> str:
    """Likewise, at about a tenth of the size."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=90)
    return inside("webp", file.getvalue())


def svg(figure: Figure) -> str:
    """Likewise, its letters drawn as lines, so that it needs no font."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return inside("svg+xml", file.getvalue())


def inside(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
