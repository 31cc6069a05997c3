"""Transformers' mask functions: our bounds against its own dense masks, entry by entry."""

import itertools

import pytest
import torch
from transformers import masking_utils as mu

from hf_flashmask import masks
from hf_flashmask.huggingface import masking
from hf_flashmask.huggingface.masking import flashmask_mask

N = 11
PADDING = torch.tensor([[0, 0, 0] + [1] * 8, [1] * 9 + [0] * 2]).bool()
BLOCKS = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, 2, 2, 2, -1], [0, 0, -1, -1, -1, -1, -1, 3, 3, -1, 7]])
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2, 3, 3], [0] * 11])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 0, 1], list(range(11))])
NO_PADDING = torch.zeros(2, dtype=torch.long)


def packed(function):
    compatible = getattr(mu, "packed_sequence_compatibility_function", None)
    if compatible is None:  # transformers 5.17
        return mu.and_masks(function, mu.packed_sequence_mask_function(DOCUMENTS))
    return compatible(function, POSITIONS, DOCUMENTS)


FUNCTIONS = {
    "causal": mu.causal_mask_function,
    "bidirectional": mu.bidirectional_mask_function,
    "window": mu.sliding_window_causal_mask_function(4),
    "window, both ways": mu.sliding_window_bidirectional_mask_function(3),
    "chunked": mu.chunked_causal_mask_function(4, NO_PADDING),
    "chunked, left padding": mu.chunked_causal_mask_function(4, torch.tensor([3, 0])),
    "padding": mu.and_masks(mu.causal_mask_function, mu.padding_mask_function(PADDING)),
    "image blocks": mu.or_masks(mu.causal_mask_function, mu.blockwise_overlay(BLOCKS)),
    "image blocks and window": mu.and_masks(
        mu.or_masks(mu.causal_mask_function, mu.blockwise_overlay(BLOCKS)), mu.sliding_window_overlay(3)
    ),
    "packed": packed(mu.causal_mask_function),
    "packed, window": packed(mu.sliding_window_causal_mask_function(3)),
    "packed, chunked": packed(mu.chunked_causal_mask_function(3, NO_PADDING)),
    "packed, image blocks": mu.or_masks(packed(mu.causal_mask_function), mu.blockwise_overlay(BLOCKS)),
}


def both(function, **options):
    options = {"batch_size": 2, "q_length": N, "kv_length": N, "mask_function": function, **options}
    ours = flashmask_mask(**options, allow_is_causal_skip=True)
    dense = mu.sdpa_mask(**options, allow_is_causal_skip=False)
    return ours, dense


@pytest.mark.parametrize("name", FUNCTIONS)
def test_own_functions_without_looking_at_entries(name, monkeypatch):
    monkeypatch.setattr(masking, "_probe", None)
    for attention_mask in (None, PADDING):
        ours, dense = both(FUNCTIONS[name], attention_mask=attention_mask)
        assert torch.equal(ours.to_dense().expand_as(dense), dense)
        assert ours.bounds.shape[2] == 2


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if "packed" not in n])
def test_caches(name, monkeypatch):
    """Chunks of a prefill, decoding, cropped windows, static caches with a tensor for an offset."""
    monkeypatch.setattr(masking, "_probe", None)
    grown = PADDING
    cases = [
        {"q_length": 4, "q_offset": 7, "attention_mask": grown},
        {"q_length": 1, "q_offset": 10, "attention_mask": grown},
        {"q_length": 1, "kv_length": 4, "q_offset": 10, "kv_offset": 7, "attention_mask": grown},
        {"q_length": 3, "kv_length": 6, "q_offset": 8, "kv_offset": 5},
        {"q_length": 1, "q_offset": 10},
        {"q_length": 1, "kv_length": 4, "q_offset": 10, "kv_offset": 7},
        {"q_length": 1, "kv_length": 5, "q_offset": 10, "kv_offset": 6},
    ]
    if "padding" not in name and "image" not in name:
        cases.append({"q_length": 3, "kv_length": 20, "q_offset": torch.tensor(8), "attention_mask": grown})
        cases.append({"q_length": N, "kv_length": 20, "q_offset": 0})
        cases.append({"q_length": 1, "kv_length": 20, "q_offset": torch.tensor(8)})
    known = []
    for case in cases:
        ours, dense = both(FUNCTIONS[name], **case)
        assert torch.equal(ours.to_dense().expand_as(dense), dense), case
        assert dense[..., : ours.full_prefix].all(), case
        known.append(ours.full_prefix)
    expected = {"causal": [0, 0, 0, 4, 11, 4, 5, 0, 1, 0], "window": [0, 0, 0, 0, 0, 4, 0, 0, 0, 0]}
    assert known == expected.get(name, [0] * len(known))


