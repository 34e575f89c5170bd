"""What is tried: for each kind of input a strategy for cases, over a sound base folder."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tests.checkpoints import folders
from tests.fuzz.judge import Command
from tests.fuzz.values import TEXTS, damaged, edited, header_edited, hostile, joined, message_edited
from tests.text.tiny_tokenizers import json_definition, sentencepiece_folder, write_json
from tinyllama.lab.healed import KEY, Healed, Settings, save_healed

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
SHORT = ("--weights", "exact", "--threads", "1", "--device", "cpu", "--max-new-tokens", "3")
GENERATE = ("generate", "--model", "model", *SHORT, "a b")
TOKENS = ("tokens", "--model", "model", "a b é<s>")
SAVED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a b"}]


@dataclass(frozen=True)
class Case:
    """One thing to try: a command in a folder where some files differ from the sound ones."""

    kind: str
    argv: tuple[str, ...]
    files: dict[str, bytes] = field(default_factory=dict)
    stdin: bytes = b""

    def to_json(self) -> dict[str, Any]:
        """As it is kept in cases/."""
        files = {name: base64.b85encode(content).decode() for name, content in self.files.items()}
        return {"kind": self.kind, "argv": self.argv, "files": files, "stdin": self.stdin.decode("latin-1")}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Case:
        """What `to_json` gave."""
        files = {name: base64.b85decode(content) for name, content in values["files"].items()}
        return Case(values["kind"], tuple(values["argv"]), files, values["stdin"].encode("latin-1"))

    def command(self, sound: Path, folder: Path) -> Command:
        """Lay its files out in a new folder."""
        shutil.copytree(sound, folder)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return Command(self.argv, str(folder), self.stdin)


def make_sound(folder: Path) -> None:
    """Two tiny checkpoints, one with each kind of tokenizer, a text, healed layers and a conversation."""
    (folder / "pieces").mkdir(parents=True)
    sentencepiece_folder(folder / "pieces")
    torch.manual_seed(0)
    for name, vocabulary in (("model", 266), ("pieces", 300)):
        tensors = {
            name: torch.randn(vocabulary, 16) if 64 in tensor.shape else tensor
            for name, tensor in folders.weights().items()
        }
        folders.write(folder / name, tensors, vocab_size=vocabulary, max_position_embeddings=256)
        write_json(folder / name / "tokenizer_config.json", CONFIG | {"chat_template": TEMPLATE})
    write_json(folder / "model" / "tokenizer.json", json_definition())
    write_json(folder / "model" / "generation_config.json", {"eos_token_id": [2]})
    (folder / "text.txt").write_text("a b ab " * 60)
    write_json(folder / "saved.json", SAVED)
    own = {
        f"layers.{layer}.self_attn.{part}_proj.weight": torch.zeros(heads * 4, 16)
        for layer in (0, 1)
        for part, heads in (("q", 4), ("k", 2), ("v", 2), ("o", 4))
    }
    save_healed(folder / "healed", Healed(Settings("window:size=4", None, None, "x"), (3.0,), own, {}))


def kinds(sound: Path) -> dict[str, SearchStrategy[Case]]:
    """The strategies by name, over one sound folder."""

    def json_file(name: str, extra: Sequence[str], *commands: tuple[str, ...]) -> SearchStrategy[Case]:
        tree = json.loads((sound / name).read_bytes())
        return st.builds(
            lambda text, argv: Case(Path(name).name, argv, {name: text}),
            edited(tree, extra),
            st.sampled_from(commands),
        )

    def file(kind: str, name: str, strategy: Any, argv: tuple[str, ...]) -> SearchStrategy[Case]:
        content = (sound / name).read_bytes()
        return st.one_of(strategy(content), damaged(content)).map(lambda new: Case(kind, argv, {name: new}))

    pieces = tuple("pieces" if word == "model" else word for word in TOKENS)
    return {
        "config": json_file("model/config.json", CONFIG_FIELDS, GENERATE, ("summary", "model")),
        "generation config": json_file("model/generation_config.json", (), GENERATE),
        "weights": file("weights", "model/model.safetensors", header_edited, GENERATE),
        "index": index(),
        "tokenizer.json": json_file("model/tokenizer.json", ("truncation",), TOKENS, GENERATE),
        "tokenizer.model": file("tokenizer.model", "pieces/tokenizer.model", message_edited, pieces),
        "tokenizer config": st.one_of(
            json_file("model/tokenizer_config.json", TOKENIZER_FIELDS, (*TOKENS, "--chat"), TOKENS),
            json_file("pieces/tokenizer_config.json", TOKENIZER_FIELDS, (*pieces, "--chat"), pieces),
        ),
        "template": template(),
        "conversation": conversation(),
        "healed": st.one_of(file("healed", "healed", header_edited, HEALED), healed(sound)),
        "gguf": gguf(),
        "command line": command_line(),
        "kernel": kernel(),
        "compiled": compiled(),
    }


def index() -> SearchStrategy[Case]:
    """The index of a checkpoint in shards: here one, the whole file."""
    shards = dict.fromkeys(folders.weights(), "model.safetensors")
    return edited({"metadata": {"total_size": 1}, "weight_map": shards}, ("weight_map",)).map(
        lambda text: Case("index", GENERATE, {"model/model.safetensors.index.json": text})
    )


def template() -> SearchStrategy[Case]:
    """Chat templates made of pieces, some of which never end or fill the memory."""
    return st.builds(
        lambda parts, chat: Case(
            "template",
            ("chat", "--model", "model", *SHORT) if chat else (*TOKENS, "--chat"),
            {"model/chat_template.jinja": "".join(parts).encode("utf-8", "surrogatepass")},
            b"a\n" if chat else b"",
        ),
        st.lists(st.one_of(st.sampled_from(JINJA), st.sampled_from(TEXTS)), min_size=1, max_size=5),
        st.booleans(),
    )


def conversation() -> SearchStrategy[Case]:
    """What is typed to chat.py, and a conversation that it loads."""
    verb = st.sampled_from(["/load ", "/save ", "/save! ", "/system ", "/stats", "/reset", "/x ", ""])
    name = st.sampled_from([*NAMES, *TEXTS])
    lines = st.lists(joined(verb, name), min_size=1, max_size=4).map("\n".join)
    return st.builds(
        lambda text, typed: Case(
            "conversation",
            ("chat", "--model", "model", *SHORT),
            {"saved.json": text},
            typed.encode("utf-8", "surrogatepass"),
        ),
        edited(SAVED, ("tool_calls", "name")),
        st.one_of(st.just("/load saved.json\na\n"), lines),
    )


def healed(sound: Path) -> SearchStrategy[Case]:
    """Healed layers with edits in their record, which is JSON in a text of the header's JSON."""
    content = (sound / "healed").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    record = json.loads(header["__metadata__"][KEY])

    def case(text: bytes, argv: tuple[str, ...]) -> Case:
        changed = header | {"__metadata__": {KEY: text.decode("utf-8", "replace")}}
        return Case("healed", argv, {"healed": folders.file_of(changed, content[8 + size :])})

    return st.builds(case, edited(record, ("settings", "losses")), st.sampled_from([HEALED, HEALED_ON]))


