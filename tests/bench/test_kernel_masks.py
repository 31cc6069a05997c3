"""The kernel benchmark's masks: column bounds and mask_mods say the same, and they are the published ones."""

import pytest
import torch

from hf_flashmask.bench import kernel_masks
from hf_flashmask.bench.documents import PAPER_DOCUMENTS, documents, dropped, prefixes

# Visible share at 8192 and at 32768 tokens, as the tables of measured kernels give it.
DENSITY = {
    "full": (1.0, 1.0),
    "causal": (0.5001, 0.5),
    "sliding_window": (0.0606, 0.0605),
    "causal_document": (0.1702, 0.0543),
    "document": (0.3402, 0.1085),
    "share_question": (0.093, 0.0296),
    "global_sliding": (0.1249, 0.122),
    "causal_blockwise": (0.3968, 0.1363),
    "prefix_lm_causal": (0.625, 0.625),
    "prefix_lm_document": (0.1787, 0.0567),
    "qk_sparse": (0.4639, 0.4748),
    "hash_sparse": (0.0313, 0.0312),
    "random_eviction": (0.378, 0.3779),
}


@pytest.mark.parametrize("seq_len", [256, 300])
@pytest.mark.parametrize("name", kernel_masks.MASKS)
def test_mask_mod_is_the_column_mask(name, seq_len):
    spec = kernel_masks.build(name, seq_len)
    at = torch.arange(seq_len, dtype=torch.int32)
    zero = torch.zeros((), dtype=torch.int32)
    visible = spec.mask_mod("cpu")(zero, zero, at[:, None], at[None, :])
    assert spec.name == name
    assert spec.mask.shape == (1, 1, seq_len, seq_len)
    assert torch.equal(spec.mask.to_dense()[0, 0], visible.expand(seq_len, seq_len))
    assert visible.any(-1).all()  # no kernel is asked for an empty row
    again = kernel_masks.build(name, seq_len)
    assert torch.equal(again.mask.bounds, spec.mask.bounds)


@pytest.mark.parametrize("name", kernel_masks.MASKS)
def test_density_is_the_published_one(name):
    for seq_len, density in zip((8192, 32768), DENSITY[name], strict=True):
        assert kernel_masks.build(name, seq_len).mask.density() == pytest.approx(density, abs=5.1e-5)


def test_documents_fill_the_row_and_hold_their_prefixes():
    for n in (*PAPER_DOCUMENTS, 256, 1000, 65536):
        assert sum(documents(n)) == n
        assert all(0 < prefix < length for prefix, length in zip(prefixes(n), documents(n), strict=True))
        assert len(dropped(n)) == len(documents(n))
        assert not dropped(n)[0]  # its first row would see nothing


def test_unknown_mask():
    with pytest.raises(ValueError, match="mask must be one of full, causal"):
        kernel_masks.build("diagonal", 256)
