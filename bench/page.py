"""What does the page cost its gateway, and does it stay smooth?

One `regrow serve` with mosquitto, and a process with real device machines behind one connection (testbed.swarm): they train a small model,
rounds last 10 to 20 s, heartbeats come every 10 s. Measured is the processor time (user and system, /proc/PID/stat) of the `serve` process:
broker, devices and browser are other processes. Stretches without a page, with one page open in Chromium, and with eight listeners that
read the same stream come in turn, so that the load's drift is in all of them. The cost of a page is the difference of the means over the
number of pages. Then, with 1 000 devices, the time between frames in headless Chromium (software rendering), while the page takes what
comes, and while somebody scrolls by 60 pixels a frame; and the processor time of the page's main thread for each of these frames,
which says more where others use the machine too. --pictures makes the pictures of docs/page.md instead, with a fleet of 40.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.machine import write_result
from broker_server.broker import find_mosquitto
from tests.testbed.chromium import Tab, chromium
from tests.testbed.processes import ROOT, Child, until

LISTENERS = 8
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
TASK = """name = "bench"
model = "model.onnx"

[method]
name = "{method}"

[training]
local_steps = 10
learning_rate = 0.1

[restoration]
patience = 2

[fleet]
min_devices = {least}
join_s = 1.0

[stop]
seconds = 7200
"""
SCROLL = """(async (scrolls) => {
  const fleet = document.querySelector('.fleet');
  const frames = []; let before = null; let at = 0;
  await new Promise((done) => { const step = (now) => {
    if (before !== null) frames.push(now - before);
    before = now; at += 1;
    if (scrolls) fleet.scrollTop = 60 * at;
    if (at < 600) requestAnimationFrame(step); else done();
  }; requestAnimationFrame(step); });
  return frames.sort((a, b) => a - b);
})(SCROLLS)"""


class Scene:
    """A gateway whose page is open at `url`, with a fleet."""

    def __init__(self, folder: Path, devices: int, round_s: tuple[float, float], method: str) -> None:
        self.folder, self._children = folder, []
        program = find_mosquitto()
        if program is None:
            raise SystemExit("apt-get install mosquitto")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        (folder / "mosquitto.conf").write_text(
            f"listener {port} 127.0.0.1\nallow_anonymous true\nmax_queued_messages 0\nmax_inflight_messages 0\n"
        )
        self._broker = subprocess.Popen([program, "-c", folder / "mosquitto.conf"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(lambda: _answers(port), "mosquitto")
        made = Child(["task", "new", "bench", "--model", "digits_mlp"], folder / "new.log")
        if made.ended() != 0:
            raise SystemExit(made.text())
        (folder / "bench" / "task.toml").write_text(TASK.format(method=method, least=devices))
        self.serve = self._start(
            ["serve", "bench", "--broker", f"mqtt://c:c@127.0.0.1:{port}", "--plain", "--page", "127.0.0.1:0"], "serve.log"
        )
        self.url = self.serve.said(r"^page on (http://127\.0\.0\.1:\d+)")[1]
        told = ["--url", f"mqtt://127.0.0.1:{port}", "--devices", devices, "--round", *round_s]
        self._start(told, "swarm.log", module="testbed.swarm")

    def _start(self, arguments: list[Any], output: str, module: str = "cli.main") -> Child:
        child = Child(arguments, self.folder / output, module=module)
        self._children.append(child)
        return child

    def version(self, least: int, patience_s: float = 300.0) -> None:
        """Wait until the run is so far."""
        until(lambda: f"aggregated version={least} " in self.serve.text(), lambda: self.serve.text()[-1500:], patience_s)

    def cpu_s(self) -> float:
        """Processor time of the gateway so far."""
        fields = Path(f"/proc/{self.serve.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_A_SECOND

    def close(self) -> None:
        for child in reversed(self._children):
            child.kill()
        self._broker.terminate()
        self._broker.wait()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@contextmanager
def scene(devices: int, round_s: tuple[float, float], method: str = "fedgmr") -> Iterator[Scene]:
    with tempfile.TemporaryDirectory() as folder:
        found = Scene(Path(folder), devices, round_s, method)
        try:
            yield found
        finally:
            found.close()


@contextmanager
def listening(url: str, count: int) -> Iterator[None]:
    """So many readers of the stream."""
    host, port = url.removeprefix("http://").split(":")
    readers = [
        subprocess.Popen(["curl", "-sN", f"{url}/api/events"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(count)
    ]
    until(lambda: _answers(int(port)), f"{host}:{port}")
    try:
        yield
    finally:
        for reader in readers:
            reader.terminate()
        for reader in readers:
            reader.wait()


def share(found: Scene, seconds: float) -> float:
    """Of one core, in percent."""
    before, began = found.cpu_s(), time.monotonic()
    time.sleep(seconds)
    return 100 * (found.cpu_s() - before) / (time.monotonic() - began)


def cost(found: Scene, tab: Tab, rounds: int, seconds: float) -> dict[str, Any]:
    """Processor time with none, one and eight pages."""
    shares: dict[str, list[float]] = {"none": [], "one page": [], f"{LISTENERS} listeners": []}
    for _ in range(rounds):
        tab.open("about:blank")
        time.sleep(2)
        shares["none"].append(share(found, seconds))
        tab.open(found.url)
        tab.until("document.querySelectorAll('.fleet .space .row').length > 10")
        time.sleep(2)
        shares["one page"].append(share(found, seconds))
        tab.open("about:blank")
        with listening(found.url, LISTENERS):
            time.sleep(2)
            shares[f"{LISTENERS} listeners"].append(share(found, seconds))
        print({name: [round(value, 2) for value in values] for name, values in shares.items()}, flush=True)
    means = {name: statistics.mean(values) for name, values in shares.items()}
    return {
        "percent_of_a_core": {name: [round(value, 2) for value in values] for name, values in shares.items()},
        "mean_percent": {name: round(value, 2) for name, value in means.items()},
        "percent_for_a_page_in_chromium": round(means["one page"] - means["none"], 2),
        "percent_for_each_of_the_listeners": round((means[f"{LISTENERS} listeners"] - means["none"]) / LISTENERS, 3),
    }


def frames(found: Scene, tab: Tab) -> dict[str, Any]:
    """Milliseconds between frames, quantiles of 600."""
    tab.size(1200, 900)
    tab.open(found.url)
    tab.until("document.querySelectorAll('.fleet .space .row').length > 10")
    result: dict[str, Any] = {}
    for name, scrolls in (("watching", "false"), ("scrolling", "true")):
        before = tab.busy_s()
        taken: list[float] = tab.eval(SCROLL.replace("SCROLLS", scrolls))
        busy_ms = 1000 * (tab.busy_s() - before) / len(taken)
        quantiles = {f"{part} %": round(taken[int(part / 100 * (len(taken) - 1))], 1) for part in (50, 95, 99, 100)}
        result[name] = {**quantiles, "main_thread_cpu": round(busy_ms, 2)}
    result["rows_in_the_document"] = tab.eval("document.querySelectorAll('.fleet .space .row').length")
    return result


def pictures(found: Scene, tab: Tab, folder: Path) -> None:
    """docs/page-*.png."""
    tab.size(1100, 1340)
    tab.open(found.url)
    tab.until("document.querySelectorAll('canvas').length === 2")
    time.sleep(2)
    tab.picture(folder / "page-fleet.png")
    tab.prefer(prefers_color_scheme="dark")
    tab.eval("location.hash = '#/device/pi-0003'")
    tab.until("document.querySelectorAll('canvas').length >= 3")
    tab.size(1100, 900)
    time.sleep(1)
    tab.picture(folder / "page-device.png")
    tab.size(360, 740, phone=True)
    tab.eval("location.hash = '#/'")
    tab.until("document.querySelectorAll('canvas').length === 2")
    time.sleep(2)
    tab.picture(folder / "page-phone.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of none, one and eight pages")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each stretch")
    parser.add_argument("--large", type=int, default=1000, help="devices for the frame times")
    parser.add_argument("--pictures", action="store_true", help="make the pictures of docs/page.md, and nothing else")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "page.json", help="where the JSON goes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, chromium(Path(folder)) as tab:
        if options.pictures:
            with scene(40, (2.0, 6.0)) as small:
                small.version(45)
                pictures(small, tab, ROOT / "docs")
            return
        with scene(100, (10.0, 20.0)) as middle:
            middle.version(5)
            costs = cost(middle, tab, options.rounds, options.seconds)
        with scene(options.large, (60.0, 120.0)) as large:
            until(lambda: large.serve.text().count("joined device=") >= options.large, lambda: large.serve.text()[-1000:], 400.0)
            times = frames(large, tab)
    command = f"python -m bench.page --rounds {options.rounds} --seconds {options.seconds:g} --large {options.large}"
    setting = {"devices": 100, "round_s": [10, 20], "heartbeat_s": 10, "devices_for_frames": options.large}
    result = {"command": command, "setting": setting, "gateway": costs, "milliseconds_between_frames": times}
    write_result(options.out, result)
    print(result)


if __name__ == "__main__":
    main()
