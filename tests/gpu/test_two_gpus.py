"""Two GPUs: data parallelism over NCCL, and one model's layers on both."""

import pytest
import torch

from tests.distributed import test_wrappers as wrappers
from tests.distributed.processes import Processes
from tests.huggingface.models import tiny, tokens

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.xdist_group("two GPUs"),
]


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    started = Processes(tmp_path_factory.mktemp("nccl"), backend="nccl")
    yield started
    started.stop()


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("batch_of", "checkpointing", "share"),
    [(wrappers.padded, False, None), (wrappers.packed, True, None), (wrappers.prompts, True, "around")],
    ids=["padded", "packed, checkpointed", "shared prompts, checkpointed"],
)
def test_loss_and_gradients(batch_of, checkpointing, share, wrapper, processes):
    results = processes.run(wrappers.in_two, batch_of, wrapper, checkpointing, share)
    wrappers.check(results, batch_of, 1e-4, rel=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_layers_on_two_devices(cache):
    """Masks and plans are made once a device; padding on the left."""
    from accelerate import dispatch_model

    ids = tokens(2, 20)
    keep = torch.ones_like(ids)
    keep[1, :6] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    expected = tiny("gemma2", "eager").generate(ids, attention_mask=keep, **options)
    ours = tiny("gemma2", "flashmask")
    parts = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 0, "model.layers.2": 1}
    ours = dispatch_model(ours, {**parts, "model.layers.3": 1, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 0})
    assert {p.device.index for p in ours.parameters()} == {0, 1}
    ids, keep = ids.cuda(0), keep.cuda(0)
    actual = ours.generate(ids, attention_mask=keep, cache_implementation=cache, **options)
    assert torch.equal(actual.cpu(), expected)
