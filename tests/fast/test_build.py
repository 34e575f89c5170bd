"""Building the compiled operations: in the background, once, and for one kind of processor."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.fast.compiled import compiled
from tinyllama.fast import build, compiler, native
from tinyllama.fast.build import Build
from tinyllama.fast.libraries import BuildError, cache_folder
from tinyllama.fast.linear import quantise

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
        monkeypatch.setattr(compiler, "CPUINFO", cpuinfo)
        names.append(norm()._name())
    assert names[0] == names[2] != names[1]


def built(tmp_path, monkeypatch) -> Path:
    """A library in a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert norm().ready(wait=60)
    (library,) = (tmp_path / "tinyllama").iterdir()
    return library


def test_the_folder_and_the_library_are_for_their_user_alone(tmp_path, monkeypatch):
    (tmp_path / "tinyllama").mkdir(mode=0o755)
    library = built(tmp_path, monkeypatch)
    for path in (library, library.parent):
        assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("what", ["folder", "library", "link"])
def test_nothing_is_loaded_that_somebody_else_can_write(tmp_path, monkeypatch, what):
    library = built(tmp_path, monkeypatch)
    if what == "link":  # to a folder of ours, whose mode must stay
        library.parent.rename(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").chmod(0o755)
        library.parent.symlink_to(tmp_path / "elsewhere")
    elif what == "library":
        library.chmod(0o722)
    elif os.getuid() == 0:
        os.chown(library.parent, 1, 1)
    else:
        pytest.skip("only root can give a folder away")
    loaded = []
    monkeypatch.setattr(ctypes, "CDLL", loaded.append)
    with pytest.raises(BuildError, match="XDG_CACHE_HOME"):
        norm().ready(wait=60)
    assert not loaded
    if what == "link":
        assert (tmp_path / "elsewhere").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("kept", [0, 100, -100])
def test_a_library_that_was_cut_off_is_built_again(tmp_path, monkeypatch, kept):
    # To load it would kill the process: it is mapped, and its end is missing.
    library = built(tmp_path, monkeypatch)
    content = library.read_bytes()
    size = len(content)
    library.unlink()  # this process has it loaded: to truncate it in place would kill whoever reads it
    library.write_bytes(content[: kept % size])
    assert built(tmp_path, monkeypatch).stat().st_size == size


def test_a_file_that_is_no_library_is_built_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = cache_folder() / f"{norm()._name()}.64.so"
    library.write_bytes(bytes(64))
    library.chmod(0o700)
    assert built(tmp_path, monkeypatch).stat().st_size > 64


def test_a_relative_cache_folder_is_ignored_and_no_home_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "tinyllama"
    monkeypatch.delenv("HOME")
    import pwd

    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    with pytest.raises(BuildError, match="home"):
        cache_folder()


def test_a_library_without_the_function_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one = norm()
    assert one.ready(wait=60)
    with pytest.raises(BuildError, match="no matvec"):
        one.function("matvec")


@pytest.mark.parametrize(("output", "expected"), [("", "failed"), ("  \n\n", "failed"), ("\\377 bad", "bad")])
def test_a_compiler_that_says_nothing_or_no_utf8_is_said_in_one_line(tmp_path, monkeypatch, output, expected):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fake = tmp_path / "my-cc"
    fake.write_text(f"#!/bin/sh\nprintf '{output}' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CC", str(fake))
    with pytest.raises(BuildError, match=expected) as error:
        norm().ready(wait=60)
    assert "\n" not in str(error.value)


def test_cc_is_the_compiler_and_may_have_options(monkeypatch):
    monkeypatch.setenv("CC", "env LC_ALL=C cc")
    assert compiler.compiler() == ["env", "LC_ALL=C", "cc"]
    for wrong in ("no-such-compiler -O3", "'", ""):
        monkeypatch.setenv("CC", wrong)
        assert compiler.compiler()[0].endswith("cc")


def test_an_option_that_the_compiler_does_not_know_is_left_out():
    command = tuple(compiler.compiler())
    assert compiler.usable((("-fno-such-option",), ("-O1", "-g")), command) == ("-O1", "-g")
    assert compiler.usable((("-fno-such-option",),), command) == ()


@pytest.mark.parametrize("cc", ["gcc", "clang"])
@pytest.mark.parametrize("threads", [True, False])
def test_every_compiler_builds_what_the_plain_loops_say(tmp_path, monkeypatch, cc, threads):
    if shutil.which(cc) is None:
        pytest.skip(f"needs {cc}")
    monkeypatch.setenv("CC", cc)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    openmp = compiler.usable(compiler.OPENMP, (cc,)) if threads else ()
    for dtype in (torch.int8, torch.float16):
        official = build.products(dtype, torch.float32)
        library = Build(official.sources, official.defines, ("-O1", "-march=native", "-fPIC", *openmp))
        assert library.ready(wait=120)
        weight = torch.randn(70, 128, generator=torch.Generator().manual_seed(0))
        stored, scales = quantise(weight) if dtype == torch.int8 else (weight.to(dtype), None)
        with monkeypatch.context() as patch:
            patch.setattr(build, "products", lambda weights, activations, library=library: library)
            for n in (1, 3, 70):
                x = torch.randn(n, 128, generator=torch.Generator().manual_seed(1))
                expected = native.linear(stored, scales, x, plain=True)
                torch.testing.assert_close(native.linear(stored, scales, x), expected, atol=1e-4, rtol=1e-5)
