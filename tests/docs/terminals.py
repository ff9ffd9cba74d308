"""Runs a page's blocks as a reader would: one terminal for most of them, one more for each that says `background`."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

from tests.docs.blocks import Block
from tests.docs.generate import ROOT

PORT = "18830"  # as the page says; the test takes a free one
WAIT_S = 60.0


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Terminal:
    """A command that goes on while the reader does other things."""

    def __init__(self, command: str, folder: Path, environment: dict[str, str], ready: str | None) -> None:
        self.lines: list[str] = []
        self._ready, self._is_ready = ready, threading.Event()
        self.process = subprocess.Popen(
            ["sh", "-ec", f"exec {command}"],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()
        if ready is not None:
            assert self._is_ready.wait(WAIT_S), f"{command} never printed {ready!r}:\n{self.output}"

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def end(self, *, interrupt: bool) -> int:
        """The exit status, of its own accord or after Ctrl-C."""
        if interrupt and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        status = self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        return status

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self.lines.append(line)
            if self._ready is not None and self._ready in line:
                self._is_ready.set()
        self._is_ready.set()


class Reader:
    """Somebody who follows a page in an empty folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "work"
        self.folder.mkdir()
        self.terminals: dict[str, Terminal] = {}
        self.output = ""
        self._port = str(free_port())
        commands = folder / "bin"
        commands.mkdir()
        (commands / "regrow").write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m cli.main "$@"\n')
        (commands / "regrow").chmod(0o755)
        self._environment = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}

    def follow(self, block: Block) -> None:
        """Do what one block says; raises AssertionError, with the output, where that fails."""
        text = block.text.replace(PORT, self._port)
        if block.how == "not executed":
            return
        if block.how == "file":
            (self.folder / block.what).write_text(text)
        elif block.how == "background":
            name, _, ready = block.what.partition("; ")
            wanted = re.fullmatch(r'ready when it prints "(.*)"', ready)
            self.terminals[name] = Terminal(text, self.folder, self._environment, wanted[1] if wanted else None)
        else:
            if block.how == "after":
                terminal = self.terminals[block.what]
                assert terminal.end(interrupt=False) == 0, terminal.output
            self._run(block, text)

    def leave(self) -> dict[str, int]:
        """Ctrl-C in every terminal that is still open; returns the exit statuses."""
        return {name: terminal.end(interrupt=True) for name, terminal in self.terminals.items()}

    def kill(self) -> None:
        for terminal in self.terminals.values():
            terminal.kill()

    def _run(self, block: Block, text: str) -> None:
        command = [sys.executable, "-c", text] if block.language == "python" else ["sh", "-ec", text]
        done = subprocess.run(command, cwd=self.folder, env=self._environment, capture_output=True, text=True, timeout=WAIT_S, check=False)
        self.output += done.stdout
        others = "\n".join(f"---- {name}:\n{terminal.output}" for name, terminal in self.terminals.items())
        assert done.returncode == 0, f"block in line {block.line}:\n{done.stdout}{done.stderr}\n{others}"
