"""What holds for every test: the same examples in every run, and no limit of time on one of them, for machines are shared."""

from __future__ import annotations

from contextlib import suppress

with suppress(ImportError):  # without it the tests that need it are skipped
    from hypothesis import settings

    settings.register_profile("steady", deadline=None, derandomize=True)
    settings.load_profile("steady")
