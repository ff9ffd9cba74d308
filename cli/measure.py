"""`regrow measure uplink`: the link to the gateway, measured alone, told line by line or as JSON."""

from __future__ import annotations

import argparse
import json
import random
import ssl
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict

from edge_agent.bundle import read_bundle
from edge_agent.identity import Identity, fleet_context
from edge_agent.measure import Down, Interval, Measurement, Summary, Up, connect
from edge_agent.sealing import FOLDER as HEARD
from edge_agent.state import StateFolder
from edge_agent.transport import MqttLink
from regrow.errors import UsageError


def uplink(options: argparse.Namespace) -> int:
    """Measure up, and down where that is asked for; Ctrl-C ends a direction early and tells what there is."""
    with _alone(options):
        link, device = _link(options)
        try:
            connect(link)
            up = Up(link, device)
            interrupted = _measure(up, options)
            if options.down and not interrupted:
                down = Down(link, device, up.meter.estimate_bps or 0.0)
                try:
                    down.leave()
                    interrupted = _measure(down, options)
                finally:
                    down.clear()
        finally:
            link.close()
    if interrupted:
        raise KeyboardInterrupt
    return 0


def _alone(options: argparse.Namespace) -> AbstractContextManager[object]:
    """An identity is held while it is used, so that an agent that runs is not pushed out; of a bundle only the broker knows."""
    if options.identity is None:
        return nullcontext()
    if not options.identity.is_dir():
        raise UsageError(f"--identity {options.identity}: there is no such folder; name that of the agent")
    return StateFolder(options.identity / HEARD)


def _link(options: argparse.Namespace) -> tuple[MqttLink, str]:
    tls: ssl.SSLContext | None
    if options.identity is not None:
        member = Identity.look(options.identity)
        device, broker, password, tls = member.device, member.broker, None, member.tls_context()
    else:
        bundle = read_bundle(options.bundle)
        device, broker, password = bundle.device, bundle.broker, bundle.password
        tls = None if bundle.authority is None else fleet_context(bundle.authority)
    limits = {"max_uplink_bps": options.max_uplink_bps, "max_downlink_bps": options.max_downlink_bps}
    return MqttLink(broker, device_id=device, password=password, rng=random.Random(), tls=tls, **limits), device


def _measure(measurement: Measurement, options: argparse.Namespace) -> bool:
    """Whether Ctrl-C ended it."""
    interrupted = False
    if not options.json:
        print(f"{measurement.direction}: {'seconds':>13}  {'goodput':>12}  {'rtt':>8}  {'retrans':>7}  {'estimate':>12}", flush=True)
    try:
        for interval in measurement.run(options.seconds, options.every):
            print(json.dumps(asdict(interval)) if options.json else _line(interval), flush=True)
    except KeyboardInterrupt:
        interrupted = True
    summary = measurement.summary()
    print(json.dumps(asdict(summary)) if options.json else _end(summary), flush=True)
    return interrupted


def _line(interval: Interval) -> str:
    seconds = f"{interval.start_s:.1f}-{interval.end_s:.1f}"
    rtt = "unknown" if interval.rtt_s is None else f"{1000 * interval.rtt_s:.1f} ms"
    lost = "unknown" if interval.retransmitted is None else str(interval.retransmitted)
    return f"    {seconds:>13}  {rate(interval.goodput_bps):>12}  {rtt:>8}  {lost:>7}  {rate(interval.estimate_bps):>12}"


def _end(summary: Summary) -> str:
    if summary.mean_bps is None:
        return f"{summary.direction}: too little came through in {summary.seconds:.1f} s to tell a rate; try a longer --seconds"
    interval = "95 % interval unknown: fewer than two samples"
    if summary.low_bps is not None and summary.high_bps is not None:
        interval = f"95 % interval {rate(summary.low_bps)} to {rate(summary.high_bps)}, {summary.samples} samples"
    lines = [
        f"{summary.direction}: mean {rate(summary.mean_bps)} ({interval})",
        f"    {summary.payload_bytes} B in {summary.seconds:.1f} s: {rate(summary.overall_bps)}",
    ]
    if summary.congestion:
        rtt = "" if summary.rtt_s is None else f", rtt {1000 * summary.rtt_s:.1f} ms"
        lost = "" if summary.retransmitted is None else f", {summary.retransmitted} segments sent again"
        lines.append(f"    TCP {summary.congestion}{rtt}{lost}")
    if summary.interface_sent_bytes is not None:
        lines.append(
            f"    {summary.interface}: {summary.interface_sent_bytes} B sent, {summary.interface_received_bytes} B received on the wire"
        )
    if summary.disconnects:
        lines.append("    the connection broke once; what was under way then does not count")
    return "\n".join(lines)


def rate(bps: float | None) -> str:
    """A bit rate in words."""
    if bps is None:
        return "unknown"
    for unit, size in (("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3)):
        if bps >= size:
            return f"{bps / size:.4g} {unit}"
    return f"{bps:.3g} bit/s"
