"""Training data on the device: one interface over files and over samples that arrive while training goes on."""

from __future__ import annotations

from edge_agent.data.source import DataSource
from edge_agent.data.sources import open_source

__all__ = ["DataSource", "open_source"]
