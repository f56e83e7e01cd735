"""The bundled model's tokenizer: byte-level BPE, 2,048 entries, digits always one by one."""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from turboattention.evaluation import tasks

VOCAB_SIZE = 2048
END = "<|end|>"  # id 0: between documents, and before the first

# A word takes its leading space with it; a digit stands alone, so that numbers are copied and
# added digit by digit; runs of blanks and newlines stay together.
PATTERN = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_tokenizer(books: str) -> Tokenizer:
    """A tokenizer trained on `books` and on a little of every generated task."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(books), trainer)
    return tokenizer


def _texts(books: str) -> Iterator[str]:
    yield from books.split("\n")
    for task in tasks.TASKS:
        for episode in tasks.episodes(task, 200, 2000):
            yield episode.text
