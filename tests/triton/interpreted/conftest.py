"""Tests of this folder run Triton kernels under the corrected and checking interpreter.

Triton decides at import whether it interprets, so they run in a process of their own with TRITON_INTERPRET=1, which
tests/triton/test_interpreted.py starts; the ordinary test process collects nothing here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETING else ["test_*.py"]

if INTERPRETING:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import checking_interpreter
    import corrected_interpreter

    corrected_interpreter.install()
    checking_interpreter.install()
