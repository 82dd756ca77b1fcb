"""The linear layer gives F.linear's numbers whichever library computes them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vit_cls.model import linear as module
from vit_cls.model.linear import MIN_ROWS, Linear, linear


class _Convolutions(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "convolution" in str(func)
        return func(*args, **(kwargs or {}))


def _convolutions(tokens, weight, bias) -> int:
    with _Convolutions() as mode:
        linear(tokens, weight, bias)
    return mode.count


@pytest.fixture
def onednn(monkeypatch):
    monkeypatch.setattr(module, "USE_ONEDNN", True)


def _case(generator, shape=(5, 197, 48), out=64, bias=True, dtype=torch.float32):
    tokens = torch.randn(shape, generator=generator, dtype=dtype)
    weight = torch.randn(out, shape[-1], generator=generator, dtype=dtype)
    return tokens, weight, torch.randn(out, generator=generator, dtype=dtype) if bias else None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("narrow", [False, True])
def test_outputs_and_gradients_are_those_of_the_reference(bias, narrow, onednn, generator):
    results = []
    case = _case(generator, bias=bias)
    upstream = torch.randn(5, 196 if narrow else 197, 64, generator=generator)
    for function in (F.linear, linear):
        inputs = [t.clone().requires_grad_() for t in case if t is not None]
        tokens = inputs[0][:, 1:] if narrow else inputs[0]
        out = function(tokens, inputs[1], inputs[2] if bias else None)
        out.backward(upstream)
        results.append([out.detach(), *(t.grad for t in inputs)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5 * expected.abs().max().item())


def test_full_precision_is_kept(onednn, generator):
    tokens, weight, bias = _case(generator)
    exact = F.linear(tokens.double(), weight.double(), bias.double())
    assert (linear(tokens, weight, bias) - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_the_fast_path_is_taken_for_fp32_token_sequences_only(onednn, generator):
    assert _convolutions(*_case(generator)) == 1
    assert _convolutions(*_case(generator, dtype=torch.float64)) == 0
    assert _convolutions(*_case(generator, shape=(200, 1, 48))) == 0
    assert _convolutions(*_case(generator, shape=(1, MIN_ROWS - 1, 48))) == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _convolutions(*_case(generator)) == 0


def test_other_machines_use_the_reference(monkeypatch, generator):
    monkeypatch.setattr(module, "USE_ONEDNN", False)
    case = _case(generator)
    assert _convolutions(*case) == 0
    assert torch.equal(linear(*case), F.linear(*case))


def test_the_layer_has_torchs_parameters(onednn, generator):
    torch.manual_seed(0)
    ours = Linear(48, 64)
    torch.manual_seed(0)
    theirs = torch.nn.Linear(48, 64)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert list(ours.state_dict()) == list(theirs.state_dict())
