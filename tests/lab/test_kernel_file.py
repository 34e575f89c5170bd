"""A kernel from a user's file: what is accepted, and the one line that each mistake gets."""

import random
import secrets
import sys
from functools import partial

import pytest
import torch

from tests.checkpoints.test_storage import write
from tinyllama.attention import sdpa
from tinyllama.checkpoints.load import load_model
from tinyllama.errors import InputError
from tinyllama.kernels import KERNELS, kernel_name
from tinyllama.lab import variants
from tinyllama.lab.contract import check_attention
from tinyllama.lab.kernel_file import (
    VARIANTS,
    failure_in_a_kernel_file,
    load_kernel,
    load_kernels,
    trusted_kernel,
)


@pytest.fixture
def kernel_file(tmp_path):
    """Writes a file of that name; returns its path."""

    def write(content, name="mine.py"):
        (tmp_path / name).write_text(content, encoding="utf-8")
        return tmp_path / name

    return write


@pytest.mark.parametrize("name", KERNELS | VARIANTS)
def test_a_name_is_the_kernel_of_that_name(name):
    kernel = load_kernel(name)
    assert kernel is (KERNELS | VARIANTS)[name]
    assert kernel_name(kernel) == name


def test_a_file_gives_the_function_of_that_name(kernel_file):
    file = kernel_file("def first(q, k, v, context): return q\ndef second(q, k, v, context): return v")
    q, v = torch.zeros(1), torch.ones(1)
    assert load_kernel(f"{file}:first")(q, None, v, None) is q
    assert load_kernel(f"{file}:second")(q, None, v, None) is v


def test_several_kernels_of_a_file_run_it_once_and_the_next_load_runs_it_as_it_is_then(kernel_file):
    counting = "(__import__('pathlib').Path(__file__).parent / 'ran').open('a').write('.')\n"
    file = kernel_file(counting + SETTABLE)
    specs = ["window", f"{file}:f:size=2", f"{file}:plain", f"{file}:f:size=3"]
    kernels = load_kernels(specs)
    assert list(kernels) == specs
    assert kernels["window"] is VARIANTS["window"]
    assert [called(kernels[spec]) for spec in specs[1:]] == [(2, (), "", 0.0), "plain", (3, (), "", 0.0)]
    assert (file.parent / "ran").read_text() == "."
    kernel_file(counting + "def plain(q, k, v, context): return 'edited'")
    assert called(load_kernels([f"{file}:plain"])[f"{file}:plain"]) == "edited"


def test_a_file_may_have_dataclasses_and_the_name_of_another_module(kernel_file):
    # Dataclasses with annotations that are strings look their own module up in sys.modules.
    code = [
        "from __future__ import annotations",
        "from dataclasses import dataclass",
        "@dataclass",
        "class Window:",
        "    size: int = 8",
        "    def __call__(self, q, k, v, context): return self.size",
        "window = Window()",
    ]
    file = kernel_file("\n".join(code), "random.py")
    assert load_kernel(f"{file}:window")(None, None, None, None) == 8
    assert sys.modules["random"] is random


@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        ("def attend(q, k, v, context): pass", "absent", "expected a function 'absent', found attend$"),
        ("attend = 3", "attend", "expected a function 'attend', found none$"),
        ("_attend = len", "", "expected a function '', found none$"),
        ("def attend(:", "attend", "SyntaxError: .*; correct the file"),
        ("import no_such_module", "attend", "ModuleNotFoundError: .*'no_such_module'; correct the file"),
        ("1 / 0", "attend", "ZeroDivisionError: division by zero; correct the file"),
        # Otherwise the script would end with status 0, as if all had passed.
        ("raise SystemExit(0)", "attend", "SystemExit: 0; correct the file"),
        ("class Stop(BaseException): pass\n\nraise Stop('now')", "attend", "Stop: now; correct the file"),
        ("def attend(): pass", "attend", "a kernel is called with .*attend()"),
        ("def attend(q, k, v): pass", "attend", "a kernel is called with .*too many"),
        ("def attend(q, k, v, context, size): pass", "attend", "a kernel is called with .*missing"),
        ("class Attend:\n  def __call__(self, q, k, v, context): pass", "Attend", "Attend is a class"),
    ],
)
def test_a_file_without_the_kernel_is_refused(kernel_file, content, name, expected):
    with pytest.raises(InputError, match=rf"mine.py(:\d)?: {expected}"):
        load_kernel(f"{kernel_file(content)}:{name}")


