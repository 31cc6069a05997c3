"""The kernel that moves rows of keys and values, against torch's gather."""

import pytest
import torch

from hf_flashmask.attention import key_order


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_rows_move(batch, heads, dtype):
    order = torch.rand(batch, heads, 150).argsort(-1)
    for head_dim in (8, 40, 64):
        x = torch.randn(2, 3, 150, head_dim + 3, dtype=dtype)[..., :head_dim].transpose(1, 2)
        y = key_order.move(x, order)
        assert torch.equal(y, x.gather(1, order.transpose(1, 2)[..., None].expand(2, 150, 3, head_dim)))
        assert torch.equal(key_order.move(y, order.argsort(-1)), x)
