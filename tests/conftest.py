"""What several test files need: the embedded model and the folder with golden values."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tinyllama.hub import resolve

SHARED_VARIABLE = "TINYLLAMA_SHARED"


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The trained embedded model's checkpoint folder, made on first use."""
    return resolve("smollm2")


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The folder with the notebook's golden values and the Llama tokenizer."""
    if SHARED_VARIABLE not in os.environ:
        pytest.skip(f"{SHARED_VARIABLE} is not set; it names the folder with golden/ and tokenizer/")
    return Path(os.environ[SHARED_VARIABLE])
