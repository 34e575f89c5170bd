"""The command lines, as a user meets them: what they print, where, and with what exit status.

Most calls are made in this process, with a model that is loaded once. What belongs to the process itself
(signals, pipes, terminals, start-up) is tested on a process.
"""

import contextlib
import importlib.util
import io
import json
import os
import pty
import select
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tinyllama
from tests.shapes import tiny_config, tiny_model
from tinyllama.cli import options, terminal

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SCRIPT_NAMES = sorted(path.stem for path in SCRIPTS.glob("*.py"))
PROMPT = "The capital of France is"
PATIENCE = 120  # seconds, for a busy machine


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def loaded(smollm2_folder):
    return tinyllama.load(str(smollm2_folder))


@pytest.fixture
def run_script(monkeypatch, capfd):
    """Runs a script in this process; returns its exit status, stdout and stderr."""

    def run(name, *arguments, stdin=b""):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with pytest.raises(SystemExit) as exit:
            terminal.run(load_script(name).main)
        out, err = capfd.readouterr()
        return exit.value.code, out, err

    return run


@pytest.fixture
def preloaded(monkeypatch, loaded):
    """Scripts get the loaded model, whatever they ask for."""
    monkeypatch.setattr(options, "load", lambda *args: loaded)
    return loaded


def command(name, *arguments):
    return [sys.executable, str(SCRIPTS / f"{name}.py"), *arguments]


def continuation(loaded, count, prompt=PROMPT, **settings):
    """The text of the prompt and its new ids."""
    model, tokenizer = loaded
    ids = tokenizer.encode(prompt)
    (new_ids,) = tinyllama.generate(model, [ids], max_new_tokens=count, **settings)
    return tokenizer.decode(ids + new_ids, skip_special=True)


# --- all scripts -----------------------------------------------------------------------------------------


def test_no_script_hides_a_module_of_the_standard_library():
    assert "generate" in SCRIPT_NAMES
    assert not sys.stdlib_module_names.intersection(SCRIPT_NAMES)


