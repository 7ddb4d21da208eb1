"""Settings of every test run."""

from __future__ import annotations

from hypothesis import settings

# An example's time says nothing on a machine that also builds; the length of a run is watched by pytest-timeout.
settings.register_profile("m3", deadline=None)
settings.load_profile("m3")
