"""Renders a chat template within limits of time, memory and output, in a process of its own."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from typing import Any

from tinyllama.errors import InputError
from tinyllama.text.special_tokens import check_text

SECONDS = 2.0  # for one rendering; a Llama's takes a thousandth
START_SECONDS = 60.0  # for the process to start, on a busy machine
CODE = "import sys; sys.path[:] = sys.argv[1:]; from tinyllama.text.template_worker import serve; serve()"


def render(source: str, variables: dict[str, Any]) -> str:
    """The text that a template makes of plain data.

    Raises:
        InputError: an error in the template, or a limit that it reached.
    """
    answer = worker.ask({"source": source, "variables": variables})
    if "error" in answer:
        raise InputError(f"chat template: {answer['error']}; change the messages, or use another checkpoint")
    check_text(answer["text"], "chat template: its text")
    return answer["text"]


class Worker:
    """The process of `template_worker.py`: started for the first request, and after one that ended it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._owner = os.getpid()
        self._lock = threading.Lock()

    def ask(self, request: dict[str, Any]) -> dict[str, str]:
        """The answer to a request, an "error" if none comes in time."""
        with self._lock:
            if self._owner != os.getpid():  # after a fork the process is the parent's
                self._process, self._owner = None, os.getpid()
            if self._process is None:
                self._start()
            try:
                line = self._within(SECONDS, json.dumps(request))
                if line:
                    return json.loads(line)
            except BaseException:  # Ctrl-C: the next request must not get the answer to this one
                self.stop()
                raise
            self.stop()
            return {"error": f"it took more than {SECONDS:g} seconds, or more memory than it may"}

    def stop(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()

    def _start(self) -> None:
        try:
            self._process = subprocess.Popen(
                # Isolated, with this process's path alone: the working folder may hold a stranger's json.py.
                [sys.executable, "-I", "-c", CODE, *map(os.path.abspath, sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # else Ctrl-C would end it too
            )
        except OSError as error:
            raise InputError(f"chat template: no process could be started for it ({error})") from error
        if not self._within(START_SECONDS):
            self.stop()
            raise InputError("chat template: the process that renders it ended at its start")

    def _within(self, seconds: float, request: str = "") -> str:
        """Send a request if there is one, and read a line; "" if the process ended, or had to be ended."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            if request:
                process.stdin.write(request + "\n")
                process.stdin.flush()
            return process.stdout.readline()
        except OSError:  # it ended before it had read all
            return ""
        finally:
            timer.cancel()


worker = Worker()
atexit.register(worker.stop)
