"""`python -m tests.deploy.hanging WHAT ...`: the command `regrow ...`, in which one thread hangs for ever after a while.

WHAT: "training" (in the third step that it trains), "computing" (there it computes in onnxruntime for ever), "store" (in the third
write), or "nothing", the control.
Patience is seconds, not minutes.
"""

from __future__ import annotations

import sys
import threading
from functools import partial
from typing import Any
from unittest.mock import patch

import cli.gateway
import regrow.watchdog
from broker_server.store import Store
from broker_server.vitals import Vitals
from cli.main import main
from edge_agent.trainer import _Session

SHORT = partial(regrow.watchdog.Patience, first_s=6.0, step_s=2.0, slowest=1.0, other_s=6.0)
CALLS = 3


def hanging_after(calls: int, method: Any, *, at_work: bool = False) -> Any:
    left = [calls]

    def hang_in_the_end(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            print("hangs", flush=True)
        while at_work and left[0] <= 0:
            method(*arguments, **named)
        if left[0] <= 0:
            threading.Event().wait()
        return method(*arguments, **named)

    return hang_in_the_end


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    if what == "training":
        _Session.run = hanging_after(CALLS, _Session.run)  # type: ignore[method-assign]
    elif what == "computing":
        _Session.run = hanging_after(CALLS, _Session.run, at_work=True)  # type: ignore[method-assign]
    elif what == "store":
        Store.append = hanging_after(CALLS, Store.append)  # type: ignore[method-assign]
    with patch.object(regrow.watchdog, "Patience", SHORT), patch.object(cli.gateway, "Vitals", partial(Vitals, store_s=2.0)):
        sys.exit(main(words))
