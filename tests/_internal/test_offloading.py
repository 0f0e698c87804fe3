"""Models moved to a device and off it: what stays the same, what is copied, and which cannot be moved."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from artaug._internal.offloading import _alone, bring, device_of, is_brought, pin, take_off, unmovable_reason, unpin

DEVICE = torch.device("cuda", 7)


class Emulated(nn.Module):
    """Stands for a model on a machine with a GPU: to move it there is to copy its weights, as it is with a real one."""

    def __init__(self, *, full_after=99):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight  # tied
        self.norm = nn.BatchNorm1d(3)
        self.norm.running_mean[:] = 0.5
        self.full_after = full_after
        self.moves = []

    def to(self, device):
        self.moves.append(torch.device(device).type)
        if torch.device(device).type == "cpu":
            return self
        for count, parameter in enumerate(self.parameters()):
            if count == self.full_after:
                raise torch.OutOfMemoryError
            parameter.data = parameter.data.clone()
        for part in self.modules():
            for name, buffer in part.named_buffers(recurse=False):
                part.register_buffer(name, buffer.clone())
        return self


def addresses(module):
    return {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}


def test_a_model_that_was_only_used_comes_back_without_a_copy():
    model = Emulated()
    before, parameters = addresses(model), list(model.parameters())
    bring(model, DEVICE)
    assert is_brought(model)
    assert set(addresses(model).values()).isdisjoint(before.values())
    take_off(model)
    assert addresses(model) == before
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
    assert model.second.weight is model.first.weight
    assert not is_brought(model)
    assert model.moves == ["cuda", "cpu"]


def test_a_tied_weight_is_kept_and_restored_once():
    model = Emulated()
    bring(model, DEVICE)
    assert model.second.weight is model.first.weight
    assert model.second.weight.data_ptr() == model.first.weight.data_ptr()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.first.weight.detach().add_(1),
        lambda model: setattr(model.first.weight, "data", model.first.weight.data + 1),
        lambda model: model.norm.running_mean.add_(1),
        lambda model: model.norm.register_buffer("running_mean", torch.ones(3) * 7),
        lambda model: setattr(model.first, "bias", nn.Parameter(torch.ones(3))),
    ],
    ids=["a weight, in place", "a weight, its data", "a buffer, in place", "another buffer", "another weight"],
)
def test_what_a_stage_changed_is_kept(change):
    model = Emulated()
    bring(model, DEVICE)
    change(model)
    changed = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    take_off(model)
    assert all(torch.equal(tensor, changed[name]) for name, tensor in model.state_dict().items())


@given(full_after=st.integers(0, 4))
def test_a_model_that_came_half_way_is_taken_off_whole(full_after):
    model = Emulated(full_after=full_after)
    before = addresses(model)
    with pytest.raises(torch.OutOfMemoryError):
        bring(model, DEVICE)
    take_off(model)
    assert addresses(model) == before


def test_a_model_moved_in_inference_mode_can_still_be_trained():
    model = Emulated()
    with torch.inference_mode():
        bring(model, DEVICE)
    model.first(torch.ones(2, 3)).sum().backward()
    assert model.first.weight.grad is not None


def test_weights_that_share_memory_are_not_pinned_apart():
    whole = torch.zeros(10, 4)
    tensors = {
        "alone": torch.zeros(4, 4),
        "transposed": torch.zeros(3, 5).t(),
        "part": whole[:5],
        "overlapping": whole[4:],
        "with gaps": torch.zeros(6, 6)[:, :2],
        "empty": torch.zeros(0, 3),
        "neighbour": None,
    }
    both = torch.zeros(8)
    tensors["neighbour"], tensors["other neighbour"] = both[:4], both[4:]
    parameters = {name: nn.Parameter(tensor) for name, tensor in tensors.items()}
    alone = _alone(list(parameters.values()))
    names = {name for name, parameter in parameters.items() if any(parameter is item for item in alone)}
    assert names == {"alone", "transposed", "neighbour", "other neighbour"}


def test_pinned_weights_have_their_values_and_strides_and_are_put_back_into_memory_of_their_own(monkeypatch):
    empty = torch.empty

    def unpinned(*size, pin_memory=False, **options):  # noqa: ARG001
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr("artaug._internal.offloading._SLAB_BYTES", 2048)
    model = nn.Sequential(nn.Linear(7, 33), nn.Linear(33, 5, dtype=torch.bfloat16), nn.Linear(64, 64))
    model[0].weight = nn.Parameter(torch.randn(7, 33).t())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    strides = {name: tensor.stride() for name, tensor in model.state_dict().items()}
    pinned = pin(model)
    assert len(pinned) == 6
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name: tensor.stride() for name, tensor in model.state_dict().items()} == strides
    assert all(parameter.data_ptr() % parameter.element_size() == 0 for parameter in pinned)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _tensor: True)
    unpin(pinned)
    assert len({parameter.untyped_storage().data_ptr() for parameter in pinned}) == 6
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def hooked():
    module = nn.Sequential(nn.Linear(2, 2))
    vars(module[0])["_hf_hook"] = object()
    return module


def in_eight_bits():
    class Int8Params(nn.Parameter):
        """Of the name that the weights of bitsandbytes have."""

    module = nn.Linear(2, 2)
    module.weight = Int8Params(torch.zeros(2, 2))
    return module


def sharded():
    module = nn.Linear(2, 2)
    module.weight.device_mesh = object()
    return module


def in_place(module, **options):
    module.compile(**options)
    return module


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses what torch has deprecated
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (hooked, "enable_model_cpu_offload"),
        (in_eight_bits, "8 bits of bitsandbytes"),
        (sharded, "sharded"),
        (lambda: nn.DataParallel(nn.Linear(2, 2)), "several devices"),
        (lambda: nn.Linear(2, 2, device="meta"), "meta device"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")), "meta device"),
        (lambda: torch.compile(nn.Linear(2, 2), mode="reduce-overhead"), "CUDA graphs"),
        (lambda: in_place(nn.Linear(2, 2), mode="reduce-overhead"), "CUDA graphs"),
        (lambda: nn.Sequential(in_place(nn.Linear(2, 2), mode="max-autotune")), "CUDA graphs"),
    ],
    ids=[
        "hooked",
        "8 bits",
        "sharded",
        "copied",
        "meta",
        "half on meta",
        "compiled",
        "compiled in place",
        "a part of it",
    ],
)
def test_what_cannot_be_moved_says_why(build, reason):
    assert reason in unmovable_reason(build())


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(2, 2).half(),
        nn.ReLU,
        lambda: torch.compile(nn.Linear(2, 2), backend="eager"),
        lambda: in_place(nn.Linear(2, 2), backend="eager"),
    ],
    ids=["half", "without weights", "compiled", "compiled in place"],
)
def test_other_models_can_be_moved(build):
    assert unmovable_reason(build()) is None


def test_a_model_without_weights_is_nowhere():
    assert device_of(nn.ReLU()) is None
    assert device_of(nn.BatchNorm1d(2, affine=False)).type == "cpu"
