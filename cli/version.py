"""The version of what is installed here."""

from __future__ import annotations

from importlib import metadata


def version() -> str:
    """As in pyproject.toml; "" where the package is used without being installed."""
    try:
        return metadata.version("regrow")
    except metadata.PackageNotFoundError:
        return ""
