"""A conversation with a cache says what one without would say, and computes each token once."""

import pytest
import torch

import tinyllama
from tests.shapes import tiny_model
from tinyllama.text.conversation import Conversation

SHORT = {"max_new_tokens": 6}
SYSTEM = {"role": "system", "content": "You are a poet."}


@pytest.fixture(scope="module")
def loaded(smollm2):
    """A tiny model that says random tokens; encoding their text often gives other ids."""
    return tiny_model(vocab_size=smollm2.vocab_size, max_position_embeddings=2048), smollm2


@pytest.fixture
def conversation(loaded):
    return Conversation(*loaded)


def from_scratch(loaded, messages):
    """The reply to the messages without any cache from before."""
    model, tokenizer = loaded
    (new_ids,) = tinyllama.generate(model, [tokenizer.chat(messages)], **SHORT)
    return tokenizer.decode(new_ids, skip_special=True)


def nothing(piece):
    pass


def test_every_reply_is_the_one_computed_from_scratch(loaded, conversation):
    def ask(text):
        reply = conversation.ask(text, nothing, **SHORT)
        assert conversation.messages[-2:] == [
            {"role": "user", "content": text},
            {"role": "assistant", "content": reply},
        ]
        assert reply == from_scratch(loaded, conversation.messages[:-1])
        return conversation.last

    ask("Name a colour.")
    assert ask("Another one?").cached > 20
    conversation.messages.insert(0, SYSTEM)
    assert ask("Really?").cached < 10
    conversation.messages.clear()
    ask("Who are you?")
    conversation.messages.clear()
    last = ask("Who are you?")
    # All tokens are in the cache, but the logits of the last one are not.
    assert last.cached == last.prompt - 1


def test_a_second_turn_computes_only_its_new_tokens(loaded, conversation):
    model, tokenizer = loaded
    # Words: unlike random tokens, their text gives the same ids again.
    said = iter(2 * tokenizer.encode("Once upon a time there was"))
    widths = []
    hooks = [
        model.embed_tokens.register_forward_hook(lambda _, ids, __: widths.append(ids[0].shape[1])),
        model.lm_head.register_forward_hook(
            lambda _, __, logits: torch.zeros_like(logits).index_fill(-1, torch.tensor([next(said)]), 1.0)
        ),
    ]
    pieces = []
    assert conversation.ask("Tell me a story.", pieces.append, **SHORT) == "Once upon a time there was"
    assert "".join(pieces) == "Once upon a time there was"
    assert len(pieces) == 6
    first = conversation.last
    assert (first.cached, first.new, first.reason) == (0, 6, "length")
    conversation.ask("Go on.", nothing, **SHORT)
    second = conversation.last
    # The last token of the first reply was chosen, but never went through the model.
    assert second.cached == first.prompt + first.new - 1
    assert widths == [first.prompt, 1, 1, 1, 1, 1, second.prompt - second.cached, 1, 1, 1, 1, 1]
    assert len(second.seconds) == second.new
    for hook in hooks:
        hook.remove()


def test_an_interrupted_reply_is_kept_as_far_as_it_was_said(loaded, conversation):
    pieces = []

    def show(piece):
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.ask("Tell me a story.", show)
    assert conversation.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
    assert conversation.last.reason is None
    reply = conversation.ask("Go on.", nothing, **SHORT)
    assert conversation.last.cached > 3
    assert reply == from_scratch(loaded, conversation.messages[:-1])


def test_an_interrupted_prefill_leaves_a_cache_that_is_right(loaded, conversation):
    def interrupt(*_):
        raise KeyboardInterrupt

    conversation.ask("Who are you?", nothing, **SHORT)
    before = list(conversation.messages)
    conversation.messages.insert(0, SYSTEM)
    hook = loaded[0].lm_head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        conversation.ask("Really?", nothing, **SHORT)
    hook.remove()
    assert conversation.messages == [SYSTEM, *before]  # nothing was said, so nothing was asked

    # The keys and values of the first turn have been overwritten, so they must not be used.
    conversation.messages = before
    assert conversation.ask("Really?", nothing, **SHORT) == from_scratch(loaded, conversation.messages[:-1])


def test_a_full_context_ends_the_reply_and_refuses_the_next_turn(loaded):
    tokenizer = loaded[1]
    short = tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=45)
    conversation = Conversation(short, tokenizer)
    conversation.ask("Tell me a story.", nothing)
    full = conversation.last
    assert (full.prompt + full.new, full.reason) == (45, "length")
    messages = list(conversation.messages)
    with pytest.raises(tinyllama.InputError, match=r"has \d+ tokens, the context 45; .*/reset"):
        conversation.ask("Go on.", nothing)
    assert conversation.messages == messages


def test_bad_settings_leave_the_messages_unchanged(conversation):
    with pytest.raises(tinyllama.InputError, match="temperature"):
        conversation.ask("Hello", nothing, temperature=-1.0)
    assert conversation.messages == []


def test_a_message_taken_back_leaves_the_conversation_and_the_cache_as_if_never_said(loaded, conversation):
    conversation.ask("Name a colour.", nothing, **SHORT)
    conversation.ask("Another one?", nothing, **SHORT)
    assert conversation.undo() == "Another one?"
    assert [message["content"] for message in conversation.messages][:1] == ["Name a colour."]
    reply = conversation.ask("A third?", nothing, **SHORT)
    assert reply == from_scratch(loaded, conversation.messages[:-1])
    assert conversation.last.cached > 20
    # Said again with the same seed it is the same, with another one not.
    drawn = {"temperature": 1.0, **SHORT}
    one = conversation.ask(conversation.undo(), nothing, seed=1, **drawn)
    two = conversation.ask(conversation.undo(), nothing, seed=2, **drawn)
    three = conversation.ask(conversation.undo(), nothing, seed=1, **drawn)
    assert one == three != two
    conversation.undo()
    conversation.undo()
    with pytest.raises(tinyllama.InputError, match="nothing to undo"):
        conversation.undo()
