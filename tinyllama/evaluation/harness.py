"""A model as lm-evaluation-harness asks one: likelihoods of continuations and of texts, and greedy text.

It answers as the harness's own class for transformers' models does (`HFLM`, lm-eval 0.4.13), so that figures
can be compared: which texts begin with BOS, where a context ends, what is cut off.
tests/evaluation shows that the answers are the same floats.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from tinyllama.errors import InputError
from tinyllama.generation import generate, left_padded
from tinyllama.model import Llama
from tinyllama.progress import note, step_progress
from tinyllama.sampler import NonFiniteLogitsError
from tinyllama.text.tokenizer import Tokenizer

# What is asked of one continuation: the two texts (None for a window), and the ids of both.
Request = tuple[tuple[str, str] | None, list[int], list[int]]
Answer = tuple[float, bool]
Item = TypeVar("Item")

MAX_NEW_TOKENS = 256  # HFLM's, for a task that gives no number
SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")
TOP_K = 50  # transformers' `generate` has it, and so has HFLM
HERE = "CONTINUE HERE "  # the space shows whether a template trims its messages


class HarnessModel(TemplateLM):
    """One of our models, for the harness: `lm_eval.simple_evaluate(HarnessModel(model, tokenizer), ...)`.

    Args:
        model: the model, with whatever attention it has.
        tokenizer: its tokenizer.
        batch: texts that go through the model at once; the longest come first, so that memory that does not
            suffice is found missing at once.

    Raises:
        InputError: the tokenizer has neither BOS nor EOS, one of which stands for an empty context.
    """

    def __init__(self, model: Llama, tokenizer: Tokenizer, batch: int = 1) -> None:
        super().__init__()
        prefix = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        if prefix is None:
            raise InputError(f"{tokenizer.name}: expected a tokenizer with BOS or EOS, it names neither")
        self.model, self.tokenizer, self.batch, self._prefix = model, tokenizer, batch, prefix
        self._seeds = count()  # another for each batch, or repeats of a prompt would be given one text

    @property
    def eot_token_id(self) -> int | None:
        """EOS: its text ends a generated one."""
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by: BOS, or EOS in a tokenizer without one."""
        return self._prefix

    @property
    def max_length(self) -> int:
        """Most tokens that the model reads at once."""
        # Not `context`, which counts RoPE scaling: windows must begin where HFLM's do.
        return self.model.config.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps cached requests under."""
        return self.tokenizer.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, after BOS if the model expects one and the text does not begin with it.

        Args:
            string: the text; special tokens in it are recognised.
            add_special_tokens: whether BOS may come first; None: unless the text, such as a rendered chat,
                begins with it.
        """
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer.encode(string, bos=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as the text that the model's template makes of it.

        Args:
            chat_history: messages with `role` and `content`.
            add_generation_prompt: end with the opening of the assistant's turn. If not, the last message is
                the beginning of an answer, and the text ends with it.

        Raises:
            InputError: the model has no template, or it fails, without the system message too.
        """
        try:
            return self._chat(chat_history, add_generation_prompt)
        except InputError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            note(f"warning: {error}; trying without the system message")
            return self._chat(others, add_generation_prompt)

    def _chat(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        if not add_generation_prompt:
            *earlier, last = messages
            messages = [*earlier, {**last, "content": last["content"] + HERE}]
        segments = self.tokenizer.chat_segments(messages, add_generation_prompt)
        text = "".join(segment.text for segment in segments)
        if add_generation_prompt:
            return text
        begun, mark, rest = text.rpartition(HERE.strip())
        if not mark:
            raise InputError(f"{self.tokenizer.name}: the chat template left out the last message")
        return begun if rest.startswith(" ") else begun.rstrip()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Answer]:
        """For each (context, continuation): log p of the continuation, in nats, and whether it is greedy.

        An empty context is BOS (or EOS); spaces that end a context begin the continuation.

        Raises:
            InputError: a continuation has no tokens of its own, or more than the model can read.
            NonFiniteLogitsError: the model gave NaN or infinite logits, of which no choice is the likeliest.
        """
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """For each (text,): its log p, in nats, after BOS (or EOS).

        A longer text than the model can read is cut into windows that meet; the last one reaches back as far
        as it can. A tokenizer that begins texts with BOS puts one after the prefix: it is predicted too, as
        in HFLM.
        """
        windows: list[Request] = []
        counts = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            parts = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            own: list[Request] = [(None, *make_disjoint_window(part)) for part in parts]
            windows += own
            counts.append(len(own))
        answers = iter(self._loglikelihood_tokens(windows))
        return [sum(next(answers)[0] for _ in range(count)) for count in counts]

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[Answer]:
        """Log p and greediness of each continuation, in the order of the requests."""
        # Choices that differ in their last token alone have the same input, which is computed once.
        same: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for place, (texts, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise InputError(
                    f"the continuation {texts and texts[1]!r:.80}: expected 1 to {self.max_length} tokens, "
                    f"got {len(continuation)}; correct the task"
                )
            # A context of spaces alone is empty by now: its spaces have gone to the continuation.
            whole = [*(context or [self.prefix_token_id]), *continuation]
            same[tuple(whole[-(self.max_length + 1) : -1])].append(place)
        answers: dict[int, Answer] = {}
        with torch.inference_mode(), step_progress(len(same)) as step:
            for inputs in _batches(sorted(same, key=len, reverse=True), self.batch):
                for ids, hidden in zip(inputs, self._hidden(inputs), strict=True):
                    wanted = {place: requests[place][2] for place in same[ids]}
                    logits = self.model.lm_head(hidden)[0, -max(map(len, wanted.values())) :]
                    log_p = logits.log_softmax(-1)
                    answers |= {place: _answer(log_p, continuation) for place, continuation in wanted.items()}
                    step("log-likelihoods")
        return [answers[place] for place in range(len(requests))]

    def _hidden(self, inputs: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """What `lm_head` reads of each text, (1, T, C): the logits of all might not fit in memory."""
        ids, positions = left_padded(inputs, self.model.embed_tokens.weight.device)
        hidden = self.model.hidden_states(ids, positions=positions)
        for row, own in enumerate(inputs):
            yield hidden[row : row + 1, -len(own) :]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """For each (context, settings): the text that follows, up to the first of the stop strings.

        The settings are `until` (EOS is added), `max_gen_toks` and its other names, `do_sample` and those of
        `Sampler`. A context that leaves no room for `max_gen_toks` is cut on the left.

        Raises:
            InputError: a setting is unknown, or `max_gen_toks` leaves no room for a context.
            NonFiniteLogitsError: the model gave NaN or infinite logits.
        """
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        same: dict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            same[json.dumps(request.args[1], sort_keys=True)].append(place)
        texts: dict[int, str] = {}
        with step_progress(len(requests)) as step:
            for settings, places in same.items():
                until, limit, sampling = self._settings(json.loads(settings))
                room = self.max_length - limit
                if room < 1:
                    raise InputError(
                        f"max_gen_toks: expected less than the model's {self.max_length} tokens, got {limit}"
                    )
                places.sort(key=lambda place: len(prompts[place]), reverse=True)
                for batch in _batches(places, self.batch):
                    contexts = [prompts[place][-room:] or [self.prefix_token_id] for place in batch]
                    for place, text in zip(batch, self._texts(contexts, until, limit, sampling), strict=True):
                        texts[place] = text
                        step("generated texts")
        return [texts[place] for place in range(len(requests))]

    def _settings(self, given: dict[str, Any]) -> tuple[list[str], int, dict[str, float]]:
        """Stop strings, most new tokens, and the arguments of `Sampler`."""
        settings = dict(normalize_gen_kwargs(given, MAX_NEW_TOKENS))
        end = None if self.eot_token_id is None else self.tokenizer.decode([self.eot_token_id])
        until = handle_stop_sequences(settings.pop("until"), end)
        limit, sampled = settings.pop("max_gen_toks"), settings.pop("do_sample")
        if unknown := settings.keys() - set(SAMPLING):
            raise InputError(
                f"generation_kwargs: expected until, max_gen_toks, do_sample, {', '.join(SAMPLING)}, got "
                f"{', '.join(sorted(unknown))}"
            )
        if not sampled:
            settings = {name: value for name, value in settings.items() if name == "repetition_penalty"}
        elif not settings.get("temperature"):
            raise InputError("generation_kwargs: do_sample needs a temperature above 0; give one")
        else:
            settings = {"top_k": TOP_K, **settings}
        return until, limit, settings

    def _texts(
        self, contexts: Sequence[list[int]], until: list[str], limit: int, sampling: dict[str, Any]
    ) -> Iterator[str]:
        # Every token has a byte at least; one token more, whose leading space a decoder may drop.
        longest = max((len(end.encode()) for end in until), default=0) + 1

        def ended(ids: Sequence[int]) -> bool:
            tail = self._decode(ids[-longest:], skip_special=False)
            return any(end in tail for end in until)

        for ids in generate(
            self.model, contexts, max_new_tokens=limit, stop=ended, seed=next(self._seeds), **sampling
        ):
            yield postprocess_generated_text(self._decode(ids, skip_special=True), until, None)

    def _decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """Their text; ids that the model has and its tokenizer has not add nothing."""
        known = [id for id in ids if id < self.tokenizer.vocab_size]
        return self.tokenizer.decode(known, skip_special=skip_special)


def _answer(log_p: Tensor, continuation: Sequence[int]) -> Answer:
    """Log p of a continuation, whose rows end log_p, (N, V), and whether each id is the likeliest."""
    ids = torch.tensor(continuation, device=log_p.device)
    log_p = log_p[-len(ids) :]
    chosen = log_p.gather(1, ids[:, None])[:, 0]
    total = chosen.sum().item()
    if not math.isfinite(total):
        raise NonFiniteLogitsError
    return total, bool((log_p.argmax(-1) == ids).all())


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
