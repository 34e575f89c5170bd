"""The command lines, as a user meets them: what they print, where, and with what exit status.

Most calls are made in this process, on a tiny model with random weights. What belongs to a process itself
(signals, pipes, terminals, start-up) is tested on a process.
"""

import contextlib
import importlib.util
import io
import json
import os
import select
import signal
import stat
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

import tinyllama
from tests.marks import unix
from tests.shapes import TINY, tiny_config, tiny_model
from tests.text.tiny_tokenizers import sentencepiece_folder, write_json
from tinyllama.cli import terminal
from tinyllama.progress import TableConsole
from tinyllama.text.routes import TakenApart, TokenRow, first_difference

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SCRIPT_NAMES = sorted(path.stem for path in SCRIPTS.glob("*.py"))
PROMPT = "the cat sat on"
PATIENCE = 120  # seconds, for a busy machine

# TinyLlama's, whose role markers are plain text.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{% else %}<|{{ m.role }}|>{% endif %}"
    "{{ m.content }}{{ eos_token }}{% endfor %}<|assistant|>"
)

KERNELS = """
import torch
from tinyllama.attention import sdpa

def near(q, k, v, context, size=2):
    seen = context.mask
    distance = seen.query_positions[:, None, :, None] - seen.key_positions[:, None, None, :]
    return sdpa(q, k, v, context.where(distance < size))

def nan(q, k, v, context, at=0):
    return sdpa(q, k, v * (torch.nan if k.shape[2] >= at else 1), context)

def interrupt(q, k, v, context, at=0):
    if k.shape[2] >= at:
        raise KeyboardInterrupt
    return sdpa(q, k, v, context)

def noise(q, k, v, context):
    return torch.randn_like(q)
"""


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_script(monkeypatch, capfd):
    """Runs a script in this process; returns its exit status, stdout and stderr."""

    def run(name, *arguments, stdin=b""):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with pytest.raises(SystemExit) as exit:
            terminal.run(load_script(name).main)
        out, err = capfd.readouterr()
        return exit.value.code, out, err

    return run


def assert_refused(result, expected):
    """Exit status 2, nothing on stdout, and one line that contains this."""
    status, out, err = result
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert expected in err


def write_checkpoint(folder, tokenizer_config=None, **fields):
    """A folder with random weights and a small tokenizer; no id ends a text."""
    sentencepiece_folder(folder, **{"chat_template": TEMPLATE} | (tokenizer_config or {}))
    vocab_size = tinyllama.Tokenizer.from_folder(folder).vocab_size
    fields = {"vocab_size": vocab_size, "max_position_embeddings": 100_000, "eos_token_id": None} | fields
    write_json(folder / "config.json", TINY | fields)
    weights = tiny_model(**fields).state_dict()
    save_file(
        {name if name.startswith("lm_head") else f"model.{name}": w for name, w in weights.items()},
        folder / "model.safetensors",
    )
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def loaded(tiny):
    return tinyllama.load(str(tiny))


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    file = tmp_path_factory.mktemp("kernels") / "mine.py"
    file.write_text(KERNELS, encoding="utf-8")
    return file


def continuation(loaded, ids, count, **settings):
    """The text of new ids."""
    (new_ids,) = tinyllama.generate(loaded[0], [ids], max_new_tokens=count, **settings)
    return loaded[1].decode(ids + new_ids, skip_special=True)[len(loaded[1].decode(ids, skip_special=True)) :]


# --- all scripts -----------------------------------------------------------------------------------------


def test_no_script_hides_a_module_of_the_standard_library():
    assert "generate" in SCRIPT_NAMES
    assert not sys.stdlib_module_names.intersection(SCRIPT_NAMES)


def test_help_shows_examples_and_does_not_import_torch():
    code = """if True:
        import contextlib, io, runpy, sys
        for script in sys.argv[1:]:
            sys.argv = [script, "--help"]
            out = io.TextIOWrapper(io.BytesIO())
            with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
                runpy.run_path(script, run_name="__main__")
            out.seek(0)
            assert "examples:\\n  python scripts/" + script.split("/")[-1] in out.read(), script
            assert "torch" not in sys.modules, script
    """
    scripts = [str(SCRIPTS / f"{name}.py") for name in SCRIPT_NAMES]
    done = subprocess.run([sys.executable, "-c", code, *scripts], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def command(name, *arguments):
    return [sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, arguments)]