def gguf() -> SearchStrategy[Case]:
    """A file in place of a folder."""
    start = b"GGUF\x03\0\0\0" + b"\x01\0\0\0\0\0\0\0" * 2

    def case(name: str, content: bytes, script: str) -> Case:
        rest = ("--", f"./{name}") if script == "summary" else ("--model", f"./{name}")
        prompt = ("a",) if script in ("generate", "tokens") else ()
        return Case("gguf", (script, *rest, *prompt), {name: content})

    return st.builds(
        case,
        st.sampled_from(["x.gguf", "model.safetensors", "x", "[bold].gguf", "\x1b[2J.gguf"]),
        st.one_of(st.just(start), damaged(start)),
        st.sampled_from(["generate", "tokens", "summary", "chat"]),
    )


def command_line() -> SearchStrategy[Case]:
    """Options with values that nobody would give, for every quick script."""
    number = hostile.filter(lambda value: isinstance(value, int | float) and abs(value) < 1e300).map(str)
    value = st.one_of(st.sampled_from(WORDS), st.sampled_from(TEXTS), number)
    option = st.tuples(st.sampled_from(OPTIONS), st.lists(value, max_size=2)).map(lambda o: [o[0], *o[1]])

    def case(script: str, options: list[list[str]], last: list[str]) -> Case:
        words = [script, *DEFAULTS.get(script, ()), *(word for each in options for word in each), *last]
        # What a command line can hold.
        argv = (word.encode("utf-8", "replace").decode().replace("\0", "") for word in words)
        return Case("command line", tuple(argv), stdin=b"a b\n")

    return st.builds(
        case,
        st.sampled_from([*DEFAULTS, "summary", "nothing"]),
        st.lists(option, max_size=3),
        st.lists(value, max_size=2),
    )


