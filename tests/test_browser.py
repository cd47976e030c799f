"""The walkthrough in JupyterLab, in a real browser, on a copy of the notebook with folders of its own: neither the
checkout nor the user's settings change. What its widgets do, test_walkthrough.py says; reports: test_reports.py."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from browser import opened
from saved_run import free_port

ROOT = Path(__file__).parents[1]
ATTACK = '<script>window.hacked = 1</script><img src="http://example.com/x.png" onerror="window.hacked = 2">'
TOKEN = "for-this-test-only"


@pytest.fixture
def lab(tmp_path):
    """Address of a JupyterLab with a copy of the walkthrough in it."""
    pytest.importorskip("jupyterlab")
    folder = tmp_path / "notebooks"
    folder.mkdir()
    shutil.copy(ROOT / "notebooks" / "01_walkthrough.ipynb", folder)
    quiet = tmp_path / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')  # nobody is here to answer its prompt
    own = {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    own |= {f"JUPYTERLAB_{name.upper()}_DIR": str(tmp_path / name) for name in ("settings", "workspaces")}
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}"]
    command += ["--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}"]
    command += [f"--IdentityProvider.token={TOKEN}", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url="]
    with open(tmp_path / "lab.log", "w") as log:
        server = subprocess.Popen(command, env={**os.environ, **own}, cwd=folder, stdout=log, stderr=log)
    try:
        for _ in range(300):
            assert server.poll() is None, (tmp_path / "lab.log").read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api?token={TOKEN}", timeout=5):
                break
            time.sleep(0.2)
        yield f"{address}/lab/tree/01_walkthrough.ipynb?token={TOKEN}"
    finally:
        server.terminate()  # JupyterLab ends its kernels
        server.wait(timeout=30)


CELLS = """() => window.jupyterapp.shell.currentWidget.content.model.sharedModel.cells
    .filter(cell => cell.cell_type === 'code').map(cell => cell.toJSON())"""
READY = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"


def test_the_walkthrough_in_jupyterlab(lab):
    source = (ROOT / "notebooks" / "01_walkthrough.ipynb").read_bytes()
    with opened(viewport={"width": 1400, "height": 2000}) as page:
        page.set_default_timeout(300_000)
        errors = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(lab)
        page.wait_for_function(READY)
        assert page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
        cells = page.evaluate(CELLS)
        outputs = [output for cell in cells for output in cell["outputs"]]
        assert all(cell["execution_count"] for cell in cells)
        assert [output for output in outputs if output["output_type"] == "error"] == []
        assert not [word for word in ("Warning", "IProgress") if word in json.dumps(outputs)]

        app = page.locator(".jp-OutputArea-output .jupyter-widgets.widget-vbox").first
        picture, handle = app.locator("img"), app.locator(".noUi-handle")
        app.locator('img[alt^="Iteration 0, the start"]').wait_for()
        for width in (1280, 1920):
            page.set_viewport_size({"width": width, "height": 1400})
            app.scroll_into_view_if_needed()
            assert picture.evaluate("image => image.scrollWidth <= image.parentElement.clientWidth"), width
        handle.press("End")
        app.locator('img[alt^="Iteration 15,"]').wait_for()
        assert "from iteration 15" in app.inner_text()
        app.get_by_role("button", name="2", exact=True).click()
        app.locator('img[alt*="Attention of think token 2"]').wait_for()
        patches = app.locator("select[multiple]").first
        patches.select_option(index=list(range(patches.locator("option").count())))
        app.get_by_role("button", name="What if").click()
        app.get_by_role("cell", name="without 8 patches").wait_for()
        other = json.loads((ROOT / "data" / "shapes" / "seek.json").read_text())[5]
        app.locator("select:not([multiple])").first.select_option(index=5)
        app.get_by_role("status").get_by_text(other["prompt"]).wait_for()
        with page.expect_file_chooser() as upload:
            app.get_by_role("button", name="image").first.click()
        upload.value.set_files(ROOT / "data" / "shapes" / other["image_path"])
        app.get_by_placeholder("a question of your own").fill(f"How many stars are there? {ATTACK}")
        app.get_by_role("button", name="Ask").click()
        app.get_by_role("status").get_by_text(ATTACK).wait_for()
        app.locator('img[alt^="Iteration 0, the start"]').wait_for()
        assert (page.evaluate("() => window.hacked"), page.left, errors) == (None, [], [])
    assert (ROOT / "notebooks" / "01_walkthrough.ipynb").read_bytes() == source
