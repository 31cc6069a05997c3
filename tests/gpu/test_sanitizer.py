"""NVIDIA's compute-sanitizer over a forward and a backward: accesses out of bounds, races in shared memory."""

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SANITIZER = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer"),
]

# A length that fills no tile, several pieces of work a program at grouped heads, rows and columns that see nothing.
PROGRAM = """
import sys
import torch
from hf_flashmask import ColumnMask, flashmask_attention, masks

bounds = masks.causal_document(lengths=[130, 300, 23]).bounds.clone()
bounds[..., 128:256] = 0
mask = ColumnMask(bounds, causal=True).to("cuda")
for head_dim in (64, 128, 256):
    q, k, v = (
        torch.randn(2, 453, heads, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (4, 2, 2)
    )
    out = flashmask_attention(q, k, v, mask, backend=sys.argv[1])
    grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    assert all(g.isfinite().all() for g in (out, *grads))
print("computed")
"""


def handed_on():
    """``file:line`` of what racecheck reports although it is no race.

    It does not follow what all threads of a warp or warpgroup write before one of them arrives at an mbarrier (scalars,
    P of the wide backward), nor the state in which Triton tells warps their partition, written where a kernel begins.
    """
    from hf_flashmask.attention.hopper import primitives, schedule
    from hf_flashmask.attention.hopper.backward import backward_kernel
    from hf_flashmask.attention.hopper.forward import forward_kernel
    from hf_flashmask.attention.hopper.wide_backward import _differentiate, _weigh, wide_backward_kernel

    scalars = (primitives.read_scalar, primitives.write_scalar, schedule.read_work, schedule.read_list)
    places = {place for f in (*scalars, forward_kernel, backward_kernel, wide_backward_kernel) for place, _ in lines(f)}
    return places | {place for f in (_weigh, _differentiate) for place, code in lines(f) if "p_s.index" in code}


def lines(kernel):
    """(``file:line``, code) of a kernel, or of a function that kernels call."""
    name = Path(inspect.getsourcefile(kernel.fn)).name
    code, first = inspect.getsourcelines(kernel.fn)
    return [(f"{name}:{first + i}", line) for i, line in enumerate(code)]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("backend", ["triton", "hopper"])
def test_clean(backend, tool):
    if backend == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    arguments = [sys.executable, "-c", PROGRAM, backend]
    # Every tensor an allocation of its own, or a neighbour's memory would count as a tensor's.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    options = {"capture_output": True, "text": True, "timeout": 500, "env": environment}
    subprocess.run(arguments, check=True, **options)  # compiles
    result = subprocess.run([SANITIZER, "--tool", tool, *arguments], **options)
    report = result.stdout + result.stderr
    if "Device not supported" in report:
        pytest.skip("compute-sanitizer cannot read this device")
    assert "computed" in report, report[-2000:]
    assert re.search(r"ERROR SUMMARY: \d+ error|RACECHECK SUMMARY: \d+ hazard", report), report[-2000:]
    if tool == "racecheck" and backend == "hopper":
        places = re.findall(r"(?:Read|Write) access at \w+\+0x[0-9a-f]+ in (\S+\.py:\d+)", report)
        assert places
        assert not set(places) - handed_on(), report[:4000]
    else:
        assert re.search(r"SUMMARY: 0 (?:error|hazard)", report), report[:4000]
