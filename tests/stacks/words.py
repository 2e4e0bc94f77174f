"""Fifteen words and a tokenizer trained on them."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

WORDS = (
    *("the", "a", "cat", "dog", "bird"),
    *("sees", "eats", "likes", "runs", "sleeps"),
    *("red", "blue", "old", "small", "and"),
)


def trained_tokenizer(vocab_size: int, special: list[str]) -> Tokenizer:
    """special: tokens that come first, "<unk>" among them."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=special)
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    return tokenizer
