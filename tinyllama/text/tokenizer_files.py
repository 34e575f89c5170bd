"""What a checkpoint folder says about its tokenizer: the vocabulary file, added tokens, chat template."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllama.checkpoints.files import AGAIN, read_bytes, read_json
from tinyllama.errors import InputError
from tinyllama.fields import MAX_INTEGER
from tinyllama.text.special_tokens import check_text

# Far above what real ones have: Llama 3.1's template has 4 kB, its longest special token 31 characters.
MAX_TEMPLATE_BYTES = 1 << 20
MAX_TOKEN_CHARACTERS = 1000


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer files of one folder, read but not yet interpreted.

    Attributes:
        model: the content of tokenizer.model; None if the folder has only tokenizer.json.
        json: the content of tokenizer.json; None if the folder has only tokenizer.model.
        config: the content of tokenizer_config.json; empty if there is none.
        chat_template: jinja2 source, None if there is none.
    """

    folder: Path
    model: bytes | None
    json: dict[str, Any] | None
    config: dict[str, Any]
    chat_template: str | None

    @classmethod
    def read(cls, folder: Path) -> TokenizerFiles:
        """Read a folder; raises InputError for files that are missing, unreadable or malformed."""
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; give a checkpoint folder with a tokenizer in it")
        model, definition, config = (
            folder / name for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")
        )
        if not model.exists() and not definition.exists():
            raise InputError(f"{folder}: no tokenizer, expected tokenizer.model or tokenizer.json; {AGAIN}")
        settings = read_json(config) if config.exists() else {}
        return cls(
            folder=folder,
            model=read_bytes(model) if model.exists() else None,
            json=read_json(definition) if definition.exists() else None,
            config=settings,
            chat_template=find_chat_template(folder, settings),
        )

    def setting(self, name: str) -> bool | None:
        """A true or false of tokenizer_config.json; None if it is absent or null."""
        value = self.config.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.config_error(f"{name} is {value!r:.80}, expected true or false")
        return value

    def named_token(self, name: str, default: str | None) -> str | None:
        """The text of `bos_token`, `eos_token`, ...; in the file a string, or an object with a "content"."""
        value = self.config.get(name, default)
        text = value.get("content") if isinstance(value, dict) else value
        if value is not None and not (isinstance(text, str) and text):
            raise self.config_error(f"{name} is {value!r:.80}, expected a string")
        if text is not None:
            check_token(text)
        return text

    def config_error(self, problem: str) -> InputError:
        """An error about tokenizer_config.json."""
        return InputError(f"{self.folder / 'tokenizer_config.json'}: {problem}; correct it")

    def added_tokens(self) -> dict[str, tuple[int, bool]]:
        """Text -> (id, special) of the tokens that are split off a text before the vocabulary encodes it.

        Raises InputError for a token with an option that is not supported: `lstrip` and `rstrip` take the
        spaces beside it, `single_word` matches only whole words.
        """
        with well_formed(self.folder, "added tokens"):
            decoder = self.config.get("added_tokens_decoder") or {}
            entries = list((self.json or {}).get("added_tokens") or [])
            entries += [{**entry, "id": int(index)} for index, entry in decoder.items()]
            for entry in entries:
                for option in ("lstrip", "rstrip", "single_word"):
                    if entry.get(option):
                        raise InputError(
                            f"{self.folder}: added token {entry['content']!r:.80} has {option}: true, "
                            "expected false: not supported; use another checkpoint"
                        )
            found = {
                str(e["content"]): (int(e["id"]), bool(e.get("special"))) for e in entries if e["content"]
            }
            for text, (index, _) in found.items():
                check_token(text)
                if not 0 <= index <= MAX_INTEGER:
                    raise ValueError(f"{text!r:.80} has the id {index!r:.80}")
            return found

    def prefixes_every_part(self) -> bool:
        """Whether sentencepiece's dummy prefix goes before every part of a text, or only the first.

        tokenizer.json decides if there is one, since transformers 4 used that; otherwise `legacy` decides.
        """
        if any(step.get("type") == "Prepend" for step in self.steps("normalizer")):
            return True
        for step in self.steps("pre_tokenizer"):
            if step.get("type") == "Metaspace":
                return step.get("prepend_scheme") != "first"
        return self.setting("legacy") is not False

    def template_bos(self) -> str | None:
        """The token that the post-processor of tokenizer.json puts before every text, if any."""
        for step in self.steps("post_processor"):
            if step.get("type") == "TemplateProcessing":
                with well_formed(self.folder / "tokenizer.json", "post_processor"):
                    names = [part["SpecialToken"]["id"] for part in step["single"] if "SpecialToken" in part]
                    if len(names) > 1 or "SpecialToken" in step["single"][-1]:
                        raise InputError(
                            f"{self.folder / 'tokenizer.json'}: the post-processor adds {names}, expected at "
                            "most one token, before the text: not supported; use another checkpoint"
                        )
                    return str(names[0]) if names else None
        return None

    def steps(self, component: str) -> list[dict[str, Any]]:
        """The steps of a component of tokenizer.json ("normalizer", "decoder", ...), in order."""
        with well_formed(self.folder / "tokenizer.json", component):
            return flatten((self.json or {}).get(component))


@contextmanager
def well_formed(path: Path, what: str) -> Iterator[None]:
    """Turn the errors of code that reads a malformed JSON structure into an InputError."""
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
        raise InputError(f"{path}: {what} malformed ({error!r:.300}); {AGAIN}") from error


def check_token(text: str) -> None:
    """Raise InputError for a special token that is no valid text, or longer than any real one."""
    check_text(text, f"special token {text!r:.80}")
    if len(text) > MAX_TOKEN_CHARACTERS:
        raise InputError(
            f"special token {text!r:.80}: expected at most {MAX_TOKEN_CHARACTERS} characters, "
            f"got {len(text)}; {AGAIN}"
        )


def flatten(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A component of tokenizer.json as a list of steps; each Sequence is replaced by its steps."""
    if component is None:
        return []
    if component.get("type") != "Sequence":
        return [component]
    nested = next(value for value in component.values() if isinstance(value, list))
    return [inner for step in nested for inner in flatten(step)]


def find_chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The text of chat_template.jinja (transformers 5), else `chat_template` of tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return read_bytes(file, MAX_TEMPLATE_BYTES).decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: byte {error.start} is not UTF-8; {AGAIN}") from error
    template = config.get("chat_template")
    with well_formed(folder / "tokenizer_config.json", "chat_template"):
        if isinstance(template, list):  # several, each with a name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if template is not None and not isinstance(template, str):
            raise TypeError(f"expected a string, got {template!r:.80}")
        if template is not None and len(template) > MAX_TEMPLATE_BYTES:
            raise ValueError(f"expected at most {MAX_TEMPLATE_BYTES} characters, got {len(template)}")
    return template