def test_an_unknown_name_or_file_is_refused(kernel_file, tmp_path):
    with pytest.raises(InputError, match=r"or file.py:function, got 'flash'") as error:
        load_kernel("flash")
    for name in KERNELS | VARIANTS:  # all names are there to choose from
        assert f" {name}" in str(error.value)
    for place in (tmp_path / "absent.py", tmp_path):
        with pytest.raises(InputError, match="no such file; expected a Python file"):
            load_kernel(f"{place}:attend")
    with pytest.raises(InputError, match="expected a Python file"):
        load_kernel(f"{kernel_file('', 'mine.txt')}:attend")


# --- settings --------------------------------------------------------------------------------------------

SETTABLE = """
def f(q, k, v, context, *, size=1, heads=(), name="", cap=0.0): return size, heads, name, cap
def plain(q, k, v, context): return "plain"
"""


def called(kernel):
    return kernel(None, None, None, None)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("size=3", (3, (), "", 0.0)),
        ("size=3,heads=(0, 2)", (3, (0, 2), "", 0.0)),
        ("heads=[0,2],size=-1", (-1, [0, 2], "", 0.0)),
        ("name='a b',cap=1e-3", (1, (), "a b", 1e-3)),
        ("cap=2.5,heads=None,size=True", (True, None, "", 2.5)),
        ("size = 4", (4, (), "", 0.0)),
    ],
)
def test_settings_follow_the_function_of_a_file(kernel_file, settings, expected):
    assert called(load_kernel(f"{kernel_file(SETTABLE)}:f:{settings}")) == expected


def test_settings_follow_a_name():
    kernel = load_kernel("window:size=64")
    assert isinstance(kernel, partial)
    assert kernel.func is variants.window
    assert kernel.keywords == {"size": 64}
    assert kernel_name(kernel) == "window(size=64)"
    assert load_kernel("sinks:first=2,size=30").keywords == {"first": 2, "size": 30}


@pytest.mark.parametrize("settings", ["seize=3", "size=3,seize=3", "q=3", "context=3"])
def test_an_unknown_setting_is_refused_and_the_known_ones_are_listed(kernel_file, settings):
    spec = f"{kernel_file(SETTABLE)}:f:{settings}"
    with pytest.raises(InputError) as error:
        load_kernel(spec)
    wrong = settings.split(",")[-1].split("=")[0]
    assert str(error.value) == f"{spec}: expected settings size, heads, name, cap, got '{wrong}'"


@pytest.mark.parametrize(
    "settings", ["size='a'", "size=2.5", "size=True", "size=None", f"size={10**30}", f"size={'9' * 4000}"]
)
def test_a_setting_that_is_no_number_is_refused_where_the_kernel_says_that_it_is_one(settings):
    with pytest.raises(InputError, match="window:size") as error:
        load_kernel(f"window:{settings}")
    assert len(str(error.value)) < 500


def test_a_negative_number_of_first_tokens_is_refused():
    with pytest.raises(InputError, match="sinks: first"):
        check_attention(load_kernel("sinks:first=-5"))


FAILING = """
import torch
from tinyllama.lab import breaks
def none(q, k, v, context): pass
def short(q, k, v, context): return q[:, :3]
def whole(q, k, v, context): return q.int()
def wide(q, k, v, context): return torch.cat([q, q], 1)
@breaks("gradient")
def declared(q, k, v, context): pass
"""


@pytest.mark.parametrize("weights", ["exact", "stored"])
@pytest.mark.parametrize("name", ["none", "short", "whole", "wide", "declared"])
def test_a_result_that_is_not_like_the_queries_is_refused_by_the_name_of_the_kernel(
    kernel_file, no_grad, tmp_path, name, weights
):
    model = load_model(write(tmp_path), device="cpu", dtype="float32", weights=weights)
    file = kernel_file(FAILING)
    kernel = load_kernel(f"{file}:{name}")
    for heads in (None, [0]):
        model.set_attention(sdpa)
        model.set_attention(kernel, heads=heads)
        with pytest.raises(InputError, match=rf"mine.py:\d+: the kernel {name} must return"):
            model(torch.tensor([[1, 2, 3]]))


