"""Folders that a process does not see; each worker of Ray imports this, so it imports nothing else."""

from __future__ import annotations

import sys

UNSEEN = "not-on-this-machine"  # in the name of a folder that processes with hide_unseen() do not see


def hide_unseen() -> None:
    """From now on this process is on a machine without the folders that are called so."""

    def hook(event: str, arguments: tuple) -> None:
        if event in ("open", "os.mkdir", "os.rename") and UNSEEN in str(arguments[0]):
            raise FileNotFoundError(arguments[0])

    sys.addaudithook(hook)
