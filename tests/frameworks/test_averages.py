"""torch.optim.swa_utils, with masters and with learning rates of its own."""

import pytest
import recipes
import torch
from helpers import BF16, assert_near_torch, assert_same_bits

import fastopt

pytestmark = pytest.mark.frameworks


def test_masters_are_averaged_and_survive_the_swap():
    names = recipes.run("Averaged weights")
    again = recipes.run()
    model = fastopt.prepare(again.model)
    optimizer = fastopt.AdamW(model.parameters(), lr=1e-2, max_norm=0.5)
    averages = None
    for inputs, targets in again.loader:
        optimizer.zero_grad()
        again.mse_loss(model(inputs.to(BF16)), targets.to(BF16)).backward()
        optimizer.step()
        masters = [master.clone() for master in optimizer.master_params()]
        averages = averages or masters
        averages = [old.lerp(new, 1 - 0.9) for old, new in zip(averages, masters, strict=True)]
    assert_same_bits(names.averaged.module.parameters(), averages)
    assert not any(map(torch.equal, masters, model.parameters()))
    for each in names, again:
        recipes.loss(each.model, 0).backward()
    assert_same_bits(names.optimizer.master_params(), masters)
    names.optimizer.step()
    optimizer.step()
    assert_same_bits(names.optimizer.master_params(), optimizer.master_params())


def test_stochastic_weight_averaging():
    found, wanted = recipes.check_as_torch("Stochastic weight averaging")
    assert_near_torch(found.averaged.parameters(), wanted.averaged.parameters())
    torch.testing.assert_close([*found.averaged.buffers()], [*wanted.averaged.buffers()])
    assert found.averaged.n_averaged == 4
    assert [rates for rates, _ in found.steps[::8]] == [[0.01], [0.0055], [0.001], [0.001]]
