"""What every --help says: a default only where there is one."""

from __future__ import annotations

import argparse

import pytest

from tests.docs.generate import commands


@pytest.mark.parametrize(("name", "command"), list(commands()), ids=[name for name, _ in commands()])
def test_no_default_is_empty(name: str, command: argparse.ArgumentParser) -> None:
    said = " ".join(command.format_help().split())
    assert name in said
    for nothing in ("(default: )", "(default: [])", "(default: None)", "(default: False)", "(default: {})", "(default: ())"):
        assert nothing not in said