@pytest.mark.parametrize("name", SCRIPT_NAMES)
def test_help_shows_examples_and_does_not_wait_for_torch(name):
    code = (
        "import runpy, sys, atexit; sys.argv = [sys.argv[1], '--help'];"
        "atexit.register(lambda: sys.stderr.write('slow' if 'torch' in sys.modules else ''));"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(SCRIPTS / f"{name}.py")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"examples:\n  python scripts/{name}.py" in done.stdout


# --- generate --------------------------------------------------------------------------------------------


def test_a_prompt_is_continued_from_an_argument_a_file_or_stdin(run_script, preloaded, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n", encoding="utf-8")
    expected = (0, continuation(preloaded, 4) + "\n", "")
    short = ("--max-new-tokens", "4")
    assert run_script("generate", PROMPT, *short) == expected
    assert run_script("generate", "--file", str(file), *short) == expected
    assert run_script("generate", *short, stdin=PROMPT.encode()) == expected
    assert run_script("generate", "--file", "-", *short, stdin=f"{PROMPT}\n".encode()) == expected


def test_a_variant_or_a_kernel_of_ones_own_continues_a_prompt(run_script, smollm2_folder, loaded, tmp_path):
    # The same window, built in and out of a file; and another text than without it.
    kernel = tmp_path / "mine.py"
    kernel.write_text(
        "import tinyllama\n"
        "def near(q, k, v, context, size=2):\n"
        "    seen = context.mask\n"
        "    distance = seen.query_positions[:, None, :, None] - seen.key_positions[:, None, None, :]\n"
        "    return tinyllama.sdpa(q, k, v, context.where(distance < size))\n"
    )
    texts = []
    for spec in ("window:size=2", f"{kernel}:near"):
        status, out, err = run_script(
            "generate", PROMPT, "--model", "smollm2", "--attention", spec, "--max-new-tokens", "4"
        )
        assert (status, err) == (0, "")
        texts.append(out)
    assert texts[0] == texts[1] != continuation(loaded, 4) + "\n"


def test_an_output_can_be_a_prompt_again(run_script, preloaded):
    _, out, _ = run_script("generate", PROMPT, "--max-new-tokens", "2")
    assert run_script("generate", "--max-new-tokens", "0", stdin=out.encode()) == (0, out, "")


def test_no_new_tokens_is_the_prompt_alone(run_script, preloaded):
    assert run_script("generate", "--max-new-tokens", "0", "é ") == (0, "é \n", "")


def test_an_empty_prompt_is_bos_alone(run_script, preloaded):
    model, tokenizer = preloaded
    (new_ids,) = tinyllama.generate(model, [[tokenizer.bos_id]], max_new_tokens=3)
    expected = tokenizer.decode(new_ids, skip_special=True) + "\n"
    assert run_script("generate", "--max-new-tokens", "3", "") == (0, expected, "")


def test_an_empty_prompt_needs_a_bos(run_script, preloaded, monkeypatch):
    monkeypatch.setattr(preloaded[1], "bos_id", None)
    status, out, err = run_script("generate", "")
    assert (status, out) == (2, "")
    assert "no BOS" in err


def test_chat_prints_the_reply_alone(run_script, preloaded):
    model, tokenizer = preloaded
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
    (new_ids,) = tinyllama.generate(model, [tokenizer.chat(messages)], max_new_tokens=6)
    expected = tokenizer.decode(new_ids, skip_special=True) + "\n"
    arguments = ("--chat", "--system", "Be brief.", "--max-new-tokens", "6", "Hello!")
    assert run_script("generate", *arguments) == (0, expected, "")


def test_strict_chat_refuses_role_markers_where_plain_chat_warns_in_one_line(
    run_script, preloaded, monkeypatch
):
    # TinyLlama's template, whose role markers are plain text.
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s><|user|>{% endfor %}"
    monkeypatch.setattr(preloaded[1], "chat_template", template)
    status, out, err = run_script("generate", "--chat", "--max-new-tokens", "1", "<|user|> Hi")
    assert status == 0
    assert err.startswith("warning: chat: message 0 contains '<|user|>'")
    assert err.count("\n") == 1
    status, out, err = run_script("generate", "--chat", "--strict-chat", "<|user|> Hi")
    assert (status, out, err.count("\n")) == (2, "", 1)


def test_a_model_without_a_chat_template_cannot_chat(run_script, preloaded, monkeypatch):
    monkeypatch.setattr(preloaded[1], "chat_template", None)
    for arguments in (["generate", "--chat", "Hello!"], ["chat"]):
        status, out, err = run_script(*arguments)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "no chat template" in err


def test_a_seed_repeats_and_stats_show_the_one_that_was_drawn(run_script, preloaded):
    sampled = (PROMPT, "--temperature", "1.5", "--max-new-tokens", "6")
    status, first, err = run_script("generate", *sampled, "--stats")
    assert status == 0
    stats = dict(line.split(maxsplit=1) for line in err.splitlines())
    assert stats.keys() == {"load", "prompt", "new", "memory", "seed", "ended"}
    assert stats["prompt"].startswith("5 tokens, ")
    assert stats["new"].startswith("6 tokens, ")
    assert stats["ended"] == "by length"
    assert run_script("generate", *sampled, "--seed", stats["seed"]) == (0, first, "")


def test_a_stop_string_ends_the_text_before_it(run_script, preloaded):
    text = continuation(preloaded, 12)
    stop = text[len(PROMPT) + 8 : len(PROMPT) + 14]
    before = text[: text.index(stop)]
    arguments = (PROMPT, "--max-new-tokens", "12", "--stop", "never said", "--stop", stop)
    assert run_script("generate", *arguments) == (0, before + "\n", "")


def test_a_full_context_stops_with_a_note(run_script, monkeypatch, loaded):
    tokenizer = loaded[1]
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=8)
    monkeypatch.setattr(options, "load", lambda *args: (model, tokenizer))
    status, _, err = run_script("generate", PROMPT)
    assert (status, err) == (0, "stopped: the context of 8 tokens is full\n")
    status, out, err = run_script("generate", f"{PROMPT} {PROMPT}")
    assert (status, out) == (2, "")
    assert err == "error: prompt: 10 tokens do not fit the context of 8; shorten it\n"


def test_nan_logits_keep_the_text_so_far(run_script, preloaded):
    steps = []

    def spoil(module, inputs, logits):
        steps.append(1)
        return logits * float("nan") if len(steps) == 4 else None

    hook = preloaded[0].lm_head.register_forward_hook(spoil)
    status, out, err = run_script("generate", PROMPT)
    hook.remove()
    assert (status, out) == (1, continuation(preloaded, 3) + "\n")
    assert err.startswith("error: the model gave NaN or infinite logits")
    assert err.count("\n") == 1


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
        (["--seed", "-1", "x"], b"", "--seed: expected 0 to 2^64 - 1, got -1"),
        (["--stop", "", "x"], b"", "stop: expected"),
        (["--model", "no such model", "x"], b"", "model 'no such model'"),
        (["--dtype", "int8", "x"], b"", "--dtype"),
        (["--attention", "flash", "x"], b"", "attention: expected eager, sdpa, window"),
        (["--file", "no-such-file"], b"", "no-such-file: cannot be read"),
        (["--file", "x", "x"], b"", "not both"),
        (["--system", "x", "x"], b"", "needs --chat"),
        (["--chat", " "], b"", "empty prompt"),
        (["\udcff"], b"", "lone surrogate"),
        (["--no-such\x1b[31m"], b"", "unrecognized arguments: --no-such\\x1b"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run_script, monkeypatch, loaded, arguments, stdin, expected):
    if not {"--model", "--attention"} & set(arguments):
        monkeypatch.setattr(options, "load", lambda *args: loaded)
    status, out, err = run_script("generate", *arguments, stdin=stdin)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert expected in err
    assert err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded():
    line = command("generate", "--device", "cuda", "--model", "no such model", "x")
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: device: cuda was asked for")
    assert done.stderr.count("\n") == 1


def test_a_closed_pipe_is_quiet(smollm2_folder):
    process = subprocess.Popen(
        command("generate", "--model", "smollm2", PROMPT), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.read(1) == b"T"
    process.stdout.close()
    assert process.wait(PATIENCE) == 128 + signal.SIGPIPE
    assert process.stderr.read() == b""


def test_ctrl_c_keeps_the_text_so_far(loaded):
    process = subprocess.Popen(
        command("generate", "--model", "smollm2", PROMPT),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Where the tests run in the background, SIGINT is ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    start = process.stdout.read(len(PROMPT) + 1)  # streamed: these come while the rest is computed
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=PATIENCE)
    text = (start + rest).decode()
    assert (process.returncode, err) == (128 + signal.SIGINT, b"")
    assert text.endswith("\n")
    assert (continuation(loaded, 20) + "\n").startswith(text[:-1])


# --- chat ------------------------------------------------------------------------------------------------


def chat_reply(loaded, count, *texts):
    """The messages of a conversation that goes on from no cache at each turn."""
    model, tokenizer = loaded
    messages = []
    for text in texts:
        messages.append({"role": "user", "content": text})
        (new_ids,) = tinyllama.generate(model, [tokenizer.chat(messages)], max_new_tokens=count)
        messages.append({"role": "assistant", "content": tokenizer.decode(new_ids, skip_special=True)})
    return messages


def test_a_piped_chat_prints_the_replies_alone_and_can_be_saved_and_loaded(run_script, preloaded, tmp_path):
    file = tmp_path / "chat.json"
    lines = f"Hello!\n\nGo on.\n/save {file}\n/stats\n".encode()
    status, out, err = run_script("chat", "--max-new-tokens", "5", stdin=lines)
    messages = chat_reply(preloaded, 5, "Hello!", "Go on.")
    assert status == 0
    assert out == f"{messages[1]['content']}\n{messages[3]['content']}\n"
    assert json.loads(file.read_text(encoding="utf-8")) == messages
    assert f"4 messages are in {file}\n" in err
    assert "of them in the cache already" in err

    other = tmp_path / "other.json"
    lines = f"/load {file}\n/save {other}\n/reset\n/save! {other}\n/exit\nnot read\n".encode()
    status, out, err = run_script("chat", stdin=lines)
    assert (status, out) == (0, "")
    assert json.loads(other.read_text(encoding="utf-8")) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat.json", "other.json"]


def test_a_chat_file_is_not_overwritten_unasked(run_script, preloaded, tmp_path):
    file = tmp_path / "chat.json"
    file.write_text("mine", encoding="utf-8")
    status, _, err = run_script("chat", stdin=f"/save {file}\n".encode())
    assert status == 2
    assert "exists already; /save! overwrites it" in err
    assert file.read_text(encoding="utf-8") == "mine"


def test_the_system_message_of_a_chat_can_be_changed(run_script, preloaded, tmp_path):
    file = tmp_path / "chat.json"
    lines = f"/system Be kind.\n/save {file}\n/reset\n/save! {file}\n/system\n/save! {file}.2\n".encode()
    assert run_script("chat", "--system", "Be brief.", stdin=lines)[0] == 0
    assert json.loads(file.read_text(encoding="utf-8")) == [{"role": "system", "content": "Be kind."}]
    assert json.loads(Path(f"{file}.2").read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"/nonsense", "/nonsense: no such command"),
        (b"/save", "expected a file name"),
        (b"/save /no/such/folder/chat.json", "cannot be written"),
        (b"/load", "expected a file name"),
        (b"/load no-such-file", "cannot be read"),
        (b"/load " + __file__.encode(), "not readable as JSON"),
        (b"ok?\xff", "stdin: byte 9 (0xff) is not UTF-8"),
    ],
)
def test_bad_chat_lines_end_a_piped_chat_with_status_2(run_script, preloaded, line, expected):
    status, _, err = run_script("chat", stdin=b"/help\n" + line + b"\n")
    assert status == 2
    error = err.splitlines()[-1]
    assert error.startswith("error: ")
    assert expected in error


