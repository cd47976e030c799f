"""How every page looks, what is put into it, and what it may do: show what it contains and run one script, our own.

Imports no plotting: a command that only renders a report does not wait for it.
"""

from __future__ import annotations

import base64
import hashlib
import re

import jinja2
import pandas as pd
from pygments.formatters import HtmlFormatter

from dmlr.config import root

FOLDER = root() / "reports" / "template"
# Of what is put into a template, markup is escaped and control characters are shown as their symbols (␛ for ESC).
_SYMBOLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {0x7F: "␡"}
template = jinja2.Environment(
    loader=jinja2.FileSystemLoader(FOLDER),
    autoescape=True,
    finalize=lambda value: value.translate(_SYMBOLS) if type(value) is str else value,
).get_template


def table(frame: pd.DataFrame, caption: str = "") -> str:
    """An HTML table, every cell escaped; columns of numbers (also as text, "81.2%") are set flush right.

    Columns without names give a table without a head.
    """
    number = re.compile(r"[-+−]?\d[\d.,]*(e[-+]?\d+)?( ?%| points)?( (–|to) [-+−]?\d[\d.]* ?%?)?|–|nan|")
    rows = [list(map(str, row)) for row in frame.itertuples(index=False)]
    right = [all(map(number.fullmatch, column)) for column in zip(*rows, strict=True)]
    return template("table.html.j2").render(names=list(frame.columns), right=right, rows=rows, caption=caption)


def css() -> str:
    """Page style and code colours, for light and dark."""
    light = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    page = (FOLDER / "page.css").read_text(encoding="utf-8")
    clear = ".highlight, .highlight pre { background: var(--tint); }"
    return f"{light}\n@media screen and (prefers-color-scheme: dark) {{ {dark} }}\n{page}\n{clear}"


def gallery_script() -> str:
    """The one script, as it stands between its tags."""
    return (FOLDER / "gallery.js").read_text(encoding="utf-8").strip()


def policy() -> str:
    """A Content-Security-Policy: no request, no form, no script and no handler but `gallery_script`, by its SHA-256.

    Images are data of the page. A script that comes from a model's answer or a dataset does not run, escaped or not.
    """
    digest = base64.b64encode(hashlib.sha256(gallery_script().encode("utf-8")).digest()).decode("ascii")
    shown = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"{shown}; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
