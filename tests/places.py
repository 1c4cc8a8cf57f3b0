"""Where tests put what must have a short path: a Unix socket's has 107 bytes at most."""

from __future__ import annotations

import tempfile
from typing import Final

_LONGEST: Final = 24
_GIVEN: Final = tempfile.gettempdir()
SHORT_TMP: Final = _GIVEN if len(_GIVEN) <= _LONGEST else "/tmp"
