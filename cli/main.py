"""The `regrow` command: the one place that puts the rooms together, loading each only when a command needs it."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from regrow.errors import RegrowError

INTERRUPTED = 130
MEMORY_MOST_BYTES = 2**53  # that a hello can say


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 an error that one line explains, 130 interrupted."""
    options = parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.INFO if options.log else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    try:
        module, function = options.command.split(":")
        command: Callable[[argparse.Namespace], int] = getattr(import_module(module), function)
        return command(options)
    except RegrowError as error:
        print(f"regrow: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("regrow", "edge_agent", "broker_server", "export", "testbed", "cli"):
            raise
        print(f"regrow: this command needs {error.name}: pip install 'regrow[server]' on the gateway", file=sys.stderr)
        return 1
    except OSError as error:
        logging.getLogger(__name__).debug("%r", error, exc_info=True)
        print(
            f"regrow: {error.filename or 'this machine'}: {error.strerror or error}; check the path, its owner and the disk",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def parser() -> argparse.ArgumentParser:
    """Every command and option; docs/cli.md is generated from it."""
    top = argparse.ArgumentParser(
        prog="regrow",
        description="Federated learning for uneven edge fleets. Start with `regrow demo`; then docs/bring-your-own.md.",
    )
    top.add_argument("--verbose", action="store_true", help="log everything, for finding a fault")
    top.add_argument("--log", action="store_true", help="log what happens, as a service should")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _demo(commands)
    _task(commands)
    _serve(commands)
    _promote(commands)
    _device(commands)
    _agent(commands)
    _predict(commands)
    _runs(commands)
    _export(commands)
    _model(commands)
    _simulate(commands)
    return top


Commands = Any


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults behind the options that have one worth telling."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.default in (None, False)
        return action.help if plain else super()._get_help_string(action)


def _command(commands: Commands, name: str, function: str, summary: str, more: str = "") -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=f"{summary}. {more}".strip(), formatter_class=_Help
    )
    command.set_defaults(command=function)
    return command


def _runs_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs and the gateway's secrets are kept")


def _demo(commands: Commands) -> None:
    demo = _command(
        commands,
        "demo",
        "testbed.demo:command",
        "ten devices with real sensor data and very different links train one model",
        "Everything runs on this machine: a broker, the gateway and ten agents. Ctrl-C ends it with a report of what there is.",
    )
    _runs_option(demo)
    demo.add_argument("--seconds", type=_positive, default=175.0, help="how long the fleet trains")
    demo.add_argument("--seed", type=_seed, default=1, metavar="N", help="of the first weights and of the batches")
    demo.add_argument("--broker", choices=["auto", "mosquitto", "amqtt"], default="auto", help="auto: mosquitto where it is installed")
    demo.add_argument("--data", type=Path, default=Path("data"), metavar="DIR", help="where the smartwatch data is kept")
    demo.add_argument("--plain", action="store_true", help="the table every ten seconds instead of a live one")


def _task(commands: Commands) -> None:
    task = commands.add_parser("task", help="make and check task folders", description="A task is a folder: task.toml and a model.")
    kinds = task.add_subparsers(title="commands", metavar="COMMAND", required=True)
    new = _command(kinds, "new", "cli.gateway:task_new", "make a task folder around a forward ONNX model")
    new.add_argument("folder", type=Path, metavar="TASK", help="folder to make; its name becomes the task's name")
    new.add_argument(
        "--model",
        type=Path,
        required=True,
        help="forward ONNX model: features in, scores or values out, without its loss; or FILE.py:FUNCTION, where the function returns "
        "a torch module and an example input (FILE.py is run); or one that comes with Regrow: leaf_cnn, ...",
    )
    new.add_argument(
        "--loss",
        choices=("cross_entropy", "binary_cross_entropy", "mse", "huber"),
        default="cross_entropy",
        help="what training makes small, cross_entropy for class scores; task.toml has the other [training] keys",
    )
    build = _command(kinds, "build", "cli.gateway:task_build", "write the programs that devices run", "`serve` does it when needed.")
    build.add_argument("folder", type=Path, metavar="TASK", help="folder with task.toml and its model")


def _serve(commands: Commands) -> None:
    serve = _command(
        commands,
        "serve",
        "cli.gateway:serve",
        "run a task: broker, coordinator and store",
        "Goes on with the newest unfinished run of the task. Ctrl-C stops; the same command goes on where it was.",
    )
    serve.add_argument("task", type=Path, metavar="TASK", help="task folder, or the folder of a run to go on with")
    _runs_option(serve)
    serve.add_argument("--run", metavar="NAME", help="name of a new run (default: task and time)")
    serve.add_argument("--new-run", action="store_true", help="start anew even if a run of this task is unfinished")
    _broker_options(serve)
    serve.add_argument("--takeover", action="store_true", help="lead even if another coordinator is alive")
    serve.add_argument("--plain", action="store_true", help="a line an event instead of the live table")


def _broker_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--broker",
        metavar="URL",
        help="mqtt://user:password@host:port of a broker that is there (or REGROW_BROKER in the environment, which `ps` does not show)",
    )
    command.add_argument("--broker-kind", choices=["auto", "mosquitto", "amqtt"], default="auto", help="which broker to start")
    command.add_argument("--host", default="127.0.0.1", help="address that our broker listens on; 0.0.0.0 lets devices in")
    command.add_argument("--port", type=int, default=1883, help="port of our broker; 0 picks a free one")