def kernel() -> SearchStrategy[Case]:
    """A file with a kernel that is wrong."""
    source = st.builds(
        lambda head, start, result: (
            f"import torch\nfrom tinyllama import eager\n{head}\n{start}\n    return {result}\n".encode()
        ),
        st.sampled_from(KERNEL_HEADS),
        st.sampled_from(KERNEL_STARTS),
        st.sampled_from(KERNEL_RESULTS),
    )
    return st.builds(
        lambda text, setting, weights: Case(
            "kernel",
            ("generate", "--attention", f"k.py:f{setting}", *GENERATE[1:], "--weights", weights),
            {"k.py": text},
        ),
        st.one_of(source, source.flatmap(damaged)),
        st.sampled_from(["", ":at=1", ":at=x", ":size=3", ":at=1e999", ":at=", ":=1", ":at=1:at=2"]),
        st.sampled_from(["exact", "stored", "int8"]),
    )


def compiled() -> SearchStrategy[Case]:
    """Calls of the compiled operations, with tensors that fit and such that do not."""
    size = st.sampled_from([0, 1, 2, 31, 32, 33, 64, 65, 128, 200])
    tensor = st.fixed_dictionaries(
        {
            "shape": st.lists(size, min_size=0, max_size=3),
            "dtype": st.sampled_from(["float32", "bfloat16", "float16", "int8", "int64", "float64"]),
            "how": st.sampled_from(["plain", "transposed", "strided", "expanded", "meta"]),
        }
    )

    def plain(shape: list[int], dtype: str) -> dict[str, Any]:
        return {"shape": shape, "dtype": dtype, "how": "plain"}

    fitting = st.builds(
        lambda rows, cols, n, weights, x: {
            "weight": plain([rows, cols], weights),
            "x": plain([n, cols], x),
            "scales": plain([rows, cols // 64], "bfloat16"),
            "scaled": weights == "int8",
        },
        size,
        st.sampled_from([64, 128]),
        size,
        st.sampled_from(["float32", "bfloat16", "float16", "int8"]),
        st.sampled_from(["float32", "bfloat16"]),
    )

    def call(right: dict[str, Any], name: str, plain: bool, wrong: tuple[str, dict[str, Any]]) -> Case:
        which, change = wrong
        spec = {**right, "name": name, "plain": plain, which: {**right[which], **change}}
        return Case("compiled", ("tests.fuzz.compiled:call", json.dumps(spec)))

    # One thing is wrong, so that one check has to see it.
    changes = tensor.flatmap(
        lambda other: st.sampled_from(
            [{}, {"shape": other["shape"]}, {"dtype": other["dtype"]}, {"how": other["how"]}]
        )
    )
    return st.builds(
        call,
        fitting,
        st.sampled_from(["linear", "linear", "rms_norm"]),
        st.booleans(),
        st.tuples(st.sampled_from(["weight", "x", "scales"]), changes),
    )


CONFIG_FIELDS = """
    rope_scaling rope_parameters rope_theta head_dim sliding_window model_type torch_dtype eos_token_id
    bos_token_id tie_word_embeddings architectures hidden_act attention_bias quantization_config
    max_sequence_length partial_rotary_factor
""".split()  # noqa: SIM905
TOKENIZER_FIELDS = """
    chat_template added_tokens_decoder bos_token eos_token pad_token add_eos_token legacy
    add_prefix_space tokenizer_class model_max_length clean_up_tokenization_spaces
""".split()  # noqa: SIM905
NAMES = ["saved.json", "new.json", ".", "missing/f", "~no-such-user/f", "/dev/full", "/proc/x", "model"]
NAMES += ["", "x" * 300]
JINJA = [
    "{{ messages }}",
    "{{ messages[0].content }}",
    "{{ messages[9].content }}",
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if x %}",
    "{% endif %}",
    "{% for i in range(10**9) %}a{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * (6*10**9) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ 'a' | center(10**9) }}",
    "{{ 'a' | indent(10**9) }}",
    "{{ lipsum(10**7) }}",
    "{{ 7 ** (10 ** 7) }}",
    "{{ raise_exception('no') }}",
    "{{ raise_exception(7) }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('id') }}",
    "{% include 'x' %}",
    "{{ 1 // 0 }}",
    "{{ undefined.x.y }}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{{ '\\ud800' }}",
    "{{ '\\x1b]0;x' }}",
    "{% set x = [1] * 10**10 %}",
    "{{ tojson }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ strftime_now('%Y' * 10**6) }}",
    "{{ bos_token }}",
    "{% generation %}",
    "{% break %}",
    "{{",
    "}}",
    "{%",
]
KERNEL_HEADS = [
    "def f(q, k, v, context):",
    "def f(q, k, v, context, *, at: int = 0):",
    "def f(q, k, v):",
    "def f():",
    "def f(*a, **b):",
    "class f:",
    "async def f(q, k, v, context):",
    "f = 7\ndef g(q, k, v, context):",
    "class f(torch.nn.Module):\n  def forward(self, q, k, v, context):",
]
KERNEL_STARTS = [
    "    pass",
    "    raise SystemExit(0)",
    "    raise ValueError('\\x1b[2J')",
    "    class E(BaseException): pass\n    raise E('x')",
    "    return f(q, k, v, context)",
    "    raise MemoryError",
    "    import sys; sys.exit('no')",
    "    1 / 0",
    "    q.resize_(0)",
    "    context.mask = None",
    "    q = q.to('meta')",
    "    raise StopIteration",
]
KERNEL_RESULTS = (
    """
    eager(q, k, v, context)|None|q|k|7|torch.cat([q, q], 1)|q[:, :3]|q.int()|q.double()|q * float('nan')
    q.transpose(1, 2)|q[..., :0]|[q]|torch.zeros(1)|q.expand(2, -1, -1, -1)|torch.ones(1 << 34)|(q, None)
    context|lambda: q|q.to_sparse()
""".strip()
    .replace("\n    ", "|")
    .split("|")
)
OPTIONS = """
    --max-new-tokens --temperature --top-k --top-p --repetition-penalty --seed --speculate --stop
    --system --chat --strict-chat --stats --model --device --dtype --attention --threads --weights
    --graph --layers --heads --tokens --prompt --new-tokens --rounds --list --capture --json --html
    --file --text --healed --steps --out --save-every --batch --length --held-out --lr --nothing -h -- -
""".split()  # noqa: SIM905
WORDS = """
    model pieces missing a/b text.txt saved.json healed cpu cuda cuda:99 mps meta float16 int8 eager
    window window:size=2 window:size=-1 nothing:x=1 k.py k.py:f text.txt:f 0-99 3-1 1,,2 scores layers.0
    0 1 -1 2 0.5 1e999 nan inf
""".split()  # noqa: SIM905
LIGHT = ("--tokens", "16", "--rounds", "1", "--new-tokens", "2", "--text", "text.txt", "--prompt", "a")
HEALED = ("lab", "window:size=4", "--healed", "healed", "--model", "model", "--threads", "1", *LIGHT)
HEALED_ON = (
    "heal",
    "window:size=4",
    "--model",
    "model",
    "--text",
    "text.txt",
    "--steps",
    "2",
    "--out",
    "healed",
)
DEFAULTS: dict[str, tuple[str, ...]] = {
    "generate": ("--model", "model", *SHORT),
    "chat": ("--model", "model", *SHORT),
    "tokens": ("--model", "model"),
    "lab": ("--model", "model", "--threads", "1", *LIGHT),
    "heal": ("--model", "model", "--steps", "1", "--text", "text.txt", "--length", "8", "--batch", "1"),
    "explore": ("--model", "model", "--text"),
    "decoding": ("--model", "model", "--max-new-tokens", "3", "--temperature", "1"),
}
