"""Which backend serves which pass, with the devices that this is about made up."""

import pytest
import torch

from hf_flashmask import flashmask_attention
from hf_flashmask.attention import backends, op

LONG = backends.HOPPER_AUTO_LENGTH
LONG_64 = backends.HOPPER_FORWARD_LENGTH[64]


@pytest.mark.parametrize(
    ("asked", "length", "head_dim", "deterministic", "forward", "backward"),
    [
        ("auto", LONG, 128, False, "hopper", "hopper"),
        ("auto", LONG, 64, False, "triton", "hopper"),
        ("auto", LONG_64 - 1, 64, False, "triton", "hopper"),
        ("auto", LONG_64, 64, False, "hopper", "hopper"),
        ("auto", LONG_64, 64, True, "hopper", "triton"),
        ("auto", LONG - 1, 64, False, "triton", "triton"),
        ("auto", LONG, 96, False, "triton", "triton"),
        ("auto", LONG, 128, True, "hopper", "triton"),
        ("auto", LONG, 64, True, "triton", "triton"),
        ("triton", LONG, 64, False, "triton", "triton"),
        ("hopper", 1, 24, False, "hopper", "hopper"),
        ("hopper", 1, 24, True, "hopper", "triton"),
    ],
)
def test_on_a_hopper_gpu(asked, length, head_dim, deterministic, forward, backward, monkeypatch):
    monkeypatch.setattr(backends, "_triton_obstacle", lambda q, v: None)
    monkeypatch.setattr(backends, "_hopper_obstacle", lambda q, k, v: None)
    q = torch.empty(1, length, 1, head_dim, device="meta", dtype=torch.bfloat16)
    assert backends.choose(asked, q, q, q) == forward
    assert backends.choose_backward(asked, q, q, q, deterministic=deterministic) == backward


@pytest.mark.parametrize(("argument", "switch"), [(False, False), (True, False), (False, True)])
def test_deterministic_reaches_the_operator(argument, switch, monkeypatch):
    given, attention = [], op.attention
    monkeypatch.setattr(op, "attention", lambda *args: given.append(args[-2]) or attention(*args))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: switch)
    q = torch.randn(1, 5, 1, 8)
    flashmask_attention(q, q, q, deterministic=argument)
    assert given == [argument or switch]