def _promote(commands: Commands) -> None:
    promote = _command(
        commands,
        "promote",
        "cli.promote:promote",
        "sign off a model for use on the devices",
        "A device takes it only if it is not worse on the device's own validation data than the one that is there. While `serve` runs for "
        "the task it publishes the model; otherwise this command does, until every device of the run has answered.",
    )
    promote.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    own = "another ONNX file (int8, say) with the same input and output (default: the run's global model, as in model.onnx)"
    promote.add_argument("--model", type=Path, metavar="FILE", help=own)
    promote.add_argument("--withdraw", action="store_true", help="take the newest model back: devices return to the one before it")
    head = "also publish what devices started with --local-head train their last layer with"
    promote.add_argument("--local-head", action="store_true", help=head)
    promote.add_argument("--by", metavar="NAME", help="who signs off (default: user@host)")
    promote.add_argument("--stay", action="store_true", help="go on when all devices of the run have answered, for others, until Ctrl-C")
    promote.add_argument("--no-wait", action="store_true", help="only sign off; a running or later `serve` publishes it")
    _broker_options(promote)


def _predict(commands: Commands) -> None:
    predict = _command(
        commands,
        "predict",
        "cli.predict:predict",
        "run the promoted model that a device has in place",
        "Prints the class of each example, or the numbers of a model without classes, and how good they are where the data say.",
    )
    predict.add_argument("state", type=Path, metavar="STATE_OR_BUNDLE", help="the agent's state folder, or its NAME.json (state beside it)")
    predict.add_argument("--data", required=True, metavar="SOURCE", help="as for `regrow agent`; an .npz needs no y here")
    predict.add_argument("--task", metavar="NAME", help="whose model, where there are several")
    predict.add_argument("--out", type=Path, metavar="FILE", help="write the scores as .npz or .csv instead of printing classes")
    predict.add_argument("--no-head", action="store_true", help="leave out the local head")
    predict.add_argument("--threads", type=_count, default=1, metavar="N", help="for one operator")


def _device(commands: Commands) -> None:
    device = commands.add_parser("device", help="who may connect to the gateway", description="Devices and their passwords.")
    kinds = device.add_subparsers(title="commands", metavar="COMMAND", required=True)
    more = "A running gateway notices."
    add = _command(kinds, "add", "cli.gateway:device_add", "let a device in and write its bundle NAME.json", more)
    add.add_argument("name", metavar="NAME", help="a-z, 0-9 and '-'")
    add.add_argument("--broker", metavar="URL", default="mqtt://127.0.0.1:1883", help="where the device finds the gateway's broker")
    add.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="where to write the bundle")
    _runs_option(add)
    remove = _command(kinds, "remove", "cli.gateway:device_remove", "take a device's access away")
    remove.add_argument("name", metavar="NAME", help="device to remove")
    _runs_option(remove)
    listing = _command(kinds, "list", "cli.gateway:device_list", "name the devices that may connect")
    _runs_option(listing)


