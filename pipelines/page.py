"""A report as one self-contained HTML page: text, tables and pictures, readable on a phone and without a server."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment
from PIL import Image

from autoencoder.files import write_text

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: light-dark(#222, #ddd); --line: light-dark(#ddd, #444); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink); }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
.verdict { margin: .4rem 0; padding: .4rem 1rem; border-left: 4px solid; }
.good { border-color: #2e8b57; } .doubtful { border-color: #d9a514; } .bad { border-color: #c0392b; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: left; border-bottom: 1px solid var(--line); }
th { overflow-wrap: anywhere; vertical-align: bottom; } td:first-child { min-width: 9rem; }
th:first-child, td:first-child { padding-left: 0; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; } figcaption { font-size: .9rem; opacity: .8; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for kind, content, about in parts %}
{% if kind == "heading" %}<h2>{{ content }}</h2>
{% elif kind == "text" %}<p>{{ content }}</p>
{% elif kind == "verdict" %}<p class="verdict {{ about }}">{{ content }}</p>
{% elif kind == "list" %}<ul>{% for item in content %}<li>{{ item }}</li>{% endfor %}</ul>
{% elif kind == "table" %}<div class="wide"><table>
<tr>{% for name in about %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in content %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% elif kind == "picture" %}<figure><img src="data:image/png;base64,{{ content }}" alt="{{ about }}">
<figcaption>{{ about }}</figcaption></figure>
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
        self._parts.append(("heading", text, None))

    def text(self, text: str) -> None:
        self._parts.append(("text", text, None))

    def verdict(self, text: str, kind: str) -> None:
        """A sentence in a coloured frame; `kind` is good, doubtful or bad."""
        self._parts.append(("verdict", text, kind))

    def list(self, items: Sequence[str]) -> None:
        self._parts.append(("list", [*items], None))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Cells are shown as str() gives them: format numbers before."""
        self._parts.append(("table", [*rows], [*header]))

    def picture(self, image: Image.Image, caption: str) -> None:
        file = io.BytesIO()
        image.save(file, "PNG", optimize=True)
        self._parts.append(("picture", base64.b64encode(file.getvalue()).decode(), caption))

    def plot(self, figure: Any, caption: str) -> None:
        """A matplotlib Figure; build it with `Figure()`, not pyplot, so that nothing global is left behind."""
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
        file.seek(0)
        self.picture(Image.open(file), caption)

    def extend(self, page: Page) -> None:
        """Add the parts of another page."""
        self._parts += page._parts

    def save(self, file: Path) -> None:
        """Write the page, whole or not at all."""
        template = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE)
        write_text(file, template.render(title=self.title, parts=self._parts))
