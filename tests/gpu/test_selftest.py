"""`flashmask check` on a GPU: whatever it gets to in its time is right."""

import pytest
import torch

from hf_flashmask.diagnostics import selftest

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_nothing_fails():
    text, ok = selftest.run(budget=30.0)
    assert ok, text
    assert "cuda" in text
