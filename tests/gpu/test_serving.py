"""Continuous batching on a GPU: the kernels under its masks, and steps that are captured once and replayed."""

import pytest
import torch

from hf_flashmask.huggingface.paged import _MODELS_UPDATE
from tests.huggingface.models import tiny
from tests.huggingface.test_paged import PAGE, alone, in_batches

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(
    ("model_type", "cuda_graphs"),
    # Transformers' float32 experts read counts on the host, which no graph can capture.
    [("llama", False), ("llama", True), ("gemma2", False), ("gemma2", True), ("gpt_oss", False)],
)
def test_requests_are_answered_as_if_alone(model_type, cuda_graphs):
    options = {"num_hidden_layers": 2} if model_type == "llama" else {"num_hidden_layers": 2, "sliding_window": 5}
    expected = alone(tiny(model_type, "eager", **options).cuda())
    ours = tiny(model_type, "flashmask", **options).cuda()
    assert in_batches(ours, use_cuda_graph=cuda_graphs) == expected


@pytest.mark.skipif(not _MODELS_UPDATE, reason="block tables are followed from Transformers 5.24 on")
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_block_tables_are_followed(cuda_graphs):
    """Pages that the kernels' blocks fit into; requests of one page and of two."""
    expected = alone(tiny("llama", "eager", num_hidden_layers=2, max_position_embeddings=512).cuda())
    ours = tiny("llama", "flashmask", num_hidden_layers=2, max_position_embeddings=512).cuda()
    pages = {PAGE: 128, "num_blocks": 20, "max_blocks_per_request": 2}
    assert in_batches(ours, use_cuda_graph=cuda_graphs, **pages) == expected
