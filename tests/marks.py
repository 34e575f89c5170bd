"""Marks that several test files share."""

import os
import sys

import pytest

unix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such thing")
# What the suite has no time for; `make parallel` and `make notebooks` run it.
slow = pytest.mark.skipif(
    "TINYLLAMA_SLOW" not in os.environ, reason="takes long; run by make parallel or make notebooks"
)
