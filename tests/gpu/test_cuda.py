"""On a CUDA device: the torch backend, and whole models, against the dense oracle. Skipped where there is none."""

import pytest
import torch

from hf_flashmask import ColumnMask, flashmask_attention, masks
from tests.helpers import random_mask, relative
from tests.huggingface.models import tiny, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MASKS = {
    "causal_document": masks.causal_document(lengths=[300, 1, 211]),
    "sliding_window": masks.sliding_window(512, 100),
    "random": random_mask(257, 511, causal=False, vectors=4, batch=2, heads=2),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("features", [False, True])
def test_torch_backend(name, dtype, tol, features):
    mask = MASKS[name].to("cuda")
    make = {"dtype": dtype, "device": "cuda"}
    inputs = [torch.randn(2, mask.q_len, 4, 64, **make), *(torch.randn(2, mask.kv_len, 2, 64, **make) for _ in "kv")]
    if features:
        inputs.append(torch.randn(4, **make))
    do = torch.randn(2, mask.q_len, 4, 64, device="cuda", dtype=torch.float64)

    def run(tensors, backend):
        tensors = [t.requires_grad_() for t in tensors]
        options = {"sinks": tensors[3], "softcap": 9.0} if features else {}
        out, lse = flashmask_attention(*tensors[:3], mask, return_lse=True, backend=backend, **options)
        loss = (out.double() * do).sum()
        if features:
            loss = loss + lse.masked_fill(lse == -torch.inf, 0.0).double().square().sum()
        return out, torch.autograd.grad(loss, tensors)

    out, grads = run(inputs, "torch")
    expected, expected_grads = run([t.detach().double() for t in inputs], "reference")
    assert relative(out.detach(), expected.detach()) <= tol
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert relative(grad, wanted) <= tol


def test_dense_masks_and_plans_from_a_device():
    mask = MASKS["random"].to("cuda")
    again = ColumnMask.from_dense(mask.to_dense())
    assert again.device.type == "cuda"
    assert torch.equal(again.to_dense(), mask.to_dense())


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_oss"])
def test_models(model_type):
    eager, ours = (tiny(model_type, name).to("cuda") for name in ("eager", "flashmask"))
    ids = tokens(2, 23).cuda()
    keep = torch.ones_like(ids)
    keep[1, :6] = 0
    torch.testing.assert_close(
        ours(ids, attention_mask=keep).logits[keep.bool()],
        eager(ids, attention_mask=keep).logits[keep.bool()],
        rtol=1e-4,
        atol=1e-4,
    )
    lengths = [5, 9, 9]
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None].cuda()
    alone = torch.cat([eager(part, use_cache=False).logits for part in ids[:1].split(lengths, 1)], 1)
    torch.testing.assert_close(ours(ids[:1], position_ids=position_ids).logits, alone, rtol=1e-4, atol=1e-4)
    common = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = eager.generate(ids, attention_mask=keep, **common)
    assert torch.equal(ours.generate(ids, attention_mask=keep, **common), expected)
