"""DeepSpeed's Ulysses in two processes: half of every row in each, half of the heads in attention."""

import pytest
import torch

from tests.distributed.processes import Processes, own_device
from tests.huggingface.models import tiny, tokens

pytest.importorskip("deepspeed", reason="needs deepspeed: pip install hf-flashmask[deepspeed]")
pytestmark = pytest.mark.xdist_group("distributed")

MODELS = ("llama", "gemma2", "gpt_oss")
LENGTHS = {"packed": [5, 1, 9, 9], "one document": [24]}


def row(lengths):
    return tokens(1, 24), torch.cat([torch.arange(n) for n in lengths])[None]


def start_deepspeed():
    import deepspeed.comm
    import deepspeed.ops
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    deepspeed.ops.__compatible_ops__.clear()  # or processes on a CPU compile C++ first
    deepspeed.comm.init_distributed(dist_backend=torch.distributed.get_backend())
    # Of the model, only sizes matter, which all have in common.
    UlyssesSPAttentionHF.register_with_transformers(
        tiny("llama", "flashmask"), core_attn_implementation="flashmask", sequence_parallel_size=2, micro_batch_size=1
    )


def half_of_the_row(model_type, lengths):
    """Logits of this process's half, and gradients of the loss summed over both."""
    device = own_device()
    model = tiny(model_type, "flashmask").train().to(device)
    model.gradient_checkpointing_enable()
    first = 12 * torch.distributed.get_rank()
    ids, positions = (t[:, first : first + 12].to(device) for t in row(lengths))
    logits = model(ids, position_ids=positions, use_cache=False).logits
    logits.logsumexp(-1).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    for grad in grads.values():
        torch.distributed.all_reduce(grad)
    return logits.detach(), grads


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    started = Processes(tmp_path_factory.mktemp("deepspeed"), start_deepspeed)
    yield started
    started.stop()


@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("model_type", MODELS)
def test_logits_and_gradients_are_those_of_documents_alone(model_type, case, processes):
    check(processes.run(half_of_the_row, model_type, LENGTHS[case]), model_type, LENGTHS[case])


def check(halves, model_type, lengths, atol=1e-5):
    model = tiny(model_type, "eager").train()
    parts = row(lengths)[0].split(lengths, 1)
    expected = torch.cat([model(part, use_cache=False).logits for part in parts], 1)
    expected.logsumexp(-1).sum().backward()
    logits = torch.cat([logits.cpu() for logits, _ in halves], 1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=atol)
    for name, parameter in model.named_parameters():
        for _, grads in halves:
            error = float((grads[name].cpu() - parameter.grad).norm())
            assert error <= 10 * atol * max(1e-2, float(parameter.grad.norm())), name
