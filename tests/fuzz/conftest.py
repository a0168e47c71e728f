"""The same examples in every run; `pytest --hypothesis-profile=default tests/fuzz` tries others."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("same", derandomize=True, database=None)
settings.load_profile("same")
