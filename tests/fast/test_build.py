"""Building the compiled operations: in the background, once, and for one kind of processor."""

from __future__ import annotations

import os

import pytest

from tests.fast.compiled import compiled
from tinyllama.fast import build
from tinyllama.fast.build import Build, BuildError

pytestmark = compiled


def norm() -> Build:
    return Build(("norm",), ("-DX_FLOAT32",), ("-O0", "-fPIC", "-fopenmp"))


def test_it_is_built_once_and_leaves_nothing_but_the_library(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = norm()
    first.start()
    assert first.code is None  # it does not wait
    assert first.ready(wait=60)
    (library,) = (tmp_path / "tinyllama").iterdir()
    made = library.stat().st_mtime_ns
    second = norm()
    second.start()
    assert second.code is not None
    assert library.stat().st_mtime_ns == made


def test_a_slow_compiler_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    slow = tmp_path / "gcc"
    slow.write_text("#!/bin/sh\nread _ < /dev/zero\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    one = norm()
    assert not one.ready(wait=0.05)
    assert one._process is not None
    os.killpg(one._process.pid, 9)
    with pytest.raises(BuildError):
        one.ready(wait=10)


def test_without_a_compiler_or_a_place_it_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="Not a directory"):
        norm().start()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="no C compiler"):
        norm().start()


def test_an_unlike_machine_gets_a_build_of_its_own(tmp_path, monkeypatch):
    # A home folder may be shared: code for one processor would kill the process on another.
    names = []
    for flags in ("flags: avx2", "flags: avx2 avx512f", "flags: avx2"):
        cpuinfo = tmp_path / "cpuinfo"
        cpuinfo.write_text(flags)
        monkeypatch.setattr(build, "CPUINFO", cpuinfo)
        names.append(norm()._path().name)
    assert names[0] == names[2] != names[1]
