"""Differentiation other than by autograd's backward is refused, never wrong; what only maps or traces works."""

import pytest
import torch
from torch.autograd import forward_ad

from hf_flashmask import flashmask_attention, masks


def attend(q, backend="auto"):
    return flashmask_attention(q, q, q, causal=True, backend=backend)


def dual(q, **options):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(attend(forward_ad.make_dual(q, q), **options)).tangent


REFUSED = {
    "jvp": (lambda q: torch.func.jvp(attend, (q,), (q,)), "no forward-mode derivative"),
    "jacfwd": (torch.func.jacfwd(attend), "no forward-mode derivative"),
    "a dual level": (dual, "no forward-mode derivative"),
    "grad": (torch.func.grad(lambda q: attend(q).sum()), "use torch.autograd.grad"),
    "grad of every row": (lambda q: torch.vmap(torch.func.grad(lambda x: attend(x).sum()))(q[None]), "torch.autograd"),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, grad):
    call, message = REFUSED[name]
    with torch.set_grad_enabled(grad), pytest.raises(NotImplementedError, match=message):
        call(torch.randn(1, 8, 2, 8))


def test_the_reference_has_them():
    q, step = torch.randn(1, 8, 2, 8, dtype=torch.float64), 1e-6
    expected = (attend(q * (1 + step)) - attend(q * (1 - step))) / (2 * step)
    torch.testing.assert_close(dual(q, backend="reference"), expected, atol=1e-7, rtol=1e-6)
    _, tangent = torch.func.jvp(lambda x: attend(x, "reference"), (q,), (q,))
    torch.testing.assert_close(tangent, expected, atol=1e-7, rtol=1e-6)


def test_maps_meta_tensors_and_levels_without_tangents():
    q = torch.randn(3, 1, 8, 2, 8)
    mask = masks.causal(8)
    torch.testing.assert_close(torch.vmap(attend)(q), torch.stack([attend(x) for x in q]))
    for grad in (True, False):
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            assert torch.equal(flashmask_attention(q[0], q[0], q[0], mask), attend(q[0]))
        with torch.set_grad_enabled(grad):
            assert attend(torch.empty(1, 8, 2, 8, device="meta")).shape == (1, 8, 2, 8)


def test_exports_with_any_length():
    class Model(torch.nn.Module):
        def forward(self, q):
            return attend(q)

    length = torch.export.Dim("length", min=2, max=1000)
    program = torch.export.export(Model(), (torch.randn(1, 16, 2, 8),), dynamic_shapes={"q": {1: length}}, strict=False)
    q = torch.randn(1, 37, 2, 8)
    assert torch.equal(program.module()(q), attend(q))
