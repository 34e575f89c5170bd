"""A conversation with a cache says what one without would say, and computes each token once."""

import pytest

import tinyllama
from tests.shapes import tiny_model
from tinyllama.text.conversation import Conversation, common_prefix

SHORT = {"max_new_tokens": 6}
SYSTEM = {"role": "system", "content": "You are a poet."}


@pytest.fixture(scope="module")
def trained(smollm2_folder):
    return tinyllama.load(str(smollm2_folder))


@pytest.fixture(scope="module")
def loaded(smollm2_folder):
    """A tiny model that babbles any of its tokens: their text often gives other ids than they were."""
    tokenizer = tinyllama.Tokenizer.from_folder(smollm2_folder)
    return tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=2048), tokenizer


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


def interrupt(*_):
    raise KeyboardInterrupt


def test_every_reply_is_the_one_computed_from_scratch(loaded, conversation):
    for text in ("Name a colour.", "Another one?", "Which of the two is warmer?"):
        reply = conversation.ask(text, nothing, **SHORT)
        assert conversation.messages[-2:] == [
            {"role": "user", "content": text},
            {"role": "assistant", "content": reply},
        ]
        assert reply == from_scratch(loaded, conversation.messages[:-1])


def test_a_second_turn_computes_its_new_tokens_only(trained):
    columns = []
    count = trained[0].embed_tokens.register_forward_hook(lambda _, ids, __: columns.append(ids[0].shape[1]))
    conversation = Conversation(*trained)
    pieces = []
    reply = conversation.ask("Tell me a story.", pieces.append, **SHORT)
    assert len(pieces) > 1
    assert "".join(pieces) == reply
    first = conversation.last
    assert (first.cached, first.new, first.reason) == (0, 6, "length")
    assert columns == [first.prompt, 1, 1, 1, 1, 1]

    columns.clear()
    reply = conversation.ask("Go on.", nothing, **SHORT)
    second = conversation.last
    # The last token of the first reply was chosen, but never went through the model.
    assert second.cached == first.prompt + first.new - 1
    assert columns == [second.prompt - second.cached, 1, 1, 1, 1, 1]
    assert len(second.seconds) == second.new
    count.remove()
    assert reply == from_scratch(trained, conversation.messages[:-1])


def test_an_interrupted_reply_stays_as_far_as_it_was_said(loaded, conversation):
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


def test_another_system_message_is_computed_anew(loaded, conversation):
    conversation.ask("Who are you?", nothing, **SHORT)
    conversation.messages.insert(0, SYSTEM)
    reply = conversation.ask("Really?", nothing, **SHORT)
    assert conversation.last.cached < 10
    assert reply == from_scratch(loaded, conversation.messages[:-1])


def test_the_same_question_after_a_reset_has_the_same_reply(conversation):
    reply = conversation.ask("Who are you?", nothing, **SHORT)
    conversation.messages.clear()
    assert conversation.ask("Who are you?", nothing, **SHORT) == reply
    # All is in the cache, but the logits of the last token are not.
    assert conversation.last.cached == conversation.last.prompt - 1


def test_an_interrupted_prefill_leaves_a_cache_that_is_right(loaded, conversation):
    conversation.ask("Who are you?", nothing, **SHORT)
    before = list(conversation.messages)
    conversation.messages.insert(0, SYSTEM)
    hook = loaded[0].lm_head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        conversation.ask("Really?", nothing, **SHORT)
    hook.remove()
    assert conversation.messages == [SYSTEM, *before]  # nothing was said, so nothing was asked

    # Keys and values of the first turn have been overwritten: they must not be taken for it.
    conversation.messages = before
    assert conversation.ask("Really?", nothing, **SHORT) == from_scratch(loaded, conversation.messages[:-1])


def test_the_context_fills_up(loaded):
    tokenizer = loaded[1]
    short = tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=45)
    conversation = Conversation(short, tokenizer)
    conversation.ask("Tell me a story.", nothing)
    full = conversation.last
    assert (full.prompt + full.new, full.reason) == (45, "length")
    messages = list(conversation.messages)
    with pytest.raises(
        tinyllama.InputError, match=r"the conversation has \d+ tokens, the context 45; .*/reset"
    ):
        conversation.ask("Go on.", nothing)
    assert conversation.messages == messages


def test_bad_settings_keep_the_conversation_as_it_was(conversation):
    with pytest.raises(tinyllama.InputError, match="temperature"):
        conversation.ask("Hello", nothing, temperature=-1.0)
    assert conversation.messages == []


def test_common_prefix():
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([], [1]) == 0
