"""Rows as in the paper's appendix: what they promise, and that a seed repeats them."""

import pytest
import torch

from hf_flashmask.bench import distributions
from hf_flashmask.bench.distributions import Question
from hf_flashmask.prefix_sharing import merge_rows


@pytest.mark.parametrize("seq_len", [128, 8192, 65536])
def test_documents(seq_len):
    rows = [distributions.documents(seq_len, seed) for seed in range(50)]
    for row in rows:
        assert sum(row) == seq_len
        assert 1 <= len(row) <= 10
        assert min(row) >= 128
    if seq_len > 128:
        assert {len(row) for row in rows} == set(range(1, 11))
    assert rows[3] == distributions.documents(seq_len, 3)
    with pytest.raises(ValueError, match="seq_len must be at least least_tokens=128, got 100"):
        distributions.documents(100, 0)


@pytest.mark.parametrize("answers", [1, 2, 6])
def test_questions(answers):
    for seed in range(50):
        q = distributions.question(4096, answers, seed)
        assert q.total == 4096
        assert len(q.answers) == answers
        query = 4096 / (1 + 0.1 * answers), 4096 / (1 + 0.2 * answers)
        assert all(int(0.1 * query[0]) <= a <= 0.2 * query[1] for a in q.answers)
        assert q == distributions.question(4096, answers, seed)
    with pytest.raises(ValueError, match="total must be at least"):
        distributions.question(10, answers, 0)


def test_rows_share_their_prompts_and_nothing_else():
    questions = [Question(40, (7, 5)), Question(23, (9,) * 6)]
    rows = distributions.token_rows(questions, vocab_size=1 << 30, seed=0)
    assert rows.input_ids.shape == (8, 47)
    assert rows.completion_mask.sum(1).tolist() == [7, 5, *[9] * 6]
    assert torch.equal(rows.input_ids != 0, rows.attention_mask.bool())
    merged = merge_rows(rows.input_ids, rows.attention_mask)
    assert merged.input_ids.shape[1] == sum(q.total for q in questions)