@unix
def test_a_closed_pipe_ends_a_script_quietly(tiny):
    line = command("tokens", "--model", tiny, "the cat " * 5000)
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(1) == b"0"
    process.stdout.close()
    assert process.wait(PATIENCE) == terminal.CLOSED_PIPE
    assert process.stderr.read() == b""


# --- generate --------------------------------------------------------------------------------------------


@pytest.fixture
def generate(run_script, tiny):
    """Runs generate.py on the tiny model for four tokens, unless told otherwise."""
    return partial(run_script, "generate", "--model", tiny, "--max-new-tokens", "4")


def test_the_prompt_comes_from_an_argument_a_file_or_stdin(generate, loaded, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n", encoding="utf-8")
    text = PROMPT + continuation(loaded, loaded[1].encode(PROMPT), 4)
    expected = (0, text + "\n", "")
    assert generate(PROMPT) == expected
    assert generate("--file", file) == expected
    assert generate(stdin=PROMPT.encode()) == expected
    assert generate("--file", "-", stdin=f"{PROMPT}\n".encode()) == expected
    # An output can be used as a prompt.
    assert generate("--max-new-tokens", "0", stdin=expected[1].encode()) == expected
    assert generate("--max-new-tokens", "0", "é ") == (0, "é \n", "")
    assert generate("-n", "0", "the", "cat") == (0, "the cat\n", "")  # not in quotes


def test_an_empty_prompt_is_bos_alone_and_needs_one(generate, run_script, loaded, tmp_path):
    text = continuation(loaded, [loaded[1].bos_id], 4)
    assert generate("") == (0, text + "\n", "")
    folder = write_checkpoint(tmp_path, {"bos_token": None, "add_bos_token": False})
    assert_refused(run_script("generate", "--model", folder, ""), "no BOS")


def test_a_kernel_from_a_file_computes_what_the_same_variant_does(generate, kernels):
    texts = [
        generate(PROMPT, "--attention", spec, "--max-new-tokens", "8")
        for spec in ("window:size=2", f"{kernels}:near", "sdpa")
    ]
    assert texts[0] == texts[1] != texts[2]


def test_chat_prints_the_reply_alone(generate, loaded):
    messages = [{"role": "system", "content": "sat"}, {"role": "user", "content": PROMPT}]
    text = continuation(loaded, loaded[1].chat(messages), 4)
    assert generate("--chat", "--system", "sat", PROMPT) == (0, text + "\n", "")


def test_strict_chat_refuses_role_markers_and_plain_chat_warns_in_one_line(generate):
    status, _, err = generate("--chat", "<|user|> Hi")
    assert (status, err.count("\n")) == (0, 1)
    assert err.startswith("warning: chat: message 0 contains '<|user|>'")
    assert_refused(generate("--chat", "--strict-chat", "<|user|> Hi"), "message 0 contains '<|user|>'")


@pytest.mark.usefixtures("one_thread")
def test_a_seed_repeats_and_stats_show_the_one_that_was_drawn(generate):
    sampled = (PROMPT, "--temperature", "1.5")
    status, first, err = generate(*sampled, "--stats")
    assert status == 0
    stats = dict(line.split(maxsplit=1) for line in err.splitlines())
    assert stats.keys() == {"load", "threads", "prompt", "new", "memory", "seed", "ended"}
    assert stats["new"].startswith("4 tokens, ")
    assert stats["ended"] == "by length"
    assert generate(*sampled, "--seed", stats["seed"]) == (0, first, "")
    assert "threads  2\n" in generate("--max-new-tokens", "0", "--stats", "--threads", "2", PROMPT)[2]


def test_a_stop_string_ends_the_text_before_it(generate, loaded):
    text = PROMPT + continuation(loaded, loaded[1].encode(PROMPT), 12)
    stop = text[-6:-3]
    arguments = (PROMPT, "--max-new-tokens", "12", "--stop", "never said", "--stop", stop)
    assert generate(*arguments) == (0, text[: text.index(stop)] + "\n", "")


def test_a_full_context_ends_the_text_with_a_note(run_script, tmp_path):
    folder = write_checkpoint(tmp_path, max_position_embeddings=8)
    status, _, err = run_script("generate", "--model", folder, PROMPT)
    assert (status, err) == (0, "stopped: the context of 8 tokens is full\n")
    assert_refused(run_script("generate", "--model", folder, PROMPT * 3), "do not fit the context of 8")


@pytest.mark.parametrize(
    ("kernel", "expected", "line"),
    [("nan", 1, "error: the model gave NaN or infinite logits"), ("interrupt", 128 + signal.SIGINT, "")],
)
def test_what_ends_a_text_early_keeps_the_text_so_far(generate, loaded, kernels, kernel, expected, line):
    ids = loaded[1].encode(PROMPT)
    text = continuation(loaded, ids, 2)
    # The last character is held back, because this stop string could start there.
    stop = ("--stop", text[-1] + "never said")
    status, out, err = generate(PROMPT, *stop, "--attention", f"{kernels}:{kernel}:at={len(ids) + 2}")
    assert (status, out) == (expected, PROMPT + text + "\n")
    assert err.startswith(line)
    assert err.count("\n") == bool(line)


@pytest.mark.parametrize(
    ("arguments", "stdin", "expected"),
    [
        ([], b"ab\xff", "stdin: byte 2 (0xff) is not UTF-8"),
        (["--temperature", "nan", "x"], b"", "temperature: expected"),
        (["--temperature", "-1", "x"], b"", "temperature: expected"),
        (["--top-p", "0", "x"], b"", "top_p: expected"),
        (["--top-k", "-1", "x"], b"", "--top-k: expected 0 or more, got -1"),
        (["--max-new-tokens", "-1", "x"], b"", "--max-new-tokens: expected 0 or more, got -1"),
        (["--repetition-penalty", "0", "x"], b"", "repetition_penalty: expected"),
        (["--seed", str(2**64), "x"], b"", f"--seed: expected 0 to {2**64 - 1}, got {2**64}"),
        (["--threads", "0", "x"], b"", "--threads: expected 1 or more, got 0"),
        (["--stop", "", "x"], b"", "stop: expected"),
        (["--model", "no such model", "x"], b"", "model 'no such model'"),
        (["--model", "no such model", "--device", "cuda:99", "x"], b"", "device: cuda:99 was asked for"),
        (["--graph", "x"], b"", "--graph is for --device cuda"),
        (["--dtype", "int8", "x"], b"", "--dtype"),
        (["--attention", "flash", "x"], b"", "attention: expected eager, sdpa, window"),
        (["--file", "no-such-file"], b"", "no-such-file: cannot be read"),
        (["--file", "x", "x"], b"", "not both"),
        (["--system", "x", "x"], b"", "needs --chat"),
        (["--chat", " "], b"", "empty prompt"),
        (["\udcff"], b"", "lone surrogate"),
        (
            ["--temprature=2", "x"],
            b"",
            "unrecognized arguments: --temprature=2; did you mean '--temperature'?",
        ),
        (["the", "--seed", "3", "cat"], b"", "unrecognized arguments: cat; quote the text"),
        (["--no-such\x1b[31m"], b"", "unrecognized arguments: --no-such\\x1b"),
    ],
)
def test_bad_input_is_one_line_and_status_2(generate, arguments, stdin, expected):
    assert_refused(generate(*arguments, stdin=stdin), expected)


def test_at_a_terminal_a_chat_model_is_said_to_be_one(generate, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "with --chat" in generate(PROMPT)[2]
    assert "with --chat" not in generate(PROMPT, "--chat")[2]


# --- chat ------------------------------------------------------------------------------------------------


@pytest.fixture
def chat(run_script, tiny):
    """Runs chat.py on the tiny model."""
    return partial(run_script, "chat", "--model", tiny, "--max-new-tokens", "5")


def test_a_piped_chat_prints_the_replies_alone_and_can_be_saved_and_loaded(chat, loaded, tmp_path):
    file, other = tmp_path / "chat.json", tmp_path / "other.json"
    status, out, err = chat(stdin=f"the cat\n\nsat\n/save {file}\n/stats\n".encode())
    messages = json.loads(file.read_text(encoding="utf-8"))
    assert [message["content"] for message in messages[::2]] == ["the cat", "sat"]
    replies = [message["content"] for message in messages[1::2]]
    assert replies == [continuation(loaded, loaded[1].chat(messages[:end]), 5) for end in (1, 3)]
    assert (status, out) == (0, "".join(f"{reply}\n" for reply in replies))
    assert f"4 messages are in {file}\n" in err
    assert "of them in the cache already" in err

    status, out, _ = chat(stdin=f"/load {file}\n/save {other}\n/exit\nnot read\n".encode())
    assert (status, out) == (0, "")
    assert other.read_bytes() == file.read_bytes()
    assert sorted(tmp_path.iterdir()) == [file, other]


def test_the_last_message_can_be_asked_again_or_taken_back(chat, loaded, tmp_path):
    file = tmp_path / "chat.json"
    lines = f"the cat\nsat\n/undo\n/set max-new-tokens 3\n/retry\n/save {file}\n/set\n"
    status, _, err = chat(stdin=lines.encode())
    messages = json.loads(file.read_text("utf-8"))
    assert status == 0
    assert [one["content"] for one in messages] == [
        "the cat",
        continuation(loaded, loaded[1].chat(messages[:1]), 3),
    ]
    assert err.endswith("temperature 0.0, max_new_tokens 3\n")


def test_the_system_message_can_be_changed_and_survives_a_reset(chat, tmp_path):
    file = tmp_path / "chat.json"
    lines = f"/system Be kind.\n/save {file}\n/reset\n/save! {file}\n/system\n/save! {file}.2\n".encode()
    assert chat("--system", "Be brief.", stdin=lines)[0] == 0
    assert json.loads(file.read_text(encoding="utf-8")) == [{"role": "system", "content": "Be kind."}]
    assert json.loads(Path(f"{file}.2").read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"/nonsense", "/nonsense: no such command"),
        (b"/undo", "nothing to undo"),
        (b"/retry", "nothing to undo"),
        (b"/set temprature 1", "got 'temprature'; did you mean 'temperature'?"),
        (b"/set temperature hot", "/set temperature: expected a number, got 'hot'"),
        (b"/set temperature -1", "expected 0 (greedy) or a finite number above"),
        (b"/set top-k -1", "/set top_k: expected 0 to 2^64 - 1, got -1"),
        (b"/save", "expected a file name"),
        (b"/save mine.json", "exists already; /save! overwrites it"),
        (b"/save /no/such/folder/chat.json", "cannot be written"),
        (b"/load", "expected a file name"),
        (b"/load no-such-file", "cannot be read"),
        (b"/load " + __file__.encode(), "not readable as JSON"),
        (b"/load mine.json", "expected a list of objects with role and content"),
        (b"ok?\xff", "stdin: byte 9 (0xff) is not UTF-8"),
    ],
)
def test_a_bad_line_ends_a_piped_chat_with_status_2(chat, tmp_path, monkeypatch, line, expected):
    monkeypatch.chdir(tmp_path)
    mine = '[{"role": "user"}]'
    Path("mine.json").write_text(mine, encoding="utf-8")
    status, _, err = chat(stdin=b"/help\n" + line + b"\n")
    assert status == 2
    error = err.splitlines()[-1]
    assert error.startswith("error: ")
    assert expected in error
    assert Path("mine.json").read_text(encoding="utf-8") == mine