def _agent(commands: Commands) -> None:
    agent = _command(
        commands,
        "agent",
        "cli.device:agent",
        "be a device: fetch, train on the data here, send",
        "Runs until it is stopped, through reboots and lost links. Its data never leaves it.",
    )
    agent.add_argument("--bundle", type=Path, required=True, metavar="FILE", help="NAME.json from `regrow device add`")
    sources = "x.npz, idx:IMAGES,LABELS, csv:FILE?label=y, images:DIR or entry:NAME"
    agent.add_argument("--data", required=True, metavar="SOURCE", help=sources)
    agent.add_argument("--state", type=Path, metavar="DIR", help="durable state (default: regrow-state-NAME here)")
    agent.add_argument("--capacity", type=int, metavar="N", help="samples kept, the newest (default: all of a file)")
    agent.add_argument("--validation", type=float, default=0.2, metavar="PART", help="share of the newest data that is never trained on")
    agent.add_argument("--gap", type=int, default=0, metavar="N", help="samples between training and validation used for neither")
    agent.add_argument("--max-uplink-bps", type=_positive, metavar="N", help="send at most this many bits a second")
    agent.add_argument("--max-downlink-bps", type=_positive, metavar="N", help="take at most this many bits a second")
    threads = 'for training, at most; "auto": one for each core'
    agent.add_argument("--threads", type=_threads, default=1, metavar="N", help=threads)
    tuning = "train in the default way always, and repeat to the bit; otherwise the fastest way on this board is found out between jobs"
    agent.add_argument("--no-tuning", action="store_true", help=tuning)
    trainer = "what trains; torch (on the CPU) and torch-cuda are for boards that have torch: the same results up to rounding"
    agent.add_argument("--trainer", choices=["onnxruntime", "torch", "torch-cuda"], default="onnxruntime", help=trainer)
    memory = "memory that training may take, in 10^6 bytes (default: nine tenths of what is free at the start, within its cgroup)"
    agent.add_argument("--memory-mb", type=_memory_mb, metavar="N", help=memory)
    storage = "what activations are kept as between the passes of a step; auto: float16, which is slower, where float32 does not fit"
    agent.add_argument("--storage", choices=["auto", "float32", "float16"], default="auto", help=storage)
    head = "train the last layer of promoted models on the data here, for use here only, and use it where it gains"
    agent.add_argument("--local-head", action="store_true", help=head)


def _runs(commands: Commands) -> None:
    runs = _command(commands, "runs", "cli.gateway:runs", "list the runs")
    _runs_option(runs)
    rollback = _command(
        commands,
        "rollback",
        "cli.gateway:rollback",
        "return to an earlier snapshot",
        "The old model becomes the newest version; stop `serve` first and start it again afterwards.",
    )
    rollback.add_argument("run", type=Path, metavar="RUN", help="folder of the run, for example runs/watch-20260101-120000")
    rollback.add_argument("--to", type=int, metavar="VERSION", help="version of a snapshot (default: the one before the newest)")
    verify = _command(
        commands,
        "verify",
        "cli.gateway:verify",
        "check a run's model against its durable log",
        "Feeds every receipted update to the slow reference implementation of the papers' pseudocode.",
    )
    verify.add_argument("run", type=Path, metavar="RUN", help="folder of the run")


def _export(commands: Commands) -> None:
    export = _command(
        commands,
        "export",
        "cli.models:export_run",
        "write a run's models for use on devices: of every level, as ONNX or .ort, float32, int8 or fp16",
        "Each file is checked, run and measured; export.json and export.md in the same folder hold the table. Reads the run only.",
    )
    export.add_argument("run", type=Path, metavar="RUN", help="folder of the run, or its name in --runs")
    _runs_option(export)
    density = "levels of the run, besides the full model (default: all, where there are at most 10)"
    export.add_argument("--density", metavar="D,...", help=density)
    formats = "onnx, or ort: onnxruntime's own, which its small builds read and other versions of it may refuse"
    export.add_argument("--format", choices=["onnx", "ort"], default="onnx", help=formats)
    export.add_argument("--quantize", default="none", metavar="Q,...", help="none (float32), int8, fp16, or several")
    data = "held-out data for the score, as of `regrow agent` (default: that of the run's [evaluation])"
    export.add_argument("--data", metavar="SOURCE", help=data)
    calibrate = (
        "data from a device, labels are not looked at: for int8 (512 examples), and for the running means and variances of batch "
        "normalisation (default for these: the run's [evaluation] data, or else --data)"
    )
    export.add_argument("--calibrate", metavar="SOURCE", help=calibrate)
    export.add_argument("--latency-runs", type=_count, default=50, metavar="N", help="runs of which the median is the latency")
    export.add_argument("--out", type=Path, default=Path("exported"), metavar="DIR", help="where to write; files of the same name go")


