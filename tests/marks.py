"""Marks that several test files share."""

import sys

import pytest

unix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such thing")
