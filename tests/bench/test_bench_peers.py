"""Peers do the work that they are timed for: every rule, as torch's for-loop does it in fp64."""

import pytest
import torch
from helpers import new_params, set_grads, torch_class

from bench import peers
from bench.contenders import Fastopt, UnavailableError, rules

#: Some states are of 8 bits from 4096 elements on.
SHAPES = [(64, 64), (100,), (7,)]
#: Those that compile take minutes.
CASES = [
    pytest.param(kind, id=kind.name, marks=[pytest.mark.full] if kind.compiles else [])
    for kind in peers.PEERS
]


def tolerance(kind, dtype, wanted, before):
    """How far a peer may be from the truth.

    Each step rounds the parameter, and some states, to its dtype: 8 eps in all. The arithmetic is
    in fp32, in which bias corrections of cancelling numbers lose most: measured 33 eps (heavyball).
    Of states of 8 bits the update has the error, of which the largest was a fifth of the largest
    update (RMSprop, of a square that an earlier step had rounded).
    """
    eps = 8 * torch.finfo(dtype).eps + 64 * torch.finfo(torch.float32).eps
    of_update = 0.25 if "8bit" in kind.adds else 0
    return eps * wanted.abs().clamp(min=1) + of_update * (wanted - before).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", rules(all_variants=True), ids=lambda rule: rule.name)
@pytest.mark.parametrize("kind", CASES)
def test_a_peer_does_what_torch_does(kind, rule, dtype, monkeypatch):
    monkeypatch.setattr(peers, "LR", 0.1)  # the benchmarks' moves no parameter of 16 bits
    params = new_params(SHAPES, dtype)
    before = [param.detach().double() for param in params]
    set_grads(params, 0)
    try:
        peer = kind(rule, params)
    except (UnavailableError, NotImplementedError) as reason:
        pytest.skip(str(reason))
    wanted = [value.clone().requires_grad_() for value in before]
    truth = torch_class(rule.optimizer)(wanted, lr=0.1, **rule.flags)
    for step in range(3):
        set_grads(params, step)
        for value, param in zip(wanted, params, strict=True):
            value.grad = param.grad.double()
        peer.run()
        truth.step()
        # The benchmarks renew small gradients only.
        assert all(param.grad is not None for param in params)
    for found, value, start in zip(params, wanted, before, strict=True):
        assert not torch.equal(found.detach().double(), start)
        error = (found.detach().double() - value.detach()).abs()
        assert (error <= tolerance(kind, dtype, value.detach(), start)).all()


def test_names_and_availability():
    assert len({kind.name for kind in peers.PEERS}) == len(peers.PEERS)
    assert peers.availability(Fastopt) == ""
    for kind in (peers.FlashOptim, peers.Apex):
        reason = peers.availability(kind, "cpu")
        assert reason.startswith(kind.name) or kind.package in reason
        with pytest.raises(UnavailableError, match=reason):
            kind(rules()[0], new_params([(3,)]))