def _model(commands: Commands) -> None:
    model = commands.add_parser("model", help="look at a model before there is a task", description="Models, before there is a task.")
    kinds = model.add_subparsers(title="commands", metavar="COMMAND", required=True)
    check = _command(
        kinds,
        "check",
        "cli.model_check:model_check",
        "say whether a device can train a model, and what it costs: memory, time of a step, bytes of an update",
        "Exit status 0 if it can be trained, 1 if not. Steps are really run, on random data, on this machine.",
    )
    file = (
        "forward ONNX model; or FILE.py:FUNCTION, where the function returns a torch module and an example input (FILE.py is run); or one "
        "that comes with Regrow: leaf_cnn, ... (default: that of --task or --run)"
    )
    check.add_argument("file", nargs="?", metavar="FILE", help=file)
    task = "training, levels and granularity of this task folder (default: those of an empty task.toml, and the options below)"
    check.add_argument("--task", type=Path, metavar="TASK", help=task)
    check.add_argument("--loss", choices=("cross_entropy", "binary_cross_entropy", "mse", "huber"), help="default: cross_entropy")
    check.add_argument("--target", choices=("y", "input"), help='what outputs are compared with; "input" for autoencoders (default: y)')
    check.add_argument("--optimizer", choices=("sgd", "momentum", "nesterov", "adam", "adamw"), help="default: sgd")
    check.add_argument("--proximal-mu", type=_positive, metavar="X", help="FedProx, which keeps the parameters of the round's beginning")
    check.add_argument("--clip-norm", type=_positive, metavar="X", help="bound of the gradient's norm")
    check.add_argument("--train-last", type=_count, metavar="K", help="train the last K layers only")
    check.add_argument("--batch", default="1,20,64", metavar="N,...", help="batch sizes")
    check.add_argument("--uplink", default="250k,1M,10M", metavar="R,...", help="uplinks in bit/s")
    check.add_argument("--density", metavar="D,...", help="levels, besides the full model (default: 0.05,0.1,0.2,0.5,1)")
    check.add_argument("--granularity", choices=["weight", "unit"], help="what sub-models are made of (default: weight)")
    check.add_argument("--run", type=Path, metavar="RUN", help="levels as this run orders them now (default: by |w| of the model)")
    _runs_option(check)
    check.add_argument("--steps", type=int, default=10, metavar="N", help="steps of which the median is told; 0: run none")
    check.add_argument("--json", action="store_true", help="everything as JSON")
    check.add_argument("--picture", type=Path, metavar="FILE.png", help="draw every layer: its parameters, and what each level keeps")