def test_an_error_in_a_file_is_said_with_its_line_and_others_are_not(kernel_file):
    kernel = load_kernel(f"{kernel_file('def f(q, k, v, context):' + chr(10) + '    return q @ k')}:f")
    with pytest.raises(RuntimeError) as error:
        kernel(torch.zeros(2, 3), torch.zeros(2, 3), None, None)
    assert "mine.py:2: RuntimeError: " in str(failure_in_a_kernel_file(error.value))
    with pytest.raises(ValueError, match="x") as error:
        int("x")
    assert failure_in_a_kernel_file(error.value) is None


PRINTING = """
import sys
import tinyllama
print("read")
print("aside", file=sys.stdout)
def f(q, k, v, context):
    print("shape", *q.shape, sep="-")
    return tinyllama.sdpa(q, k, v, context)
"""


def test_what_a_kernel_file_prints_goes_to_stderr_with_its_line_a_few_times(kernel_file, capsys):
    file = kernel_file(PRINTING)
    kernel = load_kernel(f"{file}:f")
    contract = check_attention(kernel, clauses=["shape", "causal", "compile"], longest=8)
    assert contract.passed, str(contract)  # the compiler leaves the printing out
    told = capsys.readouterr()
    lines = told.err.splitlines()
    assert lines[:2] == [f"{file}:4: read", f"{file}:7: shape-1-4-1-16"]
    assert [line.split(":")[1] for line in lines] == ["4", *["7"] * 6]
    assert lines[-1] == f"{file}:7: prints more, which is left out"
    assert told.out == "aside\n"  # as asked for


@pytest.mark.parametrize(
    ("code", "line", "what"),
    [
        ("class Mine: pass", 1, "Mine is a class, expected a kernel; make one"),
        ("\nasync def Mine(q, k, v, context): pass", 2, "Mine is an async function"),
        ("\n\ndef Mine(q, k, v): pass", 3, r"Mine\(q, k, v\) cannot be: too many"),
    ],
)
def test_what_is_no_kernel_is_refused_with_its_line(kernel_file, code, line, what):
    file = kernel_file(code)
    with pytest.raises(InputError, match=rf"mine\.py:{line}: .*{what}"):
        load_kernel(f"{file}:Mine")


def test_a_kernel_that_weights_name_is_code_only_if_the_user_named_it(kernel_file, tmp_path):
    file = kernel_file("(__import__('pathlib').Path(__file__).parent / 'ran').touch()\n" + SETTABLE)
    with pytest.raises(InputError, match="name it on the command line"):
        trusted_kernel(f"{file}:f:size=3", ["window", f"{file}:f", f"{file}:plain"])
    assert not (tmp_path / "ran").exists()
    assert trusted_kernel("window:size=4", []).keywords == {"size": 4}
    # Moved since then.
    assert called(trusted_kernel("elsewhere/mine.py:f:size=3", [f"{file}:f:size=3"]))[0] == 3


@pytest.mark.parametrize(
    "settings",
    [
        "3,size=3",
        "*(1,),size=3",
        "**{},size=3",
        "size=max",
        "size=print(1)",
        "size=1+q",
        "size=",
        "size=(1",
        "size=3 heads=2",
        "=3",
        "size=3)+f(cap=1",
        "size={[]: 1}",
        "size=3,size=4",
        f"size={'(' * 5000}",
        "size='\\0'\0",
    ],
)
def test_settings_that_cannot_be_read_are_refused(kernel_file, settings):
    spec = f"{kernel_file(SETTABLE)}:f:{settings}"
    with pytest.raises(InputError) as error:
        load_kernel(spec)
    assert str(error.value) == (
        f"{spec:.200}: expected settings as name=value,name=value, got {settings!r:.80}"
    )


