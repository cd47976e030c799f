"""How every page looks, and what it may do: show what it contains and run one script, the project's own."""

from __future__ import annotations

import base64
import hashlib

from pygments.formatters import HtmlFormatter

from dmlr.config import root

TEMPLATES = root() / "reports" / "template"


def css() -> str:
    """Page style and code colours, for light and dark."""
    light = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    page = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    clear = ".highlight, .highlight pre { background: var(--tint); }"
    return f"{light}\n@media screen and (prefers-color-scheme: dark) {{ {dark} }}\n{page}\n{clear}"


def gallery_script() -> str:
    """The one script, as it stands between its tags."""
    return (TEMPLATES / "gallery.js").read_text(encoding="utf-8").strip()


def policy() -> str:
    """A Content-Security-Policy: no request, no form, no script and no handler but `gallery_script`, by its SHA-256.

    Images are data of the page. A script that comes from a model's answer or a dataset does not run, escaped or not.
    """
    digest = base64.b64encode(hashlib.sha256(gallery_script().encode("utf-8")).digest()).decode("ascii")
    shown = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"{shown}; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
