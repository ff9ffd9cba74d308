"""The options of `regrow simulate` and `regrow compare`, which describe the same fleets."""

from __future__ import annotations

import argparse
from pathlib import Path

from cli.arguments import Commands, add_command, count, not_negative, part, positive, seed


def add_parser(commands: Commands) -> None:
    one = add_command(
        commands,
        "simulate",
        "cli.simulate:simulate",
        "train a task in virtual time, here, with the gateway's and the devices' own state machines",
        "Only the clock and the links are simulated. The same command gives the same result, to the bit.",
    )
    _scenario(one)
    one.add_argument("--method", action="append", metavar="M", help="method by name, once for each run (default: what task.toml says)")
    one.add_argument("--out", type=Path, default=Path("simulated"), metavar="DIR", help="where outcomes are written")
    one.add_argument("--resume", action="store_true", help="keep what is finished, and go on with what was interrupted")
    many = add_command(
        commands,
        "compare",
        "cli.compare:compare",
        "simulate several methods over several seeds and write a report",
        "All on the same splits and link draws. What is finished stays after Ctrl-C; the same command goes on.",
    )
    _scenario(many)
    names = "names such as fedgmr, fedasync, fiarse+restore or fedgmr-no-restore"
    many.add_argument("--methods", nargs="+", required=True, metavar="M", help=f"{names}; commas or spaces between")
    many.add_argument("--seeds", type=count, default=3, metavar="N", help="runs of each method")
    many.add_argument("--target", type=positive, metavar="PART", help="accuracy to reach (default: 95 %% of the best method's final one)")
    many.add_argument("--reference", default="fedgmr", metavar="M", help="method that the others are compared with seed by seed")
    many.add_argument("--grid", action="append", default=[], metavar="KEY=V1,V2,...", help="every method with each of these values")
    many.add_argument("--set-for", action="append", default=[], metavar="M:KEY=VALUE", help="a key of task.toml for one method only")
    tune = "before: every method once with each of these values, the best on the devices' validation data is taken"
    many.add_argument("--tune", action="append", default=[], metavar="KEY=V1,V2,...", help=tune)
    many.add_argument("--tune-seconds", type=positive, metavar="S", help="virtual seconds of a tuning run (default: those of --seconds)")
    many.add_argument("--tune-base", action="store_true", help="fiarse+restore and fiarse-sync take what was chosen for fiarse, and so on")
    many.add_argument("--engine", choices=["local", "ray"], default="local", help="processes of this machine, or a Ray cluster")
    address = "host:port of a Ray cluster, or auto for one on this machine (default: one is started here for the runs)"
    many.add_argument("--ray-address", metavar="ADDRESS", help=address)
    many.add_argument("--processes", type=count, metavar="N", help="runs at the same time (default: one for each core)")
    many.add_argument("--out", type=Path, default=Path("compared"), metavar="DIR", help="where outcomes and the report are written")


def _scenario(command: argparse.ArgumentParser) -> None:
    """What a simulated fleet is."""
    command.add_argument("task", type=Path, metavar="TASK", help="task folder, see `regrow task new`")
    command.add_argument("--data", default="fashion-mnist", metavar="NAME", help="fashion-mnist, watch, femnist, cifar10, or npz: your own")
    command.add_argument("--data-folder", type=Path, metavar="DIR", help="where its published files lie, or your train.npz and test.npz")
    command.add_argument("--split", default="dirichlet:0.3", metavar="S", help="iid, dirichlet:ALPHA, user or shards:COUNT")
    command.add_argument("--clients", type=count, default=10, metavar="N", help="devices")
    links = "high, medium or low (the papers' classes), trace:FOLDER of CSV files, or bit/s UP or UP/DOWN such as 4000000/16000000,800000"
    command.add_argument("--links", default="high", metavar="L", help=links)
    command.add_argument("--outages", metavar="UP,DOWN", help="mean seconds with and without a link, for example 300,20")
    command.add_argument(
        "--latency", metavar="S[,JITTER]", help="one-way seconds to the broker, and the mean of a random extra (default: 0.01)"
    )
    presence = "who is there when: nightly:22-6, or a TOML or CSV file of joins_s, leaves_s and hours (default: all, always)"
    command.add_argument("--attend", metavar="A", help=presence)
    step = "seconds of one training step on the quickest device (default: 0.01)"
    command.add_argument("--step-s", type=positive, metavar="S", help=step)
    command.add_argument(
        "--steps-trace", type=Path, metavar="DIR", help="recorded step times instead: CSV files with a line of seconds a step"
    )
    slowdown = "how many times slower the devices are than that; several, such as 1,1,4, are spread over them"
    command.add_argument("--slowdown", default="1", metavar="X,...", help=slowdown)
    memory = "what training may take on the devices, in 10^6 bytes; several are spread over them (default: no bound)"
    command.add_argument("--memory-mb", metavar="N,...", help=memory)
    command.add_argument("--step-sigma", type=not_negative, metavar="X", help="log-normal jitter of a job's time: sigma of its logarithm")
    by_density = "a step's time by density, measured, such as 0.05=0.2,1=1 (default: units by their multiply-adds, weights all alike)"
    command.add_argument("--step-by-density", metavar="D=X,...", help=by_density)
    command.add_argument("--seconds", type=positive, default=600.0, metavar="S", help="virtual seconds")
    command.add_argument("--points", type=count, default=60, metavar="N", help="points of the curve")
    validation = "share of every device's data that is kept for validation (default: 0.2)"
    command.add_argument("--validation", type=part, metavar="PART", help=validation)
    trainers = "onnxruntime, torch (CPU) or torch-cuda; with torch the devices that train at the same time are one batch"
    command.add_argument("--trainer", default="onnxruntime", metavar="T", help=trainers)
    command.add_argument("--seed", type=seed, default=1, metavar="N", help="of the split, the links, the batches (compare: the first one)")
    gb = "size of a run's journal, from which an interrupted one goes on; 0: none"
    command.add_argument("--journal-gb", type=not_negative, default=4.0, metavar="X", help=gb)
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a key of task.toml, such as training.local_steps=5"
    )
