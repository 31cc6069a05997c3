"""The kernels compile for every supported GPU, ahead of time and with no GPU here: they fit, and spill little.

The launching code runs with kernels that record what they are given instead of running, so what is compiled is what
is launched.
"""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from hf_flashmask import ColumnMask

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the triton package")

KIB = 1024
# Shared memory that a block can have, by compute capability.
ROOM = {(8, 0): 163 * KIB, (8, 6): 99 * KIB, (8, 9): 99 * KIB, (9, 0): 227 * KIB, (10, 0): 227 * KIB, (12, 0): 99 * KIB}
AMD = (0, 0)  # what the launching code calls a ROCm device
ROOM[AMD] = 64 * KIB
# Registers and memory are most at four bounds; one causal bound is what most training has.
MASKS = {"4 bounds": (False, 4), "causal": (True, 1)}


class Recorder:
    """Stands in for a kernel: remembers it and the arguments of its launch."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            names = [name for name in self.kernel.arg_names if name not in kwargs]
            self.launches.append((self.kernel, {**dict(zip(names, args, strict=False)), **kwargs}))

        return launch


def launches(monkeypatch, capability, dtype, head_dim, causal, vectors):
    """(kernel, arguments) of all launches of a forward and a backward on such a device, in their order."""
    from hf_flashmask.attention.triton import launch, plan

    seen = []
    for module, name in (
        (launch, "forward_kernel"), (launch, "dq_kernel"), (launch, "dkdv_kernel"),
        (plan, "_columns_kernel"), (plan, "_rows_kernel"), (plan, "_order_kernel"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, Recorder(getattr(module, name), seen))
    monkeypatch.setattr(launch, "_device", lambda device: (capability, ROOM[capability]))
    mask = ColumnMask(torch.zeros(1, 1, vectors, 256, dtype=torch.int32), causal=causal)
    q, k, v = (torch.zeros(2, 256, heads, head_dim, dtype=dtype) for heads in (4, 2, 2))
    sinks = torch.zeros(4, dtype=dtype)
    softcap = 30.0 if vectors == 4 else 0.0
    out, lse = launch.forward(q, k, v, mask, 0.1, softcap, sinks)
    launch.backward(torch.zeros_like(out), torch.zeros_like(lse), q, k, v, out, lse, mask, 0.1, softcap, sinks)
    return seen


def compiled(kernel, arguments, capability):
    """Ahead of time, with the types and the divisibility that Triton would find in the arguments at a launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.tools.tensor_descriptor import TensorDescriptor

    types = {
        torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int16: "i16",
        torch.int64: "i64",
    }  # fmt: skip
    signature, constants, attributes = {}, {}, {}
    for at, param in enumerate(kernel.params):
        value = arguments[param.name]
        divisible = False
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            constants[at,] = value
        elif isinstance(value, TensorDescriptor):
            signature[param.name] = f"tensordesc<{types[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, torch.Tensor):
            signature[param.name] = f"*{types[value.dtype]}"
            divisible = True
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        else:
            signature[param.name] = "i32"
            divisible = value % 16 == 0 and not param.do_not_specialize
        if divisible:
            attributes[at,] = [["tt.divisibility", 16]]
    options = {name: arguments[name] for name in arguments.keys() - {param.name for param in kernel.params}}
    cuda = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("hip", "gfx942", 64) if capability == AMD else cuda,
        options=options,
    )


