"""Continuous batching on a GPU: the kernels under its masks, and steps that are captured once and replayed."""

import pytest
import torch

from tests.huggingface.models import tiny
from tests.huggingface.test_paged import alone, in_batches

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_requests_are_answered_as_if_alone(model_type, cuda_graphs):
    options = {"num_hidden_layers": 2, "sliding_window": 5} if model_type == "gpt_oss" else {"num_hidden_layers": 2}
    expected = alone(tiny(model_type, "eager", **options).cuda())
    ours = tiny(model_type, "flashmask", **options).cuda()
    assert in_batches(ours, use_cuda_graph=cuda_graphs) == expected
