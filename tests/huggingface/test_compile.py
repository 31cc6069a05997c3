"""Forward and training step under torch.compile: one graph, few of them, the same results."""

import pytest
import torch
from torch._dynamo.utils import counters

from hf_flashmask import masks
from tests.huggingface.models import tiny, tokens


def packed(n):
    return {"position_ids": torch.cat([torch.arange(9), torch.arange(n - 9)])[None]}


def padded(n):
    return {"attention_mask": (torch.arange(n) < n - 3).long()[None]}


def mask_of_the_user(n):
    return {"attention_mask": masks.share_question([[7, 4, n - 11]]), "position_ids": torch.arange(n)[None]}


def step(model, run, ids, inputs):
    model.zero_grad()
    loss = run(ids, labels=ids, use_cache=False, **inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


# Gemma 2: a window in every second layer. Tracing is what breaks graphs, so one case is enough for what follows it.
@pytest.mark.parametrize(
    ("model_type", "layers", "inputs_of", "backend"),
    [
        ("gemma2", 2, packed, "eager"),
        ("llama", 1, padded, "eager"),
        ("llama", 1, mask_of_the_user, "aot_eager"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_training_step_in_one_graph_for_any_length(model_type, layers, inputs_of, backend):
    torch._dynamo.reset()
    counters.clear()
    model = tiny(model_type, "flashmask", num_hidden_layers=layers).train()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for n in (23, 31, 40):
        ids, inputs = tokens(1, n), inputs_of(n)
        expected, actual = (step(model, run, ids, inputs) for run in (model, compiled))
        torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=1e-5)
        for name, wanted in expected[1].items():
            torch.testing.assert_close(actual[1][name], wanted, rtol=1e-4, atol=1e-5, msg=name)
    # The first length, then one for all.
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
