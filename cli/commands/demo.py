"""The options of `regrow demo`."""

from __future__ import annotations

from pathlib import Path

from cli.arguments import Commands, add_command, positive, runs_option, seed


def add_parser(commands: Commands) -> None:
    demo = add_command(
        commands,
        "demo",
        "testbed.demo:command",
        "ten devices with real sensor data and very different links train one model",
        "Everything runs on this machine: a broker, the gateway and ten agents. Ctrl-C ends it with a report of what there is.",
    )
    runs_option(demo)
    demo.add_argument("--seconds", type=positive, default=175.0, help="how long the fleet trains")
    demo.add_argument("--seed", type=seed, default=1, metavar="N", help="of the first weights and of the batches")
    demo.add_argument("--broker", choices=["auto", "mosquitto", "amqtt"], default="auto", help="auto: mosquitto where it is installed")
    demo.add_argument("--data", type=Path, default=Path("data"), metavar="DIR", help="where the smartwatch data is kept")
    demo.add_argument("--plain", action="store_true", help="the table every ten seconds instead of a live one")
