"""The options of `regrow agent`."""

from __future__ import annotations

from pathlib import Path

from cli.arguments import Commands, add_command, config_option, disk_mb, memory_mb, positive, threads_of


def add_parser(commands: Commands) -> None:
    agent = add_command(
        commands,
        "agent",
        "cli.device:agent",
        "be a device: fetch, train on the data here, send",
        "Runs until it is stopped, through reboots and lost links. Its data never leaves it.",
    )
    who = agent.add_mutually_exclusive_group(required=True)
    identity = "folder of this device's identity in a fleet; with a claim in it and no certificate yet, the agent joins by itself"
    who.add_argument("--identity", type=Path, metavar="DIR", help=identity)
    who.add_argument("--bundle", type=Path, metavar="FILE", help="NAME.json from `regrow device add`")
    claim = "NAME.claim.json from `regrow fleet add`, to begin an identity with that has none"
    agent.add_argument("--claim", type=Path, metavar="FILE", help=claim)
    config_option(agent, "/etc/regrow/agent.toml")
    sources = "x.npz, idx:IMAGES,LABELS, csv:FILE?label=y, images:DIR or entry:NAME"
    agent.add_argument("--data", required=True, metavar="SOURCE", help=sources)
    agent.add_argument("--state", type=Path, metavar="DIR", help="durable state (default: regrow-state-NAME here)")
    agent.add_argument("--capacity", type=int, metavar="N", help="samples kept, the newest (default: all of a file)")
    agent.add_argument("--validation", type=float, default=0.2, metavar="PART", help="share of the newest data that is never trained on")
    agent.add_argument("--gap", type=int, default=0, metavar="N", help="samples between training and validation used for neither")
    agent.add_argument("--max-uplink-bps", type=positive, metavar="N", help="send at most this many bits a second")
    agent.add_argument("--max-downlink-bps", type=positive, metavar="N", help="take at most this many bits a second")
    threads = 'for training, at most; "auto": one for each core'
    agent.add_argument("--threads", type=threads_of, default=1, metavar="N", help=threads)
    tuning = "train in the default way always, and repeat to the bit; otherwise the fastest way on this board is found out between jobs"
    agent.add_argument("--no-tuning", action="store_true", help=tuning)
    trainer = "what trains; torch (on the CPU) and torch-cuda are for boards that have torch: the same results up to rounding"
    agent.add_argument("--trainer", choices=["onnxruntime", "torch", "torch-cuda"], default="onnxruntime", help=trainer)
    memory = "memory that training may take, in 10^6 bytes (default: nine tenths of what is free at the start, within its cgroup)"
    agent.add_argument("--memory-mb", type=memory_mb, metavar="N", help=memory)
    storage = "what activations are kept as between the passes of a step; auto: float16, which is slower, where float32 does not fit"
    agent.add_argument("--storage", choices=["auto", "float32", "float16"], default="auto", help=storage)
    head = "train the last layer of promoted models on the data here, for use here only, and use it where it gains"
    agent.add_argument("--local-head", action="store_true", help=head)
    updates = "fetch releases for the updater of this device, whose settings these are (/etc/regrow/update.json)"
    agent.add_argument("--updates", type=Path, metavar="FILE", help=updates)
    journal = "10^6 bytes of the disk for observations (transfers, power, phases) that the gateway has not got yet; at least 1"
    agent.add_argument("--journal-mb", type=disk_mb, default=32.0, metavar="N", help=journal)
    agent.add_argument("--no-observations", action="store_true", help="keep and send no observations, and take no part in field runs")
