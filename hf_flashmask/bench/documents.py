"""The documents of the paper's kernel benchmark, and masks made of them.

Source: sample 0 of Paddle's ``benchmark_flashmask_backward.py`` (lengths are hard-coded there).
"""

from __future__ import annotations

# Total tokens: lengths of the documents.
PAPER_DOCUMENTS: dict[int, tuple[int, ...]] = {
    8192: (3145, 2203, 2844),
    32768: (3482, 4024, 4638, 4022, 2879, 956, 3586, 2682, 3546, 2953),
}


def documents(seq_len: int) -> tuple[int, ...]:
    """The paper's document lengths, scaled to ``seq_len`` where it has none of that total."""
    if seq_len in PAPER_DOCUMENTS:
        return PAPER_DOCUMENTS[seq_len]
    base = min(PAPER_DOCUMENTS, key=lambda n: abs(n - seq_len))
    lengths = [n * seq_len // base for n in PAPER_DOCUMENTS[base]]
    lengths[-1] += seq_len - sum(lengths)
    return tuple(lengths)