def test_loaded_messages_are_checked(run_script, preloaded, tmp_path):
    file = tmp_path / "chat.json"
    file.write_text('[{"role": "user"}]', encoding="utf-8")
    status, _, err = run_script("chat", stdin=f"/load {file}\n".encode())
    assert status == 2
    assert "expected a list of objects with role and content" in err


class Terminal:
    """A script on a terminal of its own."""

    def __init__(self, line, **environment):
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

    def expect(self, text):
        """Read until the text appears after what was expected before."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.screen:
            assert time.monotonic() < deadline, f"{text!r} is not in {self.screen!r}"
            if select.select([self.master], [], [], 1)[0]:
                self.screen += os.read(self.master, 4096).decode()
        self.screen = self.screen.partition(text)[2]

    def press_ctrl_c_until(self, done):
        """Press Ctrl-C, and again if nothing comes of it: readline misses one as it begins to wait."""
        for _ in range(50):
            self.send("\x03")
            deadline = time.monotonic() + PATIENCE / 50
            while time.monotonic() < deadline:
                if done():
                    return
                if select.select([self.master], [], [], 0.1)[0]:
                    with contextlib.suppress(OSError):  # the script has ended, and its terminal with it
                        self.screen += os.read(self.master, 4096).decode()
        pytest.fail(f"Ctrl-C did nothing: {self.screen!r}")


def test_a_chat_at_a_terminal(loaded, tmp_path):
    reply = chat_reply(loaded, 2, "Tell me a long story.")[1]["content"]
    chat = Terminal(command("chat", "--model", "smollm2"), XDG_STATE_HOME=str(tmp_path), TERM="dumb")
    chat.expect("/help lists the commands")
    chat.expect("> ")
    chat.send("Tell me a long story.\n")
    chat.expect(reply)
    chat.send("\x03")  # stops the reply only
    chat.expect("stopped")
    chat.expect("> ")
    chat.send("/nonsense\n")
    chat.expect("error: /nonsense: no such command")
    chat.expect("> ")
    chat.send("/stats\n")
    chat.expect("ended by Ctrl-C")
    chat.expect("> ")
    chat.send("\x1b[A\n")  # arrow up: /stats again
    chat.expect("ended by Ctrl-C")
    chat.expect("> ")
    chat.press_ctrl_c_until(lambda: "once more" in chat.screen)
    chat.press_ctrl_c_until(lambda: chat.process.poll() is not None)
    assert chat.process.returncode == 128 + signal.SIGINT
    os.close(chat.master)
    history = tmp_path / "tinyllama" / "chat_history"
    assert "/stats" in history.read_text(encoding="utf-8")
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


# --- summary ---------------------------------------------------------------------------------------------


def test_tinyllama_is_summarised_without_weights_or_network(run_script, monkeypatch):
    monkeypatch.setattr(tinyllama.checkpoints.hub, "on_disk", lambda repo_id: None)
    monkeypatch.setattr(tinyllama.checkpoints.download, "ask_hub", None)
    status, out, err = run_script("summary")
    assert (status, err) == (0, "")
    assert out.startswith("TinyLlama-1.1B (built-in config)\n")
    assert "(0-21): 22 x Block(" in out
    assert "1,100,048,384" in out
    assert max(map(len, out.splitlines())) <= 80

    figures = json.loads(run_script("summary", "--json")[1])
    assert figures["parameters"]["total"] == sum(figures["parameters"].values()) / 2 == 1_100_048_384
    assert figures["weight_bytes"]["bfloat16"] == 2_200_096_768
    # 2 (keys and values) x 22 layers x 64 x 2 bytes x heads
    cache = figures["kv_cache_bytes"]
    assert [cache[name]["bfloat16 token"] for name in ("this model", "MHA", "MQA")] == [22528, 180224, 5632]
    assert cache["this model"]["bfloat16 context"] == 22528 * 2048
    assert list(figures["flops_per_token"]) == ["1", "1024", "2048"]


def test_a_folder_and_its_config_have_the_same_summary(run_script, smollm2_folder):
    by_folder = json.loads(run_script("summary", str(smollm2_folder), "--json")[1])
    by_file = json.loads(run_script("summary", str(smollm2_folder / "config.json"), "--json")[1])
    by_name = json.loads(run_script("summary", "smollm2", "--json")[1])
    assert by_folder.pop("model") == by_name.pop("model")
    by_file.pop("model")
    assert by_folder == by_file == by_name
    # A tied head is no parameter of its own, and works all the same.
    assert by_folder["parameters"]["head"] == 0
    assert by_folder["parameters"]["total"] == 134_515_008
    assert by_folder["flops_per_token"]["1"] > 2 * by_folder["parameters"]["total"] - 10**6


@pytest.mark.parametrize("keys", [1, 100, 256])
def test_flops_are_those_that_pytorch_counts(keys):
    summary = load_script("summary")
    config = tiny_config()
    model = summary.skeleton(config, "tiny").to("meta")
    model.set_attention(tinyllama.eager)
    cache = tinyllama.KVCache(config, 1, 256, dtype=torch.float32, device="meta")
    position = torch.zeros(1, 1, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(position, cache.upto(keys), position)
    assert summary.flops(config, keys) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected at most"),
        ({"vocab_size": 10**18}, "vocab_size: expected"),
        ({"hidden_act": "gelu"}, "hidden_act: only 'silu' is implemented"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(run_script, tmp_path, config, expected):
    shape = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(shape | {"num_attention_heads": 2} | config), encoding="utf-8")
    status, out, err = run_script("summary", str(file))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert expected in err


def test_of_a_model_on_the_hub_the_config_alone_is_downloaded(run_script, monkeypatch, smollm2_folder):
    asked = []

    def download(repo_id, name, revision):
        asked.append((repo_id, name, revision))
        return str(smollm2_folder / "config.json")

    class Info:
        sha = "c0ffee"

    monkeypatch.setattr(tinyllama.checkpoints.hub, "on_disk", lambda repo_id: None)
    monkeypatch.setattr(tinyllama.checkpoints.download, "ask_hub", lambda repo_id, revision: Info)
    monkeypatch.setattr(tinyllama.checkpoints.download, "hf_hub_download", download)
    status, out, _ = run_script("summary", "some/model", "--json")
    assert (status, json.loads(out)["model"]) == (0, "some/model")
    assert asked == [("some/model", "config.json", "c0ffee")]


# --- decoding --------------------------------------------------------------------------------------------


def test_greedy_repeats_sampling_differs_and_a_seed_repeats(run_script, monkeypatch, loaded):
    tokenizer = loaded[1]
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    monkeypatch.setattr(options, "load", lambda *args: (model, tokenizer))
    arguments = ("--temperature", "2", "--top-k", "0", "--top-p", "1", "--max-new-tokens", "8")
    status, out, err = run_script("decoding", *arguments, "--json")
    assert (status, err) == (0, "")
    results = json.loads(out)
    identical = {name: way["identical"] for name, way in results["decoding"].items()}
    assert identical == {"greedy": True, "no seed": False, "seed": True}
    assert results["decoding"]["greedy"]["texts"][0] != results["decoding"]["seed"]["texts"][0]
    saved = [way["saved_bytes"] for way in results["passes"].values()]
    assert saved[0] > 0
    assert saved[1:] == [0, 0]
    again = json.loads(run_script("decoding", *arguments, "--json")[1])
    assert [way["saved_bytes"] for way in again["passes"].values()] == saved

    status, out, err = run_script("decoding", *arguments)
    assert (status, err) == (0, "")
    assert "greedy: identical" in out
    assert "no seed: different" in out
    assert "seed 42: identical" in out


def test_decoding_needs_a_temperature(run_script):
    status, out, err = run_script("decoding", "--temperature", "0")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "temperature: expected above 0" in err


def test_decoding_that_should_repeat_itself_and_does_not_is_reported(run_script, monkeypatch, loaded):
    tokenizer = loaded[1]
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    monkeypatch.setattr(options, "load", lambda *args: (model, tokenizer))
    noise = torch.Generator().manual_seed(0)
    model.lm_head.register_forward_hook(lambda *a: torch.randn(a[2].shape, generator=noise))
    status, out, _ = run_script("decoding", "--max-new-tokens", "4")
    assert status == 1
    assert "greedy: DIFFERENT" in out
    assert "seed 42: DIFFERENT" in out
