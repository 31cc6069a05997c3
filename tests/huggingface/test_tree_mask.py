"""Trees of rows in layers with a window: as the rows alone, whatever the tree looks like."""

import pickle

import pytest
import torch
from transformers import masking_utils

from hf_flashmask import flashmask_attention, masks
from hf_flashmask.huggingface.masking import flashmask_mask
from hf_flashmask.huggingface.tree_mask import TreeMask, TreeRows, WindowedTree
from hf_flashmask.prefix_sharing import merge_rows


def random_tree(seed, n_rows=5, length=14):
    """Rows over two letters, so that they branch often, padded on both sides."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 7, (n_rows, length), generator=generator)
    first = torch.randint(0, 3, (n_rows, 1), generator=generator)
    end = torch.randint(8, length + 1, (n_rows, 1), generator=generator)
    at = torch.arange(length)
    rows = merge_rows(ids, (at >= first) & (at < end))
    return rows, TreeMask(rows.mask.bounds, causal=True, tree_rows=TreeRows(rows.places, rows.real))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("window", [1, 3, 13])
def test_attention_is_that_of_the_rows(seed, window):
    rows, tree = random_tree(seed)
    size = tree.kv_len
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(1, size, heads, 8, dtype=torch.float64, generator=generator, requires_grad=True)
        for heads in (4, 2, 2)
    )
    do = torch.randn(1, size, 4, 8, dtype=torch.float64, generator=generator)
    mask = tree.within(window)
    assert isinstance(mask, WindowedTree)
    # Dense: a token sees those of its row, in the tree's mask, that are fewer than window positions before it.
    depth = rows.position_ids[0]
    dense = tree.to_dense() & (depth[:, None] - depth[None] < window)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), *(t.transpose(1, 2).repeat_interleave(2, 1) for t in (k, v)), attn_mask=dense
    ).transpose(1, 2)
    out = mask.attend(q, k, v)
    torch.testing.assert_close(out, expected)
    for grad, wanted in zip(
        torch.autograd.grad(out, (q, k, v), do), torch.autograd.grad(expected, (q, k, v), do), strict=True
    ):
        torch.testing.assert_close(grad, wanted)


def test_windows_of_mask_functions():
    _, tree = random_tree(0)
    size = tree.kv_len

    def made(function):
        return flashmask_mask(batch_size=1, q_length=size, kv_length=size, mask_function=function, attention_mask=tree)

    assert made(masking_utils.causal_mask_function) is tree
    assert made(masking_utils.sliding_window_causal_mask_function(4)).window == 4
    # A window as long as the rows hides nothing.
    assert made(masking_utils.sliding_window_causal_mask_function(14)) is tree
    chunked = masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64))
    with pytest.raises(NotImplementedError, match="without share_prompts"):
        made(chunked)


def test_it_travels_and_refuses_what_would_lose_the_window():
    _, tree = random_tree(1)
    mask = tree.within(3)
    q, k, v = (torch.randn(1, tree.kv_len, 2, 8) for _ in "qkv")
    for copy in (pickle.loads(pickle.dumps(mask)), mask.clone(), mask.to("cpu"), mask.contiguous()):
        assert torch.equal(copy.attend(q, k, v), mask.attend(q, k, v))
    assert isinstance(pickle.loads(pickle.dumps(tree)), TreeMask)
    for lossy in (lambda: mask[:, :, :4], lambda: mask & tree, mask.to_dense, mask.visible_pairs):
        with pytest.raises(NotImplementedError, match="window"):
            lossy()
    torch.testing.assert_close(
        flashmask_attention(q, k, v, tree), flashmask_attention(q, k, v, tree, backend="reference")
    )
    assert not torch.allclose(mask.attend(q, k, v), flashmask_attention(q, k, v, masks.causal(tree.kv_len)))
