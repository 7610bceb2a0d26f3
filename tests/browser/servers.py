"""JupyterLab, and the web page of ``make app``: on localhost, with a token and settings of their own."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.error import HTTPError
from urllib.request import urlopen

REPOSITORY = Path(__file__).parents[2]
START_SECONDS = 300
# What a copy has in place of: everything is run, but shorter, as no test here asks how much is learnt.
OTHERWISE = {
    "02_windows": {"train=2000, test=500": "train=2000, test=100"},
    "03_tradeoff": {
        "steps=120": "steps=5",
        "source.first(test=1000)": "source.first(test=200)",
        "train=4000, test=1000": "train=4000, test=200",
    },
    "04_tradeoff_science": {
        "train=4000, test=1000": "train=4000, test=200",
        "lr=rate, steps=120": "lr=rate, steps=10",
    },
    "05_language": {
        "live_steps = 12": "live_steps = 2",
        "first(test=50)": "first(test=10)",
        "review.first(test=200)": "review.first(test=40)",
        "    retain=genres.first(test=300)": "    retain=genres.first(test=60)",
        "examples=1000": "examples=300",
        "[:4].tolist()": "[:2].tolist()",
        "[ll.Window.first(8), ll.Window.middle(8), ll.Window.last(8)]": "[ll.Window.first(8)]",
    },
    "07_continual": {"live_steps = 20": "live_steps = 5"},
    "08_after_training": {
        r"\"steps\": 60": r"\"steps\": 10",
        r"\"steps\": 20": r"\"steps\": 4",
        "first(test=400)": "first(test=100)",
        "train=320, test=80": "train=32, test=20",
        "genres.test, 60": "genres.test, 20",
    },
}
Found = TypeVar("Found")


@dataclass(frozen=True)
class Server:
    """Where a server answers, and the token that it asks for."""

    url: str
    token: str

    def address(self, path: str, **query: str) -> str:
        """With the token: whoever opens it once is let in from then on."""
        asked = "&".join(f"{name}={value}" for name, value in {**query, "token": self.token}.items())
        return f"{self.url}/{path}?{asked}"


def copy_of_notebooks(folder: Path) -> Path:
    """The notebooks copied and the data linked, so that what a browser saves stays out of the repository."""
    (folder / "notebooks").mkdir(parents=True)
    for notebook in (REPOSITORY / "notebooks").glob("*.ipynb"):
        text = notebook.read_text()
        for long, short in OTHERWISE.get(notebook.stem, {}).items():
            assert text.count(long) == 1
            text = text.replace(long, short)
        (folder / "notebooks" / notebook.name).write_text(text)
    (folder / "data").symlink_to(REPOSITORY / "data")
    return folder


@contextmanager
def jupyterlab(root: Path, own: Path) -> Iterator[Server]:
    """JupyterLab on the files in ``root``; settings, workspaces and log in the new folder ``own``."""
    settings = own / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')  # no network
    server = Server(f"http://127.0.0.1:{_free_port()}", secrets.token_hex(16))
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", f"--ServerApp.root_dir={root}"),
        f"--ServerApp.port={server.url.rpartition(':')[2]}",
        f"--IdentityProvider.token={server.token}",
        "--ServerApp.port_retries=0",
        "--LabApp.expose_app_in_browser=True",  # so that a test can ask for the cells and the kernel's state
        *(["--allow-root"] if os.geteuid() == 0 else []),
    ]
    with _process(command, own) as (process, log):
        _wait_for(process, log, lambda: _answers(server.address("api/status")))
        yield server


@contextmanager
def web_page(own: Path) -> Iterator[Server]:
    """What ``make app`` serves, with the address that it prints."""
    port = _free_port()
    here = Path(sys.prefix)  # nothing is installed for this: the tests' own environment has it all
    command = ["make", "--no-print-directory", f"--assume-old={here}/app.installed", f"VENV={here}"]
    with _process([*command, f"APP_PORT={port}", "app"], own) as (process, log):
        address = _wait_for(process, log, lambda: re.search(r"(http://\S+)/\?token=(\w+)", log.read_text()))
        server = Server(address[1], address[2])
        _wait_for(process, log, lambda: _answers(f"{server.url}/voila/static/voila.js"))
        yield server


@contextmanager
def _process(command: list[str], own: Path) -> Iterator[tuple[subprocess.Popen, Path]]:
    """A server, set as that of ``make lab``, and its log; it ends with all that it has started."""
    folders = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "IPYTHONDIR": "ipython",
    }
    settings = {"TQDM_DISABLE": "1", "JUPYTER_CONFIG_PATH": str(REPOSITORY / "notebooks" / "server")}
    if kept := os.environ.get("LORA_LENS_RESULTS"):  # where make site has the runs of the whole notebooks
        settings["LORA_LENS_RESULTS"] = str(Path(kept) / "shortened")
    environment = {**os.environ, **settings, **{k: str(own / v) for k, v in folders.items()}}
    log = own / "server.log"
    with open(log, "wb") as written:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=written, stderr=written, start_new_session=True
        )
    try:
        yield process, log
    finally:
        for last in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):  # all of it has ended
                os.killpg(process.pid, last)
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)


def _wait_for(process: subprocess.Popen, log: Path, ready: Callable[[], Found]) -> Found:
    give_up = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up:
        if found := ready():
            return found
        if process.poll() is not None:
            raise RuntimeError(f"the server ended at once:\n{log.read_text()}")
        time.sleep(0.2)
    raise RuntimeError(f"the server did not answer within {START_SECONDS} s:\n{log.read_text()}")


def _answers(address: str) -> bool:
    try:
        urlopen(address, timeout=5).close()
    except HTTPError:
        return True  # a refusal is an answer
    except OSError:  # nobody listens yet
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
