"""JupyterLab in a real chromium, driven by playwright.

    with start_lab(folder) as lab, start_browser() as browser:
        page = run_notebook_in_browser(browser, lab, "notebooks/02_masking.ipynb")

The server listens on 127.0.0.1 only, shares nothing with the user's own Jupyter settings, and works
on copies of the notebooks. Each wait is done inside the page, because a click on "Run All" as soon
as the indicator says "idle" comes too early four times out of five.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    # every cell is in the page, and no empty screen follows the last one
    "notebook-extension/tracker": {"windowingMode": "none", "scrollPastEnd": False},
}

# A race, because some of these promises never settle: with a notebook that names no kernel, for
# example, JupyterLab asks the reader and waits.
READY = """() => {
  const deadline = Date.now() + 90000, pause = ms => new Promise(done => setTimeout(done, ms));
  const ready = async () => {
    while (Date.now() < deadline) {
      const app = window.jupyterapp, panel = app?.shell?.currentWidget;
      if (panel?.sessionContext && app.commands.hasCommand('notebook:run-all-cells')) {
        await app.restored; await panel.context.ready; await panel.sessionContext.ready;
        if (panel.sessionContext.session?.kernel?.status === 'idle') return true;
      }
      await pause(100);
    }
  };
  const late = 'JupyterLab or its kernel never became ready; does the notebook name a kernel?';
  return Promise.race([ready(), pause(90000).then(() => { throw new Error(late); })]);
}"""

# Returns at once; `window.allCellsRan` appears when the last cell is done, or the first one failed.
RUN_ALL = """() => {
  window.allCellsRan = undefined;
  const done = () => { window.allCellsRan = true; };
  window.jupyterapp.commands.execute('notebook:run-all-cells').then(done, done);
}"""

# playwright takes any promise as true, so this predicate is not async. It waits for images as well:
# that of a widget arrives after its cell is done.
FINISHED = """() => window.allCellsRan
  && window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'
  && [...document.querySelectorAll('.jp-OutputArea img')].every(image => image.complete)"""

CELLS = "() => window.jupyterapp.shell.currentWidget.content.model.toJSON().cells"


@dataclass
class Lab:
    url: str
    token: str
    folder: Path  # what JupyterLab shows; notebooks are copied here


def find_chromium():
    """The path of an installed chromium or chrome, or None."""
    names = ["chromium", "chromium-browser", "google-chrome"]
    return next((path for name in names if (path := shutil.which(name))), None)


@contextlib.contextmanager
def start_lab(root):
    """A JupyterLab server with all its files under the folder `root`; ended on leaving."""
    root = Path(root)
    lab = Lab("", secrets.token_hex(16), root / "files")
    lab.folder.mkdir(parents=True)
    for name, value in SETTINGS.items():
        file = root / "settings/@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lab.url = f"http://127.0.0.1:{port}"
    environment = dict(
        os.environ,
        JUPYTER_TOKEN=lab.token,  # not on the command line, where other users could read it
        JUPYTERLAB_SETTINGS_DIR=str(root / "settings"),
        JUPYTERLAB_WORKSPACES_DIR=str(root / "workspaces"),
        JUPYTER_CONFIG_DIR=str(root / "config"),
        JUPYTER_DATA_DIR=str(root / "data"),
        JUPYTER_RUNTIME_DIR=str(root / "runtime"),
    )
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"]
    command += [f"--ServerApp.root_dir={lab.folder}", "--expose-app-in-browser"]
    log_file = root / "lab.log"
    with log_file.open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until_up(lab, server, log_file)
            yield lab
        finally:
            server.terminate()  # it ends its kernels first
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def wait_until_up(lab, server, log_file, seconds=60):
    request = urllib.request.Request(
        f"{lab.url}/api/status", headers={"Authorization": f"token {lab.token}"}
    )
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(request, timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log_file.read_text()}")


@contextlib.contextmanager
def start_browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_chromium(),
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
        )
        yield browser
        browser.close()


def open_notebook(
    browser, lab, path, *, mode="lab", width=1280, height=1400, copy=True, on_console=None
):
    """Copy a notebook into the lab and open it; returns the page when its kernel is ready.

    mode "lab" is the whole interface, "doc" the notebook alone. Sizes are in CSS pixels. copy False
    opens what is in the lab's folder under that name. on_console is called with each message of the
    browser's console.
    """
    if copy:
        shutil.copy(path, lab.folder)
    page = browser.new_page(viewport={"width": width, "height": height})
    if on_console:
        page.on("console", on_console)
    page.goto(f"{lab.url}/{mode}/tree/{Path(path).name}?reset&token={lab.token}")
    page.evaluate(READY)
    return page


def run_notebook_in_browser(browser, lab, path, *, timeout=900, **view):
    """Open a notebook and run all its cells; returns the page when they are done.

    timeout is in seconds. `view` goes to open_notebook. Raises AssertionError with the traceback
    when a cell raised, or when a cell was not run.
    """
    page = open_notebook(browser, lab, path, **view)
    page.evaluate(RUN_ALL)
    page.wait_for_function(FINISHED, timeout=timeout * 1000)
    page.wait_for_timeout(300)  # milliseconds: the last layout
    cells = [c for c in page.evaluate(CELLS) if c["cell_type"] == "code" and source(c).strip()]
    for cell in cells:
        for output in cell["outputs"]:
            traceback = "\n".join(output.get("traceback", []))
            assert output["output_type"] != "error", re.sub(r"\x1b\[[\d;]*m", "", traceback)
    not_run = [source(cell) for cell in cells if not cell["execution_count"]]
    assert not not_run, f"cells that were not run: {not_run}"
    return page


def source(cell):
    """A cell's text; a notebook may hold it as one string or as a list of lines."""
    return "".join(cell["source"])
