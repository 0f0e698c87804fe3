"""Names of modules without the wrappers of torch, which no file and no message may hold."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from artaug._internal.modules import named_modules, plain_name, unwrap


class Sharded(nn.Module):
    """As FullyShardedDataParallel is built, without processes."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module


class Head(nn.Module):
    """A layer of a model that happens to be called as parallel wrappers call what they wrap."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(2, 2)


def network():
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), Head())


def compiled(module):
    return torch.compile(module, backend="eager")


WRAPPERS = [compiled, Sharded, nn.DataParallel, checkpoint_wrapper]
PAIRS = [pair for pair in product(WRAPPERS, WRAPPERS) if pair != (compiled, compiled)]  # which torch makes one of


@pytest.mark.parametrize(("wrap", "inner"), PAIRS)
def test_names_are_those_of_the_unwrapped_model_and_paths_lead_to_the_layers(wrap, inner):
    model = network()
    names = dict(model.named_modules())
    model[1][1] = inner(model[1][1])
    model[1] = wrap(model[1])
    wrapped = wrap(inner(model))
    found = named_modules(wrapped)
    assert unwrap(wrapped) is model
    assert list(found) == list(names)
    assert all(found[name].module is module for name, module in names.items())
    assert all(unwrap(wrapped.get_submodule(item.path)) is item.module for item in found.values())


def test_a_layer_that_is_shared_has_the_first_of_its_names():
    model = network()
    model[1][1] = model[0]
    assert list(named_modules(model)) == [name for name, _ in model.named_modules()]


def test_names_of_parameters_lose_their_wrappers():
    assert plain_name("_fsdp_wrapped_module.blocks.0._orig_mod.attn.module.weight") == "blocks.0.attn.module.weight"
