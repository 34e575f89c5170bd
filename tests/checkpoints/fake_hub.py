"""A small Hub on this machine's loopback."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
from huggingface_hub import constants

REPO, COMMIT = "org/small", "0123456789abcdef0123456789abcdef01234567"
CONFIG, TOKENIZER = b'{"model_type": "llama"}', b'{"version": "1.0"}'
WEIGHTS = bytes(range(256)) * 4000
SHARDS = [
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
]
PAST_THE_TEST = 60  # seconds: a call that hangs for so long fails the test's own clock


def use_endpoint(monkeypatch, url):
    """What HF_ENDPOINT sets, which huggingface_hub reads when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()  # the kept client has read the proxy settings


class FakeHub(ThreadingHTTPServer):
    """The part of the Hub's API that a download needs; `requests` lists what was asked of it."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"config.json": CONFIG, "tokenizer.json": TOKENIZER, "model.safetensors": WEIGHTS}
        self.requests = []
        self.refuse = {}  # part of a path -> (status, headers)
        self.cut_once = set()  # files whose connection breaks in the middle, once
        self.hang = None  # an event that every answer waits for

    def fetched(self):
        return [
            path.rsplit("/", 1)[-1]
            for method, path in self.requests
            if "/resolve/" in path and method == "GET"
        ]


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        hub = self.server
        path = self.path.split("?")[0]
        hub.requests.append((self.command, path))
        if hub.hang:
            hub.hang.wait(PAST_THE_TEST)
        for part, (status, headers) in hub.refuse.items():
            if part in path:
                return self.send(status, headers, b"", with_body)
        if path.startswith("/api/models/"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in hub.files.items()]
            body = json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode()
            return self.send(200, {}, body, with_body)
        name = path.split(f"/resolve/{COMMIT}/")[-1]
        if name not in hub.files:
            return self.send(404, {"X-Error-Code": "EntryNotFound"}, b"", with_body)
        return self.send_file(name, with_body)

    def send_file(self, name, with_body):
        data = self.server.files[name]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        start = int(self.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = name in self.server.cut_once and with_body
        self.server.cut_once -= {name} if cut else set()
        self.send(206 if start else 200, headers, data[start:], with_body, cut)

    def send(self, status, headers, body, with_body, cut=False):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body[: len(body) // 2] if cut else body)
