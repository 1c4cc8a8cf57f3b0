from __future__ import annotations

from hypothesis import settings

# A busy machine is no reason to fail: what takes too long has a test of its own.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
