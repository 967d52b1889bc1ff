"""LoRA adapters: what is trained, has states and comes back with them."""

import pytest
import recipes
import torch
from helpers import assert_same_bits, through_file

import fastopt

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.frameworks

CONFIG = peft.LoraConfig(r=4, target_modules=["0", "2"])


def parts(model, word):
    return [param for name, param in model.named_parameters() if word in name]


def test_what_the_recipe_trains():
    """The base model is as it was, and each adapter's states are of its own steps."""
    names = recipes.run("PEFT")
    assert_same_bits(parts(names.model, "base_layer"), recipes.new_model().parameters())
    first, second = parts(names.model, "first"), parts(names.model, "second")
    assert [group["params"] for group in names.optimizer.param_groups] == [first, second]
    assert {*names.optimizer.state} == {*first, *second}
    assert [names.optimizer.state[param]["step"] for param in first + second] == [4] * 8


@pytest.mark.parametrize("cls", fastopt.OPTIMIZERS)
def test_all_parameters_given(cls):
    """Frozen ones stay what they are, whether weights decay or not."""
    model = peft.get_peft_model(recipes.new_model(), CONFIG)
    optimizer = cls(model.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(2):
        recipes.loss(model, step).backward()
        optimizer.step()
    assert_same_bits(parts(model, "base_layer"), recipes.new_model().parameters())
    assert all(param.any() for param in parts(model, "lora_B"))


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        recipes.loss(model, step).backward()
        optimizer.step()


@recipes.each_mode
def test_resume(settings):
    """With an adapter that was added later."""

    def begin():
        torch.manual_seed(0)
        model = recipes.new_model(torch.bfloat16)
        model = peft.get_peft_model(model, CONFIG, autocast_adapter_dtype=False)
        optimizer = fastopt.AdamW(parts(model, "default"), lr=0.01, max_norm=0.5, **settings)
        return model, optimizer

    def add_adapter(model, optimizer):
        model.add_adapter("later", CONFIG, autocast_adapter_dtype=False)
        model.set_adapter("later")
        optimizer.add_param_group({"params": parts(model, "later"), "lr": 0.02})

    whole, resumed = begin(), begin()
    train(*whole, range(3))
    for each in whole, resumed:
        add_adapter(*each)
    train(*whole, range(3, 6))
    for ours, saved in zip(resumed, whole, strict=True):
        ours.load_state_dict(through_file(saved.state_dict()))
    train(*whole, range(6, 9))
    train(*resumed, range(6, 9))
    assert_same_bits(resumed[0].parameters(), whole[0].parameters())