def test_a_kernel_without_settings_says_so(kernel_file):
    for wrong in (f"{kernel_file(SETTABLE)}:plain:size=3", "sdpa:size=3"):
        with pytest.raises(InputError, match="expected settings of none, got 'size'"):
            load_kernel(wrong)


def test_an_unknown_name_is_refused_before_its_settings(kernel_file):
    with pytest.raises(InputError, match=r"or file.py:function, got 'windo'"):
        load_kernel("windo:size=3")
    with pytest.raises(InputError, match=r"mine.py: expected a function 'g', found f, plain$"):
        load_kernel(f"{kernel_file(SETTABLE)}:g:size=3")


def test_settings_of_kernels_that_declare_a_clause_and_of_objects(kernel_file):
    code = [
        "from tinyllama.lab.clauses import breaks",
        "@breaks('compile')",
        "def declaring(q, k, v, context, *, size=1): return size",
        "class Window:",
        "    def __call__(self, q, k, v, context, *, size=1): return size",
        "window = Window()",
    ]
    file = kernel_file("\n".join(code))
    model_free = load_kernel(f"{file}:declaring:size=5")
    assert isinstance(model_free, partial)
    assert model_free.keywords == {"size": 5}
    assert called(load_kernel(f"{file}:window:size=6")) == 6
    for name in ("declaring", "window"):
        with pytest.raises(InputError, match="expected settings size, got 'seize'"):
            load_kernel(f"{file}:{name}:seize=5")


def test_a_path_may_have_an_equals_sign(tmp_path):
    folder = tmp_path / "lr=3"
    folder.mkdir()
    (folder / "mine.py").write_text(SETTABLE)
    assert called(load_kernel(f"{folder}/mine.py:plain")) == "plain"
    assert called(load_kernel(f"{folder}/mine.py:f:size=3"))[0] == 3


# --- modules beside the file -----------------------------------------------------------------------------


@pytest.fixture
def clean_modules():
    """Removes the modules that a test's files imported."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


USES = "from {module} import scale\ndef f(q, k, v, context): return scale"


@pytest.mark.usefixtures("clean_modules")
def test_a_file_may_import_the_module_beside_it(kernel_file, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = list(sys.path)
    kernel_file("scale = 7", "beside_the_kernel.py")
    file = kernel_file(USES.format(module="beside_the_kernel"))
    assert called(load_kernel(f"{file}:f")) == 7
    assert sys.path == before
    # And after a file that fails, too.
    failing = kernel_file("import beside_the_kernel\n1 / 0", "failing.py")
    with pytest.raises(InputError, match="ZeroDivisionError"):
        load_kernel(f"{failing}:f")
    assert sys.path == before


@pytest.mark.usefixtures("clean_modules")
def test_it_is_found_from_another_folder_and_by_a_relative_path(kernel_file, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    kernel_file("scale = 8", "beside_too.py")
    kernel_file(USES.format(module="beside_too"))
    monkeypatch.chdir(tmp_path.parent)
    assert called(load_kernel(f"{tmp_path.name}/mine.py:f")) == 8


@pytest.mark.usefixtures("clean_modules")
def test_a_module_beside_the_file_hides_no_other(kernel_file, monkeypatch):
    # Removed from sys.modules, `secrets` is searched for again.
    kernel_file("1 / 0", "secrets.py")
    file = kernel_file("import secrets\ndef f(q, k, v, context): return secrets")
    monkeypatch.delitem(sys.modules, "secrets")
    found = called(load_kernel(f"{file}:f"))
    assert found.__file__ == secrets.__file__


@pytest.mark.usefixtures("clean_modules")
def test_two_files_have_each_their_own_module_beside_them(tmp_path):
    # `--attention old/mine.py:f new/mine.py:f`, to compare a kernel with what it was before.
    for number, name in enumerate(("old", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "helper_of_mine.py").write_text(f"scale = {number}")
        (tmp_path / name / "mine.py").write_text(USES.format(module="helper_of_mine"))
    kernels = [load_kernel(f"{tmp_path / name}/mine.py:f") for name in ("old", "new")]
    assert [called(kernel) for kernel in kernels] == [0, 1]
