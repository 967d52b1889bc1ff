"""As torchtitan trains: a first step to make the states, all optimizers in a flat state dict."""

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import BF16, FP32, assert_same_bits, clones
from ranks import run
from test_resharding import steps
from test_shards import params_of, whole
from test_training import new_model, sharded_model
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import fastopt

pytestmark = pytest.mark.frameworks


class FlatState:
    """An optimizer that is saved as torch itself flattens its state."""

    FLAT = StateDictOptions(flatten_optimizer_state_dict=True)

    def __init__(self, model, settings):
        self.model = model
        self.optimizers = [fastopt.AdamW(model.parameters(), lr=0.01, **settings)]

    def step(self):
        self.optimizers[0].step()

    def state_dict(self):
        return get_optimizer_state_dict(self.model, self.optimizers, options=self.FLAT)

    def load_state_dict(self, state):
        set_optimizer_state_dict(self.model, self.optimizers, state, options=self.FLAT)


def container(model, settings):
    """torchtitan's, of two optimizers."""
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

    class Optimizers(OptimizersContainer):
        @staticmethod
        def _resolve_optimizer_factory(name):
            return getattr(fastopt, name)

    settings = {"lr": 0.01, **settings}
    groups = [
        ParamGroupConfig(pattern="bias", optimizer_name="Adam", optimizer_kwargs=settings),
        ParamGroupConfig(pattern=".", optimizer_name="AdamW", optimizer_kwargs=settings),
    ]
    return Optimizers(Optimizers.Config(param_groups=groups), model_parts=[model])


KINDS = {"torchtitan": container, "torch": FlatState}


def begin(kind, model, settings):
    """The first state dict makes a step of zero gradients and no rate: no parameter moves."""
    optimizers = KINDS[kind](model, settings)
    before = clones(map(whole, model.parameters()))
    assert not optimizers.optimizers[0].state
    optimizers.state_dict()
    assert optimizers.optimizers[0].state
    assert_same_bits(map(whole, model.parameters()), before)
    return optimizers


def save(folder, kind, dtype, settings):
    model = sharded_model("fsdp", dist.get_world_size(), dtype)
    optimizers = begin(kind, model, settings)
    steps(model, optimizers, range(3), dtype)
    state = {"model": model.state_dict(), "optimizer": optimizers.state_dict()}
    dcp.save(state, checkpoint_id=folder)


def load(folder, kind, dtype, settings):
    model = sharded_model("fsdp", dist.get_world_size(), dtype)
    optimizers = begin(kind, model, settings)
    state = {"model": model.state_dict(), "optimizer": optimizers.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    optimizers.load_state_dict(state["optimizer"])
    steps(model, optimizers, range(3, 5), dtype)
    other = new_model(dtype)
    twins = begin(kind, other, settings)
    steps(other, twins, range(5), dtype)
    assert_same_bits(map(whole, model.parameters()), other.parameters())
    for optimizer, twin in zip(optimizers.optimizers, twins.optimizers, strict=True):
        for param, its in zip(params_of(optimizer), params_of(twin), strict=True):
            for name, value in twin.state[its].items():
                assert_same_bits([whole(optimizer.state[param][name])], [value])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (FP32, {"max_norm": 1.0, "foreach": True, "fused": False}),
        (BF16, {"foreach": False, "fused": True}),
        (BF16, {"master_weights": "stochastic", "state_dtype": BF16}),
    ],
    ids=str,
)
def test_saved_on_two_ranks_loaded_on_three(tmp_path, kind, dtype, settings):
    pytest.importorskip(kind)
    run(2, save, tmp_path, kind, dtype, settings)
    run(3, load, tmp_path, kind, dtype, settings)
