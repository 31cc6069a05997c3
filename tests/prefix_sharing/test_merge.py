"""Merged rows against a trie built in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flashmask.prefix_sharing import merge_rows


def trie(rows):
    """Nodes of the trie of rows of (token, position), as paths, in no order."""
    return {tuple(row[: k + 1]) for row in rows for k in range(len(row))}


def check(input_ids, attention_mask=None, position_ids=None):
    merged = merge_rows(input_ids, attention_mask, position_ids)
    n_rows, length = input_ids.shape
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    positions = torch.arange(length).expand(n_rows, length) if position_ids is None else position_ids
    rows = [[(int(input_ids[r, c]), int(positions[r, c])) for c in range(length) if real[r, c]] for r in range(n_rows)]
    total = merged.input_ids.shape[1]
    assert total == len(trie(rows))
    visible = merged.mask.to_dense()[0, 0]
    for r in range(n_rows):
        places = [int(merged.places[r, c]) for c in range(length) if real[r, c]]
        for k, (place, (token, position)) in enumerate(zip(places, rows[r], strict=True)):
            assert int(merged.input_ids[0, place]) == token
            assert int(merged.position_ids[0, place]) == position
            # A token sees its row up to itself, and nothing else.
            assert visible[place].nonzero()[:, 0].tolist() == sorted(places[: k + 1]) == places[: k + 1]
    hidden = torch.randn(1, total, 3)
    restored = merged.restore(hidden)
    assert torch.equal(restored[real.bool()], hidden[0, merged.places[real.bool()]])
    assert (restored[~real.bool()] == 0).all()
    return merged


@st.composite
def batches(draw):
    n_rows, length = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ids = torch.randint(0, draw(st.sampled_from([1, 2, 5])), (n_rows, length), generator=generator)
    first = torch.randint(0, draw(st.integers(1, length)), (n_rows, 1), generator=generator)
    last = first + torch.randint(1, length + 1, (n_rows, 1), generator=generator)
    at = torch.arange(length)
    mask = ((at >= first) & (at < last)).long()
    positions = draw(st.sampled_from([None, (at - first).clamp(min=0), at[None] + 3 * (first % 2)]))
    return ids, draw(st.sampled_from([None, mask])), positions


@settings(max_examples=400, deadline=None)
@given(batches())
def test_random_rows(case):
    ids, mask, positions = case
    if mask is None and positions is not None and (positions.diff(dim=1) != 1).any():
        with pytest.raises(NotImplementedError, match="packed already"):
            merge_rows(ids, mask, positions)
    else:
        check(ids, mask, positions)


def test_what_is_shared():
    prompt, other = [5, 6, 7, 8], [5, 9]
    rows = torch.tensor([[*prompt, 1, 2], [*prompt, 3, 4], [*other, 1, 2, 3, 4], [*prompt, 1, 2]])
    merged = check(rows)
    # The prompt's first token is the other's too; the last row is the first again.
    assert merged.input_ids.shape[1] == 4 + 2 + 2 + 5
    shifted = torch.tensor([[0, 0, *prompt], [*prompt, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    # Tokens at other positions are other tokens, unless positions are given that agree.
    assert check(shifted, mask).input_ids.shape[1] == 8
    positions = torch.tensor([[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]])
    assert check(shifted, mask, positions).input_ids.shape[1] == 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3, dtype=torch.long),), ValueError, r"input_ids must be a non-empty \[N, L\]"),
        ((torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 4)), ValueError, "attention_mask must be"),
        ((torch.zeros(1, 3, dtype=torch.long), torch.tensor([[1, 0, 1]])), NotImplementedError, "padding between"),
        ((torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3)), ValueError, "no tokens"),
        (
            (torch.zeros(1, 4, dtype=torch.long), None, torch.tensor([[0, 1, 0, 1]])),
            NotImplementedError, "packed already",
        ),
    ],
)  # fmt: skip
def test_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        merge_rows(*arguments)
