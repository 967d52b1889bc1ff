"""DeepSpeed's engine around a client optimizer, in a world of one rank."""

import pytest
import recipes
import torch
from helpers import assert_near_torch, assert_same_bits

import fastopt

pytestmark = pytest.mark.frameworks


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory):
    deepspeed = pytest.importorskip("deepspeed")
    # An all-reduce between the ranks of a machine, which takes two minutes to compile.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    store = tmp_path_factory.mktemp("world") / "store"
    deepspeed.init_distributed("gloo", False, init_method=f"file://{store}", rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        yield deepspeed
    deepspeed.comm.destroy_process_group()


def test_recipe(deepspeed):
    recipes.check_as_torch("DeepSpeed")


def engine(deepspeed, make, stage, bf16):
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 0.5,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
    }
    model = recipes.new_model()
    return deepspeed.initialize(model=model, optimizer=make(model.parameters()), config=config)[0]


def train(engine, steps):
    for step in steps:
        engine.backward(recipes.loss(engine, step))
        engine.step()
        assert engine.get_global_grad_norm() is None or engine.get_global_grad_norm() > 0.5


def ours(params):
    return fastopt.AdamW(params, lr=0.01)


def theirs(params):
    return torch.optim.AdamW(params, lr=0.01)


each_engine = pytest.mark.parametrize(
    ("stage", "bf16"), [(0, False), (0, True), (1, False), (2, True), (3, True)]
)


@each_engine
def test_as_torch(deepspeed, stage, bf16):
    found, wanted = (engine(deepspeed, make, stage, bf16) for make in (ours, theirs))
    for each in found, wanted:
        train(each, range(5))
    assert_near_torch(found.parameters(), wanted.parameters())


@each_engine
def test_resume(deepspeed, stage, bf16):
    whole, resumed = (engine(deepspeed, ours, stage, bf16) for _ in range(2))
    train(whole, range(3))
    whole.save_checkpoint("saved")
    train(whole, range(3, 6))
    train(resumed, range(7, 8))
    resumed.load_checkpoint("saved")
    train(resumed, range(3, 6))
    assert_same_bits(resumed.parameters(), whole.parameters())
