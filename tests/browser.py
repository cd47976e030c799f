"""A real browser for tests: the one that this machine has. Nothing is downloaded."""

import contextlib
import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@contextlib.contextmanager
def opened(**page_options):
    """A page of a headless browser; skips the test where there is none.

    While it is open an event loop runs in this thread: run notebooks (papermill has its own) before. Requests that
    leave this machine are refused, and listed in `page.left`.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser is installed here (looked for {', '.join(NAMES)})")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            page = browser.new_page(**page_options)
            page.left = []
            page.on("request", lambda request: _left(page, request.url))
            yield page
        finally:
            browser.close()


def _left(page, url):
    if not url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:", "file:", "about:")):
        page.left.append(url)