def registers_and_stack(cubin, folder):
    """(registers, bytes of stack) a thread, or None without the tool that knows."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    tool = tool if tool.exists() else shutil.which("cuobjdump")
    if tool is None:
        return None
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    report = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True, timeout=60).stdout
    return tuple(map(int, re.search(r"REG:(\d+) STACK:(\d+)", report).groups()))


# What most run on in full; elsewhere what needs most of a device. The last number bounds the bytes of stack a thread,
# which is where registers spill to: a third more than the worst of Triton 3.6 and 3.9.
CASES = [
    ((9, 0), torch.bfloat16, 64, "4 bounds", 32),
    ((9, 0), torch.bfloat16, 128, "4 bounds", 384),
    ((9, 0), torch.bfloat16, 128, "causal", 128),
    ((9, 0), torch.bfloat16, 256, "4 bounds", 800),
    ((9, 0), torch.float32, 64, "4 bounds", 96),
    ((8, 0), torch.bfloat16, 128, "4 bounds", 320),
    ((8, 6), torch.bfloat16, 128, "4 bounds", 160),
    ((8, 9), torch.bfloat16, 256, "4 bounds", 64),
    ((10, 0), torch.bfloat16, 128, "4 bounds", 192),
    ((12, 0), torch.bfloat16, 128, "4 bounds", 160),
]


@pytest.mark.parametrize("name", ["forward_kernel", "dq_kernel", "dkdv_kernel"])
@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "mask", "stack"),
    CASES,
    ids=lambda value: f"sm_{value[0]}{value[1]}" if isinstance(value, tuple) else str(value).removeprefix("torch."),
)
def test_fits_and_spills_little(name, capability, dtype, head_dim, mask, stack, monkeypatch, tmp_path, record_property):
    seen = launches(monkeypatch, capability, dtype, head_dim, *MASKS[mask])
    ((kernel, arguments),) = [case for case in seen if case[0].__name__ == name]
    result = compiled(kernel, arguments, capability)
    ptx = result.asm["ptx"]
    assert "trap;" not in ptx
    assert result.metadata.shared <= ROOM[capability]
    if arguments["TMA"]:
        assert "cp.async.bulk.tensor" in ptx
    if capability == (9, 0) and dtype == torch.bfloat16:
        assert arguments["TMA"]
        assert "wgmma.mma_async" in ptx
    usage = registers_and_stack(result.asm["cubin"], tmp_path)
    if usage is not None:
        for what, value in zip(("registers", "stack", "shared"), (*usage, result.metadata.shared), strict=True):
            record_property(what, value)
        assert usage[1] <= stack, f"{usage[0]} registers, {usage[1]} bytes of stack"


def decode_launches(monkeypatch, capability, dtype, head_dim, causal, vectors, q_len, paged=False):
    """(kernel, arguments) of both launches for few queries; ``paged``, of keys that a block table leads to."""
    from hf_flashmask.attention.triton import decode_launch, launch

    seen = []

    def run(kernel, grid, key, arguments, options):
        seen.append((kernel, {**dict(zip(kernel.arg_names, arguments, strict=True)), **options}))

    monkeypatch.setattr(decode_launch, "_run", run)
    monkeypatch.setattr(decode_launch, "has_pdl", lambda device: capability >= (9, 0))
    decode_launch._launch.cache_clear()
    monkeypatch.setattr(launch, "_device", lambda device: (capability, ROOM[capability]))
    mask = ColumnMask(torch.zeros(2, 1, vectors, 4096, dtype=torch.int32), causal=causal, q_len=q_len)
    q, k, v = (torch.zeros(2, n, h, head_dim, dtype=dtype) for n, h in ((q_len, 8), (4096, 2), (4096, 2)))
    table = None
    if paged:
        k, v = (t.view(32, 256, 2, head_dim) for t in (k, v))
        table = torch.zeros(2, 16, dtype=torch.int32)
    decode_launch.forward(q, k, v, mask, 0.1, 30.0 if vectors == 4 else 0.0, torch.zeros(8), table)
    return seen


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "mask", "q_len", "paged", "stack"),
    [
        ((9, 0), torch.bfloat16, 128, "causal", 1, False, 64),
        ((9, 0), torch.bfloat16, 128, "causal", 1, True, 64),
        ((8, 0), torch.bfloat16, 128, "4 bounds", 8, False, 160),
        ((8, 6), torch.bfloat16, 256, "causal", 1, True, 64),
        ((8, 9), torch.float32, 64, "4 bounds", 4, False, 160),
        ((10, 0), torch.bfloat16, 128, "causal", 16, False, 256),
        ((12, 0), torch.float16, 128, "4 bounds", 1, False, 64),
    ],
    ids=lambda value: f"sm_{value[0]}{value[1]}" if isinstance(value, tuple) else str(value).removeprefix("torch."),
)
def test_decode(capability, dtype, head_dim, mask, q_len, paged, stack, monkeypatch, tmp_path, record_property):
    (decode, arguments), (combine, others) = decode_launches(
        monkeypatch, capability, dtype, head_dim, *MASKS[mask], q_len, paged
    )
    result = compiled(decode, arguments, capability)
    assert "trap;" not in result.asm["ptx"]
    assert result.metadata.shared <= ROOM[capability]
    # Loads of later blocks are under way while a block is computed.
    assert result.asm["ptx"].count("cp.async.wait_group") >= 2
    usage = registers_and_stack(result.asm["cubin"], tmp_path)
    if usage is not None:
        record_property("registers", usage[0])
        record_property("stack", usage[1])
        assert usage[1] <= stack, f"{usage[0]} registers, {usage[1]} bytes of stack"
    if q_len == 1:
        assert "trap;" not in compiled(combine, others, capability).asm["ptx"]


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)], ids=lambda c: f"sm_{c[0]}{c[1]}")
@pytest.mark.parametrize("mask", MASKS)
def test_plan_kernels(capability, mask, monkeypatch, tmp_path):
    seen = launches(monkeypatch, capability, torch.bfloat16, 64, *MASKS[mask])
    plan = [case for case in seen if case[0].__name__.startswith("_")]
    assert {kernel.__name__ for kernel, _ in plan} == {"_columns_kernel", "_rows_kernel", "_order_kernel"}
    for kernel, arguments in plan:
        result = compiled(kernel, arguments, capability)
        assert "trap;" not in result.asm["ptx"]
        assert result.metadata.shared <= ROOM[capability]
        usage = registers_and_stack(result.asm["cubin"], tmp_path)
        assert usage is None or usage[1] <= 320, (kernel.__name__, usage)


def reorder_launches(monkeypatch, head_dim):
    from hf_flashmask.attention.triton import reorder

    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(reorder, "reorder_kernel", Recorder(reorder.reorder_kernel, seen))
        x = torch.zeros(2, 256, 2, head_dim, dtype=torch.bfloat16)
        reorder.reorder(x, torch.zeros(1, 1, 256, dtype=torch.int64))
    return seen


@pytest.mark.parametrize("capability", [c for c in ROOM if c != AMD], ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_moving_keys(capability, monkeypatch, tmp_path):
    for head_dim in (64, 96):
        ((kernel, arguments),) = reorder_launches(monkeypatch, head_dim)
        result = compiled(kernel, arguments, capability)
        assert {"ld.global.v4.b32", "st.global.v4.b32"} <= set(result.asm["ptx"].split())  # 16 bytes at a time
        usage = registers_and_stack(result.asm["cubin"], tmp_path)
        assert usage is None or usage[1] == 0, usage


def test_amd(monkeypatch):
    seen = launches(monkeypatch, AMD, torch.bfloat16, 64, *MASKS["causal"])
    seen += decode_launches(monkeypatch, AMD, torch.bfloat16, 64, *MASKS["causal"], q_len=1)
    seen += reorder_launches(monkeypatch, 64)
    for kernel, arguments in seen:
        result = compiled(kernel, arguments, AMD)
        assert "hsaco" in result.asm
        assert result.metadata.shared <= ROOM[AMD]
