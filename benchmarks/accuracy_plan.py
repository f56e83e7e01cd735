"""The measurements of a model, the most informative first."""

from __future__ import annotations

from dataclasses import dataclass

MAIN = (
    "fp16,turbo-8,turbo-4,turbo-4-lag,turbo-4-reordered,turbo-3,turbo-3-reordered,turbo-mixed,turbo-2,turbo-2-reordered,turbo-paper-4,"
    "kivi-4,kivi-2,gear-l-4,saw-int4-kv"
)
"""Methods of the longer contexts."""
ASKED = "fp16,turbo-4-reordered,turbo-3-reordered,turbo-2-reordered,turbo-mixed,kivi-4,kivi-2,gear-l-4,turbo-paper-4"
"""Methods that questions are asked through first."""
ASKED_LATER = "turbo-4,turbo-3,turbo-2"
CALIBRATED = "turbo-calibrated-4,turbo-calibrated,turbo-calibrated-2.5"
"""Widths chosen for averages of 4, 3 and 2.5 bits."""


@dataclass(frozen=True)
class Stage:
    """One folder of results: a run of `turboattention eval`.

    text: which of the given texts. least_context: models with a shorter context are left out. wants_data: questions
    from files, for the models selected to answer them. with_bos: after the token that the tokenizer names BOS, for
    models whose tokenizer does not add one. calibrated: with a calibration of the model on the book.
    """

    name: str
    tasks: str
    methods: str
    text: str | None = None
    context: int | None = None
    lengths: str | None = None
    limit: int | None = None
    least_context: int = 0
    wants_data: bool = False
    with_bos: bool = False
    calibrated: bool = False

    @property
    def dtype(self) -> str:
        """Dtype of the weights. Thousands of generated answers take half the time in bfloat16, whose rounding does not
        matter there; a KL divergence has to resolve differences smaller than that rounding."""
        return "bfloat16" if self.wants_data else "float32"

    def options(self) -> list[str]:
        given = {"--context": self.context, "--lengths": self.lengths, "--limit": self.limit}
        return [str(part) for name, value in given.items() if value is not None for part in (name, value)]


STAGES = (
    Stage("wikitext2-2048", "perplexity", "all", "wikitext2", 2048, limit=1),
    Stage("wikitext2-2048-calibrated", "perplexity", CALIBRATED, "wikitext2", 2048, limit=1, calibrated=True),
    Stage("book-2048", "perplexity", "all", "book", 2048, limit=1),
    Stage("wikitext2-8192", "perplexity", MAIN, "wikitext2", 8192, limit=1, least_context=8192),
    Stage("gsm8k", "gsm8k", ASKED, limit=500, wants_data=True),
    Stage("growth", "growth", MAIN, "book", 2048, limit=1),
    Stage("recall", "recall,needle", MAIN, "book", lengths="1024,2048", limit=32),
    Stage("gsm8k-more", "gsm8k", ASKED_LATER, limit=500, wants_data=True),
    Stage("aqua", "aqua", ASKED, limit=200, wants_data=True),
    Stage("bbh", "bbh", ASKED, limit=10, wants_data=True),
    Stage("aqua-more", "aqua", ASKED_LATER, limit=200, wants_data=True),
    Stage("bbh-more", "bbh", ASKED_LATER, limit=10, wants_data=True),
    Stage("wikitext2-2048-bos", "perplexity", MAIN, "wikitext2", 2048, limit=1, with_bos=True),
    Stage("book-8192", "perplexity", MAIN, "book", 8192, limit=1, least_context=8192),
)
