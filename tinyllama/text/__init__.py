"""Text <-> ids: tokenizer, vocabularies, special tokens, chat templates, conversations."""
