"""DeepSpeed's ZeRO gives the optimizer of each rank a part of the gradients."""

import pytest
import torch
import torch.distributed as dist
from helpers import assert_near_torch
from ranks import run
from test_training import new_model

import fastopt

pytestmark = pytest.mark.frameworks


def clip(stage, settings, gradient_clipping):
    """The optimizer and the parameters after three steps."""
    import deepspeed

    # An all-reduce between the ranks of a machine, which takes two minutes to compile.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = new_model()
    optimizer = fastopt.SGD(model.parameters(), lr=0.1, **settings)
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": gradient_clipping,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(3):
        generator = torch.Generator().manual_seed(10 * dist.get_rank() + step)
        engine.backward(engine(torch.randn(8, 5, generator=generator)).square().sum())
        engine.step()
    return optimizer.grad_norm, engine.get_global_grad_norm(), [*engine.parameters()]


def both():
    for stage in (1, 2):
        _, wanted_norm, wanted = clip(stage, {}, 0.5)
        settings = {"max_norm": 0.5, "norm_group": dist.group.WORLD}
        norm, _, found = clip(stage, settings, 0.0)
        assert norm > 0.5
        torch.testing.assert_close(norm, wanted_norm)
        assert_near_torch(found, wanted)


def test_norm_group():
    pytest.importorskip("deepspeed")
    run(2, both)
