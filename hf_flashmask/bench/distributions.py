"""Lengths of training rows as in the FlashMask paper's end-to-end runs, and rows of token ids made of them.

Source: the appendix of arXiv 2410.01359: rows of up to ten documents, the answers of each 10 to 20 % of its query; one
answer for SFT, two for DPO, six for reward models. Everything is drawn from a seed.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from torch import Tensor

SFT_ANSWERS, DPO_ANSWERS, REWARD_ANSWERS = 1, 2, 6
MOST_DOCUMENTS = 10
LEAST_TOKENS = 128  # of a document


class Question(NamedTuple):
    """Tokens of a question and of each of its answers."""

    prompt: int
    answers: tuple[int, ...]

    @property
    def total(self) -> int:
        return self.prompt + sum(self.answers)


class Rows(NamedTuple):
    """Right-padded rows, one an answer: a question's rows are neighbours and begin with the same tokens."""

    input_ids: Tensor  # int64 [N, L]; 0 for padding
    attention_mask: Tensor  # int64 [N, L]
    completion_mask: Tensor  # int64 [N, L]: 1 for tokens of the answer


def documents(seq_len: int, seed: int, most: int = MOST_DOCUMENTS, least_tokens: int = LEAST_TOKENS) -> tuple[int, ...]:
    """Lengths of 1 to ``most`` documents that fill a row of ``seq_len`` tokens, each at least ``least_tokens``.

    Raises:
        ValueError: the row has no room for one document.
    """
    if seq_len < least_tokens:
        raise ValueError(f"seq_len must be at least least_tokens={least_tokens}, got {seq_len}")
    rng = random.Random(seed)
    count = rng.randint(1, min(most, seq_len // least_tokens))
    spare = seq_len - count * least_tokens
    cuts = sorted(rng.randint(0, spare) for _ in range(count - 1))
    return tuple(b - a + least_tokens for a, b in zip((0, *cuts), (*cuts, spare), strict=True))


def question(total: int, answers: int, seed: int) -> Question:
    """A question of ``total`` tokens with its answers, each 10 to 20 % of an even query: from 0.1 L / (1 + 0.1 k) to
    0.2 L / (1 + 0.2 k) tokens.

    Raises:
        ValueError: too few tokens for a prompt and answers.
    """
    if total < 10 + answers:
        raise ValueError(f"total must be at least {10 + answers} tokens for {answers} answers, got {total}")
    rng = random.Random(seed)
    low, high = (share * total / (1 + share * answers) for share in (0.1, 0.2))
    lengths = tuple(max(1, int(rng.uniform(low, high))) for _ in range(answers))
    return Question(total - sum(lengths), lengths)


def token_rows(questions: list[Question], vocab_size: int, seed: int) -> Rows:
    """Random token ids for questions, 1 to ``vocab_size`` - 1, so that 0 is padding alone."""
    generator = torch.Generator().manual_seed(seed)
    n_rows = sum(len(q.answers) for q in questions)
    length = max(q.prompt + max(q.answers) for q in questions)
    ids, attention, completion = torch.zeros(3, n_rows, length, dtype=torch.int64)
    row = 0
    for q in questions:
        prompt = torch.randint(1, vocab_size, (q.prompt,), generator=generator)
        for answer in q.answers:
            end = q.prompt + answer
            ids[row, : q.prompt] = prompt
            ids[row, q.prompt : end] = torch.randint(1, vocab_size, (answer,), generator=generator)
            attention[row, :end] = 1
            completion[row, q.prompt : end] = 1
            row += 1
    return Rows(ids, attention, completion)
