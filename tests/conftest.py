"""What several test files need: the embedded model, golden values, tokenizers and their references."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import PreTrainedTokenizerFast

from tests.text.tiny_tokenizers import find_llama_folder
from tinyllama.checkpoints.hub import resolve
from tinyllama.text.tokenizer import Tokenizer

SHARED_VARIABLE = "TINYLLAMA_SHARED"

# A busy machine makes an example slow, not wrong.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# Side by side with other workers, each has one core.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
    torch.set_num_threads(1)


@pytest.fixture
def no_grad() -> Iterator[None]:
    """Nothing is recorded for a backward pass."""
    with torch.no_grad():
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The tensors are small: beside other work a second thread made such tests five times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@pytest.fixture(scope="session")
def llama() -> Tokenizer:
    """The real Llama tokenizer."""
    return Tokenizer.from_folder(find_llama_folder())


@pytest.fixture(scope="session")
def smollm2(smollm2_folder: Path) -> Tokenizer:
    """The embedded model's tokenizer."""
    return Tokenizer.from_folder(smollm2_folder)


@pytest.fixture(scope="session")
def smollm2_reference(smollm2_folder: Path) -> PreTrainedTokenizerFast:
    """The same files, read by transformers."""
    return PreTrainedTokenizerFast.from_pretrained(smollm2_folder)
