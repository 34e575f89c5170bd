"""Run a command in a child process with limits, and say whether it behaved: right, or one line and status 2.

A server that has imported everything forks for each command, so that one takes tens of milliseconds. It must
not have computed anything itself: OpenMP's threads do not survive a fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import importlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 10.0
MEMORY = 1 << 30  # bytes beyond what the imports take
LONGEST_LINE = 1200
IMPORTS = """
    torch safetensors.torch sentencepiece tokenizers tinyllama.__main__ tinyllama.generation
    tinyllama.text.conversation tinyllama.lab.kernel_file tinyllama.lab.scorecard tinyllama.lab.healed
    tinyllama.explorer.session tinyllama.cli.options tinyllama.text.routes tinyllama.text.template
    huggingface_hub.hf_api huggingface_hub.file_download torch._meta_registrations torch._refs torch._dynamo
"""


@dataclass(frozen=True)
class Command:
    """What to run.

    Attributes:
        argv: of `tinyllama`, or a Python function as `["module:function", JSON]`.
        folder: where to run it.
        stdin: what it reads.
        obedient: obey the permissions of files even as root.
        largest_file: in bytes; the disk is full beyond it.
        kill_after: seconds until it is killed; 0 lets it end.
        seconds: how long it may take.
    """

    argv: tuple[str, ...]
    folder: str
    stdin: bytes = b""
    obedient: bool = False
    largest_file: int = 0
    kill_after: float = 0.0
    seconds: float = SECONDS


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        status: the exit status; negative for the signal that ended it, None where time ran out.
        seconds: how long it took.
        memory: bytes beyond those of the server.
        stdout: what it printed.
        stderr: what it said.
    """

    status: int | None
    seconds: float
    memory: int
    stdout: str
    stderr: str

    @property
    def faults(self) -> list[str]:
        """What is wrong with it, in a few words each; two faults with the same words are one."""
        found = []
        if self.status is None:
            found.append("no end")
        elif self.status < 0:
            found.append(f"killed by {signal.Signals(-self.status).name}")
        elif self.status not in (0, 2):
            found.append(f"exit status {self.status}")
        if self.memory > MEMORY:
            found.append("over 1 GB of memory")
        if "Traceback" in self.stderr:
            found.append(f"traceback: {self._end_of_traceback()}")
        elif self.status == 2:
            errors = [line for line in self.stderr.splitlines() if re.match(r"(\w+(\.py)?: )?error: ", line)]
            if len(errors) != 1 or self.stderr.splitlines()[-1] != errors[0]:
                found.append("status 2 without one line that says why, at the end")
            elif len(errors[0]) > LONGEST_LINE:
                found.append("an error of many characters")
        if re.search(r"[\x00-\x08\x0b-\x1f\x7f\x9b]", self.stderr):
            found.append("control characters on stderr")
        return found

    def _end_of_traceback(self) -> str:
        """The place in the project and the kind of error."""
        places = re.findall(r'File "[^"]*?/((?:tinyllama|scripts)/[^"]*)", line \d+, in (\S+)', self.stderr)
        kinds = re.findall(r"^(\w[\w.]*(?:Error|Exception|Interrupt)\w*)", self.stderr, re.MULTILINE)
        return f"{kinds[-1] if kinds else '?'} in {' '.join(places[-1]) if places else '?'}"


class Judge:
    """The server, as seen from outside; a context manager."""

    def __enter__(self) -> Judge:
        """Start the server."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.judge"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            env=environment,
        )
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def __call__(self, command: Command) -> Outcome:
        """Run it."""
        return self.together(command)[0]

    def together(self, *commands: Command) -> list[Outcome]:
        """Run several side by side."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        records = [dataclasses.asdict(each) | {"stdin": each.stdin.hex()} for each in commands]
        self._server.stdin.write(json.dumps(records).encode() + b"\n")
        self._server.stdin.flush()
        return [Outcome(**record) for record in json.loads(self._server.stdout.readline())]


def serve() -> None:
    """Answer lines of JSON until stdin is closed."""
    for name in IMPORTS.split():
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a child's collector would copy every page that it looks at
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing but answers may go there
    for line in sys.stdin.buffer:
        commands = [Command(**each | {"stdin": bytes.fromhex(each["stdin"])}) for each in json.loads(line)]
        with tempfile.TemporaryDirectory() as scratch:
            running = [start(command, Path(scratch) / str(index)) for index, command in enumerate(commands)]
            outcomes = [finish(*each) for each in running]
        answers.write(json.dumps([dataclasses.asdict(outcome) for outcome in outcomes]).encode() + b"\n")
        answers.flush()


def start(command: Command, scratch: Path) -> tuple[Command, Path, int, float]:
    """Fork a child that runs the command."""
    scratch.mkdir()
    (scratch / "stdin").write_bytes(command.stdin)
    for name in ("stdout", "stderr"):
        (scratch / name).touch()
    started = time.monotonic()
    child = os.fork()
    if child:
        return command, scratch, child, started
    try:
        become(command, scratch)
    finally:  # whatever happens, this process must not go on as a second server
        os._exit(99)


def become(command: Command, scratch: Path) -> None:
    """Turn this process into the command's."""
    os.setsid()  # so that all it starts can be ended with it
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        flags = os.O_RDONLY if name == "stdin" else os.O_WRONLY | os.O_APPEND
        os.dup2(os.open(scratch / name, flags), descriptor)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace")  # as Python has it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(
        resource.RLIMIT_AS, (in_memory(0) + 4 * MEMORY,) * 2
    )  # a bomb must not take the machine
    if command.largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (command.largest_file,) * 2)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing fails, as on a full disk
    os.chdir(command.folder)
    if command.obedient:
        obey_permissions()
    status = 1
    try:
        module, _, function = command.argv[0].partition(":")
        if function:
            getattr(importlib.import_module(module), function)(json.loads(command.argv[1]))
            status = 0
        else:
            sys.argv = ["tinyllama", *command.argv]
            importlib.import_module("tinyllama.__main__").main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0
    except BaseException:  # as Python does at the end
        import traceback

        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(status)


def in_memory(kind: int) -> int:
    """Bytes of this process now: 0 for all addresses, 1 for what is in memory, with which a child begins."""
    return int(Path("/proc/self/statm").read_text().split()[kind]) * resource.getpagesize()


def obey_permissions() -> None:
    """Give up root's right to override the permissions of files (capabilities 1 and 2 of Linux)."""
    header, held = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(header, held) == 0:
        for index in (0, 1, 2):  # effective, permitted, inheritable
            held[index] &= ~0b110
        libc.capset(header, held)


def finish(command: Command, scratch: Path, child: int, started: float) -> Outcome:
    """Wait for the child, or end it."""
    limit, wait = command.kill_after or command.seconds, 0.001
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done or time.monotonic() - started > limit:
            break
        time.sleep(wait)
        wait = min(wait * 1.5, 0.02)
    seconds = time.monotonic() - started
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # with what it started
    if not done:
        os.kill(child, signal.SIGKILL)  # it may not have become a group yet
        _, status, usage = os.wait4(child, 0)
    read: dict[str, Any] = {
        name: (scratch / name).read_bytes()[: 1 << 16].decode("utf-8", "replace")
        for name in ("stdout", "stderr")
    }
    code = None if not done and not command.kill_after else os.waitstatus_to_exitcode(status)
    return Outcome(code, seconds, max(usage.ru_maxrss * 1024 - in_memory(1), 0), **read)


if __name__ == "__main__":
    serve()
