"""Other people's programs that read our files: DuckDB with its reader of SQLite from a package, since it would fetch one itself."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import duckdb


def duckdb_on(file: Path, name: str) -> Any:
    """A connection of DuckDB to a SQLite file, attached under this name."""
    (reader,) = resources.files("duckdb_extension_sqlite_scanner").joinpath("extensions", f"v{duckdb.__version__}").iterdir()
    db = duckdb.connect()
    db.execute(f"LOAD '{reader}'")
    db.execute(f"ATTACH '{file}' AS {name} (TYPE sqlite, READ_ONLY)")
    return db