def test_any_combination():
    leaves = [f for n, f in FUNCTIONS.items() if "packed" not in n and "padding" not in n]
    for a, b, c in itertools.product(leaves, repeat=3):
        for function in (mu.or_masks(mu.and_masks(a, b), c), mu.and_masks(mu.or_masks(a, b), c)):
            rows = masking._rows(function, masking._Keys(torch.arange(N), None))
            assert rows is not None
            ours, dense = both(function)
            assert torch.equal(ours.to_dense().expand_as(dense), dense)


def test_unknown_functions_are_probed_exactly():
    def prefix(batch_idx, head_idx, q_idx, kv_idx):
        return (kv_idx < 4) & (q_idx != 6)

    for function in (mu.or_masks(mu.causal_mask_function, prefix), mu.and_masks(prefix, mu.causal_mask_function)):
        for options in ({}, {"attention_mask": PADDING}, {"q_length": 4, "q_offset": 7}):
            ours, dense = both(function, **options)
            assert torch.equal(ours.to_dense().expand_as(dense), dense)
    if hasattr(mu, "TransformGetItemToIndex"):
        ours, dense = both(mu.or_masks(mu.causal_mask_function, prefix), use_vmap=True)
        assert torch.equal(ours.to_dense().expand_as(dense), dense)


def test_unknown_functions_that_bounds_cannot_hold_are_refused_by_name():
    def checkerboard(batch_idx, head_idx, q_idx, kv_idx):
        return (q_idx + kv_idx) % 2 == 0

    with pytest.raises(ValueError, match=r"checkerboard is not representable.*key column 0 hides 5 separate"):
        flashmask_mask(batch_size=1, q_length=N, kv_length=N, mask_function=checkerboard)


def test_blocks_in_pieces_are_exact_or_refused():
    ids = torch.tensor([[0, 0, -1, 0, 0, -1, -1, -1, -1, -1, -1]])
    ours, dense = both(mu.or_masks(mu.causal_mask_function, mu.blockwise_overlay(ids)), batch_size=1)
    assert torch.equal(ours.to_dense(), dense)
    scattered = torch.tensor([[0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0]])
    with pytest.raises(ValueError, match="not representable"):
        both(mu.blockwise_overlay(scattered), batch_size=1)


def test_remapped_positions_outside_documents_are_probed():
    if not hasattr(mu, "remap_positions_for_packed_sequence"):
        pytest.skip("transformers 5.17 does not remap")
    alone = mu.remap_positions_for_packed_sequence(mu.causal_mask_function, POSITIONS)
    assert masking._rows(mu.and_masks(alone), masking._Keys(torch.arange(N), None)) is None


def test_a_column_mask_comes_through():
    mask = masks.sliding_window(N, 3)
    assert flashmask_mask(batch_size=2, q_length=N, kv_length=N, attention_mask=mask) is mask
    with pytest.raises(ValueError, match="2-D or 4-D"):
        flashmask_mask(batch_size=2, q_length=N, kv_length=N, attention_mask=torch.ones(2, N, N))


def test_unknown_arguments_are_refused():
    with pytest.raises(NotImplementedError, match="mask argument 'shear'"):
        flashmask_mask(batch_size=1, q_length=N, kv_length=N, shear=2)


def test_long_rows_take_no_quadratic_memory():
    n = 1 << 18
    mask = flashmask_mask(
        batch_size=1, q_length=n, kv_length=n, mask_function=mu.sliding_window_causal_mask_function(64)
    )
    assert mask.visible_pairs() == n * 64 - 64 * 63 // 2
