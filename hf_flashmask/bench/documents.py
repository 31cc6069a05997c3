"""The documents of the paper's kernel benchmark, and masks made of them.

Source: sample 0 of Paddle's ``benchmark_flashmask_backward.py`` (lengths are hard-coded there).
"""

from __future__ import annotations

# Total tokens: lengths of the documents.
PAPER_DOCUMENTS: dict[int, tuple[int, ...]] = {
    8192: (3145, 2203, 2844),
    32768: (3482, 4024, 4638, 4022, 2879, 956, 3586, 2682, 3546, 2953),
    131072: (11610, 12300, 16924, 3872, 13367, 6646, 15715, 15867, 6181, 17929, 10661),
}
# Tokens of every document's prefix that the whole document sees, in "prefix_lm_document".
PAPER_PREFIXES: dict[int, tuple[int, ...]] = {
    8192: (885, 296, 528),
    32768: (884, 956, 922, 864, 308, 185, 450, 750, 707, 705),
    131072: (1969, 2478, 3805, 621, 2045, 1336, 3579, 3981, 718, 4431, 3019),
}
# Which documents' keys are dropped, in "qk_sparse".
PAPER_DROPPED: dict[int, tuple[bool, ...]] = {
    8192: (False, True, False),
    32768: (False, False, True, True, True, True, False, True, False, False),
    131072: (False, False, True, True, True, False, False, False, False, True, False),
}


def documents(seq_len: int) -> tuple[int, ...]:
    """The paper's document lengths, scaled to ``seq_len`` where it has none of that total."""
    base = _base(seq_len)
    lengths = [n * seq_len // base for n in PAPER_DOCUMENTS[base]]
    lengths[-1] += seq_len - sum(lengths)
    return tuple(lengths)


def prefixes(seq_len: int) -> tuple[int, ...]:
    """Prefix of every one of ``documents(seq_len)``."""
    base = _base(seq_len)
    return tuple(n * seq_len // base for n in PAPER_PREFIXES[base])


def dropped(seq_len: int) -> tuple[bool, ...]:
    """Whether the keys of each of ``documents(seq_len)`` are dropped."""
    return PAPER_DROPPED[_base(seq_len)]


def _base(seq_len: int) -> int:
    return min(PAPER_DOCUMENTS, key=lambda n: abs(n - seq_len))
