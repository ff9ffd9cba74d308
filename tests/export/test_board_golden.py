"""The golden files of `regrow board check` are what the exporter writes now, and torch's numbers."""

from __future__ import annotations

import json

import numpy as np

from edge_agent.board_check import GOLDEN
from tests.golden.board import files


def test_the_golden_files_are_of_this_exporter() -> None:
    made = files()
    again = "write them anew: python -m tests.golden.board"
    assert (GOLDEN / "layout.json").read_bytes() == made["layout.json"], again
    assert (GOLDEN / "train.onnx").read_bytes() == made["train.onnx"], again
    there, now = json.loads((GOLDEN / "expected.json").read_text()), json.loads(made["expected.json"])
    np.testing.assert_allclose(there["parameters"], now["parameters"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(there["loss"], now["loss"], rtol=1e-6)