def _simulate(commands: Commands) -> None:
    one = _command(
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
    many = _command(
        commands,
        "compare",
        "cli.compare:compare",
        "simulate several methods over several seeds and write a report",
        "All on the same splits and link draws. What is finished stays after Ctrl-C; the same command goes on.",
    )
    _scenario(many)
    names = "names such as fedgmr, fedasync, fiarse+restore or fedgmr-no-restore"
    many.add_argument("--methods", nargs="+", required=True, metavar="M", help=f"{names}; commas or spaces between")
    many.add_argument("--seeds", type=_count, default=3, metavar="N", help="runs of each method")
    many.add_argument("--target", type=_positive, metavar="PART", help="accuracy to reach (default: 95 %% of the best method's final one)")
    many.add_argument("--reference", default="fedgmr", metavar="M", help="method that the others are compared with seed by seed")
    many.add_argument("--grid", action="append", default=[], metavar="KEY=V1,V2,...", help="every method with each of these values")
    many.add_argument("--set-for", action="append", default=[], metavar="M:KEY=VALUE", help="a key of task.toml for one method only")
    tune = "before: every method once with each of these values, the best on the devices' validation data is taken"
    many.add_argument("--tune", action="append", default=[], metavar="KEY=V1,V2,...", help=tune)
    many.add_argument("--tune-seconds", type=_positive, metavar="S", help="virtual seconds of a tuning run (default: those of --seconds)")
    many.add_argument("--tune-base", action="store_true", help="fiarse+restore and fiarse-sync take what was chosen for fiarse, and so on")
    many.add_argument("--engine", choices=["local", "ray"], default="local", help="processes of this machine, or a Ray cluster")
    address = "host:port of a Ray cluster, or auto for one on this machine (default: one is started here for the runs)"
    many.add_argument("--ray-address", metavar="ADDRESS", help=address)
    many.add_argument("--processes", type=_count, metavar="N", help="runs at the same time (default: one for each core)")
    many.add_argument("--out", type=Path, default=Path("compared"), metavar="DIR", help="where outcomes and the report are written")


def _scenario(command: argparse.ArgumentParser) -> None:
    """What a simulated fleet is."""
    command.add_argument("task", type=Path, metavar="TASK", help="task folder, see `regrow task new`")
    command.add_argument("--data", default="fashion-mnist", metavar="NAME", help="fashion-mnist, watch, femnist, cifar10, or npz: your own")
    command.add_argument("--data-folder", type=Path, metavar="DIR", help="where its published files lie, or your train.npz and test.npz")
    command.add_argument("--split", default="dirichlet:0.3", metavar="S", help="iid, dirichlet:ALPHA, user or shards:COUNT")
    command.add_argument("--clients", type=_count, default=10, metavar="N", help="devices")
    links = "high, medium or low (the papers' classes), trace:FOLDER of CSV files, or bit/s UP or UP/DOWN such as 4000000/16000000,800000"
    command.add_argument("--links", default="high", metavar="L", help=links)
    command.add_argument("--outages", metavar="UP,DOWN", help="mean seconds with and without a link, for example 300,20")
    command.add_argument(
        "--latency", metavar="S[,JITTER]", help="one-way seconds to the broker, and the mean of a random extra (default: 0.01)"
    )
    presence = "who is there when: nightly:22-6, or a TOML or CSV file of joins_s, leaves_s and hours (default: all, always)"
    command.add_argument("--attend", metavar="A", help=presence)
    step = "seconds of one training step on the quickest device (default: 0.01)"
    command.add_argument("--step-s", type=_positive, metavar="S", help=step)
    command.add_argument(
        "--steps-trace", type=Path, metavar="DIR", help="recorded step times instead: CSV files with a line of seconds a step"
    )
    slowdown = "how many times slower the devices are than that; several, such as 1,1,4, are spread over them"
    command.add_argument("--slowdown", default="1", metavar="X,...", help=slowdown)
    memory = "what training may take on the devices, in 10^6 bytes; several are spread over them (default: no bound)"
    command.add_argument("--memory-mb", metavar="N,...", help=memory)
    command.add_argument("--step-sigma", type=_not_negative, metavar="X", help="log-normal jitter of a job's time: sigma of its logarithm")
    by_density = "a step's time by density, measured, such as 0.05=0.2,1=1 (default: units by their multiply-adds, weights all alike)"
    command.add_argument("--step-by-density", metavar="D=X,...", help=by_density)
    command.add_argument("--seconds", type=_positive, default=600.0, metavar="S", help="virtual seconds")
    command.add_argument("--points", type=_count, default=60, metavar="N", help="points of the curve")
    validation = "share of every device's data that is kept for validation (default: 0.2)"
    command.add_argument("--validation", type=_part, metavar="PART", help=validation)
    trainers = "onnxruntime, torch (CPU) or torch-cuda; with torch the devices that train at the same time are one batch"
    command.add_argument("--trainer", default="onnxruntime", metavar="T", help=trainers)
    command.add_argument("--seed", type=_seed, default=1, metavar="N", help="of the split, the links, the batches (compare: the first one)")
    gb = "size of a run's journal, from which an interrupted one goes on; 0: none"
    command.add_argument("--journal-gb", type=_not_negative, default=4.0, metavar="X", help=gb)
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a key of task.toml, such as training.local_steps=5"
    )


def _threads(text: str) -> int:
    """A number of threads; for "auto" that of the cores that this process may use."""
    if text != "auto":
        return _count(text)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < int(text) < 10**9):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2147483647")
    return int(text)


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return value


def _part(text: str) -> float:
    number = _positive(text)
    if number >= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a part between 0 and 1")
    return number


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _memory_mb(text: str) -> float:
    value = _positive(text)
    if value * 1e6 > MEMORY_MOST_BYTES:
        raise argparse.ArgumentTypeError(f"{text!r} is above 9e9, more than a device can say")
    return value


if __name__ == "__main__":
    sys.exit(main())
