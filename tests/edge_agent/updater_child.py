"""`regrow update apply` that ends like a power cut at one place: python updater_child.py SETTINGS PLACE [AGENT...].

PLACE: one of edge_agent.updater's, DURING, or "" for none. AGENT: a command run while the trial waits, for devices that nobody else starts.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from edge_agent.slots import Slots
from edge_agent.update_files import read_settings
from edge_agent.updater import Updater

DURING = "build:during"  # while pip unpacks; it then goes on for a moment without its parent, which a power cut would not allow


def main(settings_file: str, place: str, *agent: str) -> None:
    settings = read_settings(Path(settings_file))

    def at(name: str) -> None:
        if name == place:
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "build:empty" and place == DURING:
            packages = next((settings.prefix / Slots(settings.prefix).other()).glob("lib/python*/site-packages"))
            threading.Thread(target=cut_when_changed, args=(packages,), daemon=True).start()
        if name == "trial:waiting" and agent:
            subprocess.run(agent, check=True)

    Updater(settings, at=at).apply()


def cut_when_changed(folder: Path) -> None:
    """End this process when something is put into the folder."""
    before = set(os.listdir(folder))  # noqa: PTH208
    while set(os.listdir(folder)) == before:  # noqa: PTH208
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
