"""A fleet of real processes whose devices have identities: they join by themselves with a claim, and talk TLS to our own broker."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import onnx

from broker_server.broker import Kind
from broker_server.fleet import members
from broker_server.fleet.registry import Device, Registry, read_seen
from tests.testbed.processes import Child, Fleet, write_digits

HOST = "127.0.0.1"


class CertifiedFleet(Fleet):
    """As Fleet, with `regrow fleet` in place of passwords."""

    def __init__(self, folder: Path, model: onnx.ModelProto, task: str, *, kind: Kind) -> None:
        super().__init__(folder, model, task, kind=kind)
        self.keys = self.runs / ".gateway" / "fleet"
        members.init(self.keys, "lab", [HOST, "localhost"], tls_port=free_port(), enrol_port=free_port())
        self.registry = Registry(self.keys)

    def serve(self, *more: object, **options: Any) -> Child:
        command = ["serve", self.task, "--plain", "--runs", self.runs, "--port", 0, "--broker-kind", self.kind, "--host", HOST]
        child = self.start([*command, *more], "serve.log", **options)
        child.said(rf"^{self.kind} with TLS on {HOST}:\d+ for fleet lab")
        child.said(r"^run ")
        return child

    def fleet(self, *words: object) -> str:
        """Run `regrow fleet ...`; returns what it said."""
        child = self.start(["fleet", *words, "--runs", self.runs], "fleet.log")
        assert child.ended() == 0, child.text()
        return child.text()

    def member(self, name: str, *more: object) -> Child:
        """Start a device that has its claim, or its identity by now."""
        if not (self.folder / f"{name}.npz").exists():
            write_digits(self.folder / f"{name}.npz", seed=len(self._links))
            self._links[name] = 0
            self.fleet("add", name, "--out", self.folder)
        command = ["--log", "agent", "--identity", f"{name}.id", "--claim", f"{name}.claim.json", "--data", f"{name}.npz"]
        child = self.start([*command, "--state", f"{name}.state", *more], f"{name}.log")
        self.devices[name] = child
        return child

    def of(self, name: str) -> Device:
        return self.registry.device(name)

    def doing(self, name: str) -> str:
        """What the device last said that it does."""
        return str(read_seen(self.keys).get(name, {}).get("doing"))


def free_port() -> int:
    with socket.create_server((HOST, 0)) as sock:
        return int(sock.getsockname()[1])
