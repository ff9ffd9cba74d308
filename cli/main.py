"""The `regrow` command: the one place that puts the rooms together, loading each only when a command needs it."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # typing is imported by nobody but type checkers: Ctrl-C is not heeded before `main` has begun
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

OURS = ("regrow", "edge_agent", "broker_server", "export", "testbed", "cli")
EXTRAS = {"cryptography": "fleet", "torch": "torch", "onnxscript": "torch", "ray": "ray"}
"""Which extra of pyproject.toml brings a package that only some commands need; the others are the gateway's, [server]."""
FAILED, MISUSED, INTERRUPTED = 1, 2, 130
"""Exit status of every command: 0 done; 1 something failed at work, and one line says what; 2 what was asked for is wrong: an option, an
argument, a configuration file (UsageError, or argparse); 130 after Ctrl-C, however orderly the end."""
# In the order of --help. A module has `add_parser(commands)` and is imported when its command is asked for; it imports no room itself.
COMMANDS = {
    "demo": "cli.commands.demo",
    "task": "cli.commands.task",
    "serve": "cli.commands.serve",
    "page": "cli.commands.page",
    "top": "cli.commands.top",
    "promote": "cli.commands.promote",
    "device": "cli.commands.device",
    "fleet": "cli.commands.fleet",
    "join": "cli.commands.join",
    "agent": "cli.commands.agent",
    "board": "cli.commands.board",
    "measure": "cli.commands.measure",
    "image": "cli.commands.image",
    "doctor": "cli.commands.doctor",
    "update": "cli.commands.update",
    "predict": "cli.commands.predict",
    "config": "cli.commands.config",
    "backup": "cli.commands.backup",
    "restore": "cli.commands.backup",
    "field": "cli.commands.field",
    "runs": "cli.commands.runs",
    "rollback": "cli.commands.runs",
    "verify": "cli.commands.runs",
    "export": "cli.commands.export",
    "model": "cli.commands.model",
    "simulate": "cli.commands.simulate",
    "compare": "cli.commands.simulate",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status, by the one rule above.

    Ctrl-C counts from the first moment, also where what runs takes it for an error of its own, or for none.
    """
    pressed: list[int] = []
    try:
        _heed_ctrl_c(pressed)
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # since 1.31 onnxruntime reports to its maker unless told not to
        status = _run(sys.argv[1:] if arguments is None else arguments)
        if not pressed:
            return status
        _heed_no_more(pressed)
        return INTERRUPTED
    except KeyboardInterrupt:
        _heed_no_more(pressed)
        pressed.append(0)
    except Exception as error:
        if not pressed:
            known = _told(error)
            if known is None:
                raise
            return known
    print("regrow: interrupted", file=sys.stderr)
    return INTERRUPTED


def _heed_ctrl_c(pressed: list[int]) -> None:
    """Note every Ctrl-C in `pressed` and raise KeyboardInterrupt; once more where nothing can be raised (destructors, callbacks of C)."""
    import _thread
    import signal
    import time

    def press(number: int, _: object) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    def press_later() -> None:
        time.sleep(0.05)
        _thread.interrupt_main()

    def unraisable(what: sys.UnraisableHookArgs) -> None:
        if issubclass(what.exc_type, KeyboardInterrupt):
            _thread.start_new_thread(press_later, ())  # here it would be lost again
        else:
            sys.__unraisablehook__(what)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a caller has one of its own, or it is ignored
        try:
            signal.signal(signal.SIGINT, press)
        except ValueError:  # not the main thread, where signals never come
            return
        sys.unraisablehook = unraisable


def _heed_no_more(pressed: Sequence[int]) -> None:
    """Let no further Ctrl-C reach the interpreter's end, which restores the system's way: the process would die of it."""
    import signal

    if pressed:  # by our own handler, so this process is ours
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run(words: Sequence[str]) -> int:
    import logging
    from importlib import import_module

    from cli import settings

    name = next((word for word in words if not word.startswith("-")), None)
    options = settings.parse(parser(name), name, words, lambda: settings.variables(parser()))
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.INFO if options.log else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    module, function = options.command.split(":")
    command: Callable[[argparse.Namespace], int] = getattr(import_module(module), function)
    return command(options)


def _told(error: Exception) -> int | None:
    """The status of what a command raised, after one line that explains it; None for what nobody meant to raise."""
    import errno
    import logging

    from regrow.errors import RegrowError, UsageError

    if isinstance(error, RegrowError):
        said = str(error)
    elif isinstance(error, ModuleNotFoundError) and error.name is not None and error.name.split(".")[0] not in OURS:
        package = error.name.split(".")[0]
        said = f"this command needs {package}: pip install 'regrow[{EXTRAS.get(package, 'server')}]'"
    elif isinstance(error, OSError):
        logging.getLogger(__name__).debug("%r", error, exc_info=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cure = "free space on that disk, and say it again" if full else "check the path, its owner and the disk"
        said = f"{error.filename or 'this machine'}: {error.strerror or error}; {cure}"
    else:
        return None
    print(f"regrow: {said}", file=sys.stderr)
    return MISUSED if isinstance(error, UsageError) else FAILED


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of one command, or of all of them where it is none of them; docs/cli.md is generated from that one."""
    import argparse
    from importlib import import_module

    class Version(argparse.Action):
        """Looked up only when it is asked for: it costs more than parsing."""

        def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
            print(f"regrow {import_module('cli.version').version()}")
            parser.exit()

    top = argparse.ArgumentParser(
        prog="regrow",
        description="Federated learning for uneven edge fleets. Start with `regrow demo`; then docs/bring-your-own.md.",
    )
    top.add_argument("--version", action=Version, nargs=0, help="say which version this is, and exit")
    top.add_argument("--verbose", action="store_true", help="log everything, for finding a fault")
    top.add_argument("--log", action="store_true", help="log what happens, as a service should")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in [COMMANDS[command]] if command in COMMANDS else dict.fromkeys(COMMANDS.values()):
        import_module(module).add_parser(commands)
    return top


if __name__ == "__main__":
    sys.exit(main())
