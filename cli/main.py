"""The `regrow` command: the one place that puts the rooms together, loading each only when a command needs it."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from regrow.errors import RegrowError

INTERRUPTED = 130
# In the order of --help. A module has `add_parser(commands)` and is imported when its command is asked for; it imports no room itself.
COMMANDS = {
    "demo": "cli.commands.demo",
    "task": "cli.commands.task",
    "serve": "cli.commands.serve",
    "promote": "cli.commands.promote",
    "device": "cli.commands.device",
    "fleet": "cli.commands.fleet",
    "join": "cli.commands.join",
    "agent": "cli.commands.agent",
    "update": "cli.commands.update",
    "predict": "cli.commands.predict",
    "runs": "cli.commands.runs",
    "rollback": "cli.commands.runs",
    "verify": "cli.commands.runs",
    "export": "cli.commands.export",
    "model": "cli.commands.model",
    "simulate": "cli.commands.simulate",
    "compare": "cli.commands.simulate",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 an error that one line explains, 130 interrupted."""
    words = sys.argv[1:] if arguments is None else arguments
    options = parser(next((word for word in words if not word.startswith("-")), None)).parse_args(words)
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


class _Version(argparse.Action):
    """Looked up only when it is asked for: it costs more than parsing."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"regrow {import_module('cli.version').version()}")
        parser.exit()


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of one command, or of all of them where it is none of them; docs/cli.md is generated from that one."""
    top = argparse.ArgumentParser(
        prog="regrow",
        description="Federated learning for uneven edge fleets. Start with `regrow demo`; then docs/bring-your-own.md.",
    )
    top.add_argument("--version", action=_Version, nargs=0, help="say which version this is, and exit")
    top.add_argument("--verbose", action="store_true", help="log everything, for finding a fault")
    top.add_argument("--log", action="store_true", help="log what happens, as a service should")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in [COMMANDS[command]] if command in COMMANDS else dict.fromkeys(COMMANDS.values()):
        import_module(module).add_parser(commands)
    return top


if __name__ == "__main__":
    sys.exit(main())
