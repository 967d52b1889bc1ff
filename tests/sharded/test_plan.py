"""What ``python -m bench plan`` says of a device's memory is what a rank has."""

import pytest
import torch
from ranks import run
from torch.distributed.fsdp import fully_shard

import fastopt
from bench import scale
from bench.contenders import Rule
from bench.modes import MODES


def bytes_here(mode):
    """Of parameters, gradients, and states, steps left out, after a step under FSDP2."""
    torch.manual_seed(0)
    layers = torch.nn.Embedding(1024, 512), torch.nn.Linear(512, 256), torch.nn.Linear(256, 512)
    model = torch.nn.Sequential(*layers).to(mode.dtype)
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = fastopt.AdamW(model.parameters(), **mode.settings)
    model(torch.arange(9)).sum().backward()
    optimizer.step()
    kept = [torch.Tensor()]
    for param in model.parameters():
        states = [value for name, value in optimizer.state[param].items() if name != "step"]
        kept += [whole.to_local() for whole in (param, param.grad, *states)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    elements = sum(param.numel() for param in model.parameters())
    return sum(storages.values()), elements


@pytest.mark.parametrize("name", MODES)
def test_memory(name):
    mode = MODES[name]
    cost = scale.counted(mode, Rule(fastopt.AdamW, {}))
    for found, elements in run(2, bytes_here, mode):
        asked = scale.Asked(elements, 2, scale.FSDP, 0, link=None, latency_us=0)
        memory = scale.planned(asked, cost, scale.Speed(1.0)).memory_bytes["all"]
        # Biases have states in fp32; checksums are not in the state.
        assert found == pytest.approx(memory, rel=0.01)
