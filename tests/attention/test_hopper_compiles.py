"""The Hopper kernels compile with no GPU here: wgmma and TMA in the machine code, no spills, and they fit."""

import importlib.util
import subprocess
from pathlib import Path

import pytest
import torch

from hf_flashmask import ColumnMask

from .test_triton_compiles import Recorder, registers_and_stack
from .test_triton_compiles import compiled as compiled_portable

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the triton package")

ROOM = 227 * 1024


def launched(monkeypatch, *, dtype=torch.bfloat16, head_dim=128, causal=False, vectors=4, softcap=0.0, sinks=False):
    """The kernels and the arguments of the launches of a forward and a backward, by their names."""
    from hf_flashmask.attention.hopper import launch
    from hf_flashmask.attention.triton import plan

    seen = []
    for name in ("forward_kernel", "backward_kernel", "wide_backward_kernel", "prepare_kernel", "finish_kernel"):
        monkeypatch.setattr(launch, name, Recorder(getattr(launch, name), seen))
    for name in ("_columns_kernel", "_rows_kernel", "_order_kernel"):
        monkeypatch.setattr(plan, name, Recorder(getattr(plan, name), []))
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    mask = ColumnMask(torch.zeros(1, 1, vectors, 256, dtype=torch.int32), causal=causal)
    q, k, v = (torch.zeros(2, 256, heads, head_dim, dtype=dtype) for heads in (4, 2, 2))
    sinks = torch.zeros(4, dtype=dtype) if sinks else None
    out, lse = launch.forward(q, k, v, mask, 0.1, softcap, sinks)
    launch.backward(torch.zeros_like(out), torch.zeros_like(lse), q, k, v, out, lse, mask, 0.1, softcap, sinks)
    return {kernel.__name__: (kernel, arguments) for kernel, arguments in seen}


def compiled(kernel, arguments):
    """Ahead of time, with the types and the divisibility that Triton would find in the arguments at a launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    types = {
        torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int16: "i16"
    }  # fmt: skip
    signature, constants, attributes = {}, {}, {}
    for at, param in enumerate(kernel.params):
        value = arguments[param.name]
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            constants[at,] = value
        elif isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            signature[param.name] = f"tensordesc<{types[value.base.dtype]}[{block}],{value.layout!r}>"
        elif isinstance(value, torch.Tensor):
            signature[param.name] = f"*{types[value.dtype]}"
            attributes[at,] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "fp32" if isinstance(value, float) else "i32"
    source = GluonASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {name: arguments[name] for name in arguments.keys() - {param.name for param in kernel.params}}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def machine_code(cubin, folder):
    import triton

    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    return subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True, timeout=120).stdout


# What it is compiled for, and the bytes of stack a thread, which is where registers spill to: forward, backward. Triton
# 3.6 spills less: forward 8 at 64 and 256, else none, and backward 136, 96, 96, 40, 16, 280, 128, 32. Most of it is
# between pieces of work.
CASES = {
    "128, 4 bounds": ({"vectors": 4}, 0, 224),
    "128, causal": ({"causal": True, "vectors": 1}, 0, 160),
    "128, float16": ({"causal": True, "vectors": 1, "dtype": torch.float16}, 0, 136),
    "64, 4 bounds": ({"vectors": 4, "head_dim": 64}, 96, 96),
    "64, causal": ({"causal": True, "vectors": 1, "head_dim": 64}, 96, 56),
    "128, all features": ({"vectors": 4, "softcap": 30.0, "sinks": True}, 0, 344),
    "256, all features": ({"vectors": 4, "softcap": 30.0, "sinks": True, "head_dim": 256}, 24, 168),
    "256, causal": ({"causal": True, "vectors": 1, "head_dim": 256}, 24, 72),
}


@pytest.mark.parametrize("kernel", ["forward_kernel", "backward_kernel"])
@pytest.mark.parametrize("name", CASES)
def test_wgmma_and_tma_and_few_spills(kernel, name, monkeypatch, tmp_path, record_property):
    options, *stack = CASES[name]
    kernels = launched(monkeypatch, **options)
    result = compiled(*kernels[kernel if kernel in kernels else f"wide_{kernel}"])
    assert result.metadata.shared <= ROOM
    code = machine_code(result.asm["cubin"], tmp_path)
    assert "HGMMA" in code
    assert "UTMALDG" in code
    assert "UTMASTG" in code
    # dq is added to its buffer by TMA, at 256 from registers, four numbers at a time.
    added = "UTMAREDG" if kernel in kernels else "REDG.E.ADD.F32x4"
    assert (added in code) == (kernel == "backward_kernel")
    usage = registers_and_stack(result.asm["cubin"], tmp_path)
    for what, value in zip(("registers", "stack", "shared"), (*usage, result.metadata.shared), strict=True):
        record_property(what, value)
    assert usage[1] <= stack[kernel == "backward_kernel"], usage
    # A wait after every product is what a compiler that serialises them leaves.
    assert code.count("WARPGROUP.DEPBAR") < code.count("HGMMA") // 2


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_before_and_after_the_backward(head_dim, monkeypatch, tmp_path):
    kernels = launched(monkeypatch, head_dim=head_dim)
    for name in ("prepare_kernel", "finish_kernel"):
        result = compiled_portable(*kernels[name], (9, 0))
        assert registers_and_stack(result.asm["cubin"], tmp_path)[1] == 0


@pytest.mark.parametrize(("head_dim", "teams"), [(64, 2), (128, 1)])
def test_as_few_heads_at_a_time_as_keep_all_busy(head_dim, teams, monkeypatch):
    """Of 132 multiprocessors, by lines of 128 rows or keys: 256 tokens are two."""
    found = launched(monkeypatch, head_dim=head_dim)
    assert found["forward_kernel"][1]["head_group"] == 132 * teams // 2
    assert found["backward_kernel"][1]["head_group"] == 132 // 2
