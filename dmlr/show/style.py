"""How every page looks: one style sheet, and code in the same light or dark."""

from __future__ import annotations

from pygments.formatters import HtmlFormatter

from dmlr.show.policy import TEMPLATES


def css() -> str:
    """Page style and code colours, for light and dark."""
    light = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    page = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    clear = ".highlight, .highlight pre { background: var(--tint); }"
    return f"{light}\n@media screen and (prefers-color-scheme: dark) {{ {dark} }}\n{page}\n{clear}"
