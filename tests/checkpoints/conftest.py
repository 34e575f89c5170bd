"""An empty weights folder, a small Hub, and no network at all."""

import socket
import threading

import pytest
from huggingface_hub import constants

from tests.checkpoints.fake_hub import FakeHub, use_endpoint
from tinyllama.checkpoints import hub


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """An empty weights folder and an empty Hub cache."""
    monkeypatch.setattr(hub, "weights_folder", lambda: tmp_path / "weights")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "weights"


@pytest.fixture
def fake_hub(weights, monkeypatch):
    with FakeHub() as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()


@pytest.fixture
def no_sockets(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