def test_nan_logits_end_a_chat_with_status_1(chat, kernels):
    status, out, err = chat("--attention", f"{kernels}:nan", stdin=b"the cat\n")
    assert (status, out, err.count("\n")) == (1, "\n", 1)
    assert err.startswith("error: the model gave NaN or infinite logits")


def test_a_model_without_a_chat_template_cannot_chat(run_script, tmp_path):
    folder = write_checkpoint(tmp_path, {"chat_template": None})
    for arguments in (("generate", "--chat", "Hello!"), ("chat",)):
        assert_refused(run_script(*arguments, "--model", folder), "no chat template")


class Terminal:
    """A script on a terminal of its own."""

    def __init__(self, line, **environment):
        import pty

        self.master, slave = pty.openpty()

        def take_terminal():
            import fcntl
            import termios

            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.default_int_handler)

        self.process = subprocess.Popen(
            line,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=take_terminal,
            env=os.environ | environment,
        )
        os.close(slave)
        self.screen = ""

    def send(self, text):
        os.write(self.master, text.encode())

    def expect(self, text, press=""):
        """Read until the text appears after what was expected before.

        The keys are pressed again if nothing comes of it: readline misses a Ctrl-C as it begins to wait.
        """
        deadline = time.monotonic() + PATIENCE
        while text not in self.screen:
            assert time.monotonic() < deadline, f"{text!r} is not in {self.screen!r}"
            self.send(press)
            while text not in self.screen and select.select([self.master], [], [], 1)[0]:
                self.screen += os.read(self.master, 4096).decode(errors="replace")
        self.screen = self.screen.partition(text)[2]

    def leave(self):
        """Press Ctrl-C until the script ends, and return its status; too soon, a second one would kill it."""
        for _ in range(PATIENCE // 10):
            self.send("\x03")
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.process.wait(10)
        return None


@unix
def test_a_chat_at_a_terminal(tiny, loaded, tmp_path):
    reply = continuation(loaded, loaded[1].chat([{"role": "user", "content": "the cat"}]), 8)
    line = command("chat", "--model", tiny, "--max-new-tokens", "90000")
    # Without colours, and without questions to the terminal that nobody here answers.
    quiet = {"NO_COLOR": "1", "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
    chat = Terminal(line, XDG_STATE_HOME=str(tmp_path), **quiet)
    chat.expect("temperature 0.0, max_new_tokens 90000; /help lists the commands")
    chat.expect("> ")
    chat.send("the cat\r")
    chat.expect("the cat")  # the echo
    chat.expect(reply[:3])
    chat.send("\x03")  # stops the reply only
    chat.expect("stopped")
    chat.expect("> ")
    chat.send("/nonsense\r")
    chat.expect("error: /nonsense: no such command")
    chat.expect("> ")
    chat.send("/stats\r")
    chat.expect("ended by Ctrl-C")
    chat.expect("> ")
    chat.send("\x1b[A\r")  # arrow up: /stats again
    chat.expect("ended by Ctrl-C")
    chat.expect("> ")
    chat.send("/set max_new_tokens 3\r")
    chat.expect("temperature 0.0, max_new_tokens 3")
    chat.expect("> ")
    chat.send("\x1b[200~the mat\nsat\x1b[201~\r")  # a pasted text of two lines
    file = tmp_path / "said.json"
    chat.expect("> ")
    chat.send(f"/save {file}\r")
    chat.expect("4 messages are in")
    assert json.loads(file.read_text("utf-8"))[2]["content"] == "the mat\nsat"
    chat.expect("> ")
    chat.expect("once more leaves", press="\x03")
    chat.expect("> ")
    assert chat.leave() == 128 + signal.SIGINT
    os.close(chat.master)
    history = tmp_path / "tinyllama" / "chat_messages"
    assert "/stats" in history.read_text(encoding="utf-8")
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


# --- tokens ----------------------------------------------------------------------------------------------


def test_tokens_as_lines_can_be_piped(run_script, tiny, loaded):
    text = "the\tcat\n</s>"
    status, out, err = run_script("tokens", "--model", tiny, text)
    assert (status, err) == (0, "")
    *lines, route = out.splitlines()
    rows = [line.split("\t") for line in lines]
    ids = loaded[1].encode(text)
    assert [(int(position), int(index)) for position, index, *_ in rows] == list(enumerate(ids))
    assert bytes.fromhex("".join(row[3] for row in rows)) == b"<s> the\tcat\n</s>"
    assert [row[4] for row in rows] == ["special", *["text"] * (len(ids) - 2), "special"]
    assert route == f"# without BOS: differs from 0 on: {' '.join(map(str, ids[1:]))}"


def test_a_chat_taken_apart_shows_origins_and_the_other_routes(run_script, tiny, loaded):
    arguments = ("--chat", "--system", "sat", "--json", "a </s> hat")
    found = json.loads(run_script("tokens", "--model", tiny, *arguments)[1])
    messages = [{"role": "system", "content": "sat"}, {"role": "user", "content": "a </s> hat"}]
    assert found["text"] == "<|system|>sat</s><|user|>a </s> hat</s><|assistant|>"
    ids = [row["id"] for row in found["tokens"]]
    assert ids == loaded[1].chat(messages)
    typed = bytes.fromhex("".join(row["bytes"] for row in found["tokens"] if row["origin"] == "text"))
    assert typed == b"sata </s> hat"
    assert [row["piece"] for row in found["tokens"] if row["origin"] == "special"] == ["</s>"] * 2
    routes = {route["name"]: route for route in found["routes"]}
    assert routes["rendered, then encoded"]["ids"] == loaded[1].encode(found["text"])
    assert routes["rendered, then encoded"]["first_difference"] == 0
    # On this route the typed </s> becomes the special token.
    without = routes["rendered, then encoded without BOS"]
    assert without["ids"][without["first_difference"]] == loaded[1].eos_id


def test_the_table_of_tokens_shows_brackets_and_escapes_controls(capfd):
    row = TokenRow(0, 5, "[bold]\x1b[31m\u202e", "5b", "text", "[")
    TakenApart("", [row], []).show(TableConsole())
    assert "[bold]\\x1b[31m\\u202e" in capfd.readouterr().out


def test_the_first_difference_may_be_the_end_of_the_shorter():
    assert first_difference([5, 6], [5]) == 1
    assert first_difference([5, 6], [7, 6]) == 0
    assert first_difference([5, 6], [5, 6]) is None


# --- summary ---------------------------------------------------------------------------------------------


def test_tinyllama_is_summarised_without_weights(run_script):
    status, out, err = run_script("summary")
    assert (status, err) == (0, "")
    assert "(0-21): 22 x Block(" in out
    assert "1,100,048,384" in out
    assert max(map(len, out.splitlines()[1:])) <= 80

    figures = json.loads(run_script("summary", "--json")[1])
    assert figures["parameters"]["total"] == sum(figures["parameters"].values()) / 2 == 1_100_048_384
    assert figures["weight_bytes"]["bfloat16"] == 2_200_096_768
    # 2 (keys and values) x 22 layers x 64 x 2 bytes x heads
    cache = figures["kv_cache_bytes"]
    assert [cache[name]["bfloat16 token"] for name in ("this model", "MHA", "MQA")] == [22528, 180224, 5632]
    assert cache["this model"]["bfloat16 context"] == 22528 * 2048
    assert list(figures["flops_per_token"]) == ["1", "1024", "2048"]


def test_the_parts_of_several_ranks_are_summarised(run_script):
    status, out, err = run_script("summary", "--ranks", "8")
    assert (status, err) == (0, "")
    last = ["7", "1536-2047", "192-255", "1792-2047", "4928-5631", "1792-2047", "28000-31999"]
    assert last in [line.split() for line in out.splitlines()]
    figures = json.loads(run_script("summary", "--ranks", "2", "--split", "fast", "--json")[1])["ranks"]
    assert figures["weights"]["layers.21.mlp.down_proj.weight"] == {
        "axis": 1,
        "parts": [[0, 2816], [2816, 5632]],
    }
    assert sum(figures["parameters"]) == 1_100_048_384 + (2 * 22 + 1) * 2048  # norms twice
    assert_refused(run_script("summary", "--ranks", "2049"), "ranks: expected 1 to 2048")


def test_the_stages_of_a_pipeline_are_summarised(run_script):
    status, out, _ = run_script("summary", "--ranks", "4", "--pipeline", "2")
    assert status == 0
    rows = [line.split() for line in out.splitlines()]
    assert ["2", "0-1023", "0-127", "0-1023", "0-2815", "0-1023", "16000-23999"] in rows
    assert ["2", "11-21", "275,036,160"] in [row[:3] for row in rows]
    assert ["float32", "396,032"] in rows
    assert_refused(
        run_script("summary", "--ranks", "3", "--pipeline", "2"), "pipeline: expected 1 to 22 stages"
    )


def test_a_name_a_folder_and_its_config_have_the_same_summary(run_script, smollm2_folder):
    names = ("smollm2", smollm2_folder, smollm2_folder / "config.json")
    figures = [json.loads(run_script("summary", name, "--json")[1]) for name in names]
    assert [each.pop("model") for each in figures] == list(map(str, (smollm2_folder, *names[1:])))
    assert figures[0] == figures[1] == figures[2]
    # A tied head has no parameters of its own, but it is computed.
    assert figures[0]["parameters"]["head"] == 0
    assert figures[0]["parameters"]["total"] == 134_515_008
    assert figures[0]["flops_per_token"]["1"] > 2 * figures[0]["parameters"]["total"] - 10**6


@pytest.mark.parametrize("keys", [1, 256])
def test_flops_are_those_that_pytorch_counts(keys):
    summary = load_script("summary")
    config = tiny_config()
    model = summary.skeleton(config, "tiny").to("meta")
    model.set_attention(tinyllama.eager)
    cache = tinyllama.KVCache(config, 1, 256, dtype=torch.float32, device="meta")
    position = torch.zeros(1, 1, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(position, cache.first(keys), position)
    assert summary.flops(config, keys) == counter.get_total_flops()


def test_a_config_that_cannot_be_built_is_refused(run_script, tmp_path):
    shape = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    write_json(tmp_path / "config.json", shape | {"num_hidden_layers": 10**9})
    assert_refused(run_script("summary", tmp_path / "config.json"), "num_hidden_layers: expected at most")


def test_only_the_config_of_a_model_on_the_hub_is_downloaded(run_script, monkeypatch, smollm2_folder):
    class Info:
        sha = "c0ffee"

    def download(repo_id, name, revision):
        assert (repo_id, name, revision) == ("some/model", "config.json", "c0ffee")
        return str(smollm2_folder / "config.json")

    monkeypatch.setattr(tinyllama.checkpoints.download, "ask_hub", lambda repo_id, revision: Info)
    monkeypatch.setattr(tinyllama.checkpoints.download, "hf_hub_download", download)
    status, out, _ = run_script("summary", "some/model", "--json")
    assert (status, json.loads(out)["model"]) == (0, "some/model")


# --- decoding --------------------------------------------------------------------------------------------


def test_greedy_repeats_sampling_differs_and_a_seed_repeats(run_script, tiny, loaded):
    arguments = ("--temperature", "2", "--top-k", "0", "--top-p", "1", "--max-new-tokens", "8")
    status, out, err = run_script("decoding", "--model", tiny, *arguments, "--json")
    assert (status, err) == (0, "")
    results = json.loads(out)
    identical = {name: pair["identical"] for name, pair in results["decoding"].items()}
    assert identical == {"greedy": True, "no seed": False, "seed": True}
    assert results["decoding"]["greedy"]["texts"][0] != results["decoding"]["seed"]["texts"][0]
    saved = [cost["saved_bytes"] for cost in results["passes"].values()]
    # The weights would make it more.
    assert 0 < saved[0] < sum(weight.nbytes for weight in loaded[0].parameters())
    assert saved[1:] == [0, 0]

    status, out, err = run_script("decoding", "--model", tiny, *arguments)
    assert (status, err) == (0, "")
    assert "greedy: identical" in out
    assert "no seed: different" in out
    assert "seed 42: identical" in out
    assert f"{saved[0]:,} bytes" in out  # the same in every run


def test_decoding_that_should_repeat_itself_and_does_not_is_reported(run_script, tiny, kernels):
    arguments = ("--model", tiny, "--attention", f"{kernels}:noise", "--max-new-tokens", "4")
    status, out, _ = run_script("decoding", *arguments)
    assert status == 1
    assert "greedy: DIFFERENT" in out
    assert "seed 42: DIFFERENT" in out


def test_decoding_needs_a_temperature(run_script):
    assert_refused(run_script("decoding", "--temperature", "0"), "temperature: expected above 0")
