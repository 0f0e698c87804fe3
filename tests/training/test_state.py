"""The state of a training between two steps, as a value and as a file."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import artaug as aa
from artaug._internal.sealed import save_sealed
from artaug.errors import StorageError
from artaug.lora.lora import LoRA, LowRank
from artaug.training import Checkpoints, CompanionState, TrainingState, ValidationResult
from artaug.training.loss_scale import LossScale

FINGERPRINT = {"trainer": "DifferentialLoRATrainer(rank=4)", "seed": "0", "pairs": "ab", "model": "Tiny 12"}


def lora_of(*names, rank=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LoRA(
        {
            name: LowRank(torch.randn(rank, 3, generator=generator), torch.randn(4, rank, generator=generator))
            for name in names
        }
    )


def tensors_of(*names, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {part: torch.randn(2, 3, generator=generator) for part in ("down.weight", "up.weight")} for name in names
    }


FULL = TrainingState(
    step=7,
    losses=(0.5, 1 / 3, 0.1),
    seconds=100 / 7,
    group_loras=tuple(lora_of("blocks.0.attn", "down", seed=seed) for seed in range(11)),
    stage_loras=(lora_of("blocks.0.attn", "blocks.down.up", seed=20),),
    adapter=tensors_of("blocks.0.attn", "blocks.1.ff.net.0"),
    ema=tensors_of("blocks.0.attn", "blocks.1.ff.net.0", seed=1),
    ema_updates=6,
    loss_scale=LossScale(value=2.0**12, steps_since_change=3, skipped_steps=4),
    optimizer={
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 3, dtype=torch.bfloat16)}, 1: {}},
        "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0, 1], "foreach": None, "amsgrad": False}],
    },
    companion=CompanionState(
        tensors=tensors_of("blocks.0.attn", "(head)", seed=2),
        optimizer={"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": []},
        loss_scale=LossScale(value=2.0**9),
    ),
    base_scores=(0.25, 1 / 7),
    validations=(ValidationResult(step=5, strength=0.5, win_rate=2 / 3, gain=-1 / 9),),
    best_lora=lora_of("blocks.0.attn", seed=30),
)


def assert_equal(value, other):
    """Nested values with tensors and LoRAs in them, by type, content and bits."""
    assert type(value) is type(other)
    match value:
        case torch.Tensor():
            assert value.dtype == other.dtype
            assert torch.equal(value, other)
        case LoRA() | LowRank() | TrainingState() | CompanionState():
            for name in (field.name for field in dataclasses.fields(value)):
                left, right = getattr(value, name), getattr(other, name)
                assert_equal(*(dict(side) if hasattr(side, "keys") else side for side in (left, right)))
        case dict():
            assert value.keys() == other.keys()
            for key in value:
                assert_equal(value[key], other[key])
        case list() | tuple():
            assert len(value) == len(other)
            for item, other_item in zip(value, other, strict=True):
                assert_equal(item, other_item)
        case _:
            assert value == other


@pytest.mark.parametrize("state", [TrainingState(), FULL], ids=["new", "full"])
def test_a_state_is_read_back_as_it_was_written(tmp_path, state):
    state.save(tmp_path / "folder" / "state.safetensors", run_fingerprint=FINGERPRINT)
    assert_equal(TrainingState.load(tmp_path / "folder" / "state.safetensors", run_fingerprint=FINGERPRINT), state)


NESTED = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.integers(0, 3).map(torch.arange),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(optimizer=NESTED)
def test_an_optimizer_of_any_nesting_is_read_back_as_it_was(tmp_path_factory, optimizer):
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    TrainingState(optimizer=optimizer).save(path, run_fingerprint={})
    assert_equal(TrainingState.load(path, run_fingerprint={}).optimizer, optimizer)


def test_an_optimizer_that_keeps_objects_is_refused_saying_where(tmp_path):
    state = TrainingState(optimizer={"state": {0: {"scaler": object()}}})
    with pytest.raises(StorageError, match=r"keeps a object at 'optimizer\.state\.0\.scaler'.*without pickle"):
        state.save(tmp_path / "state.safetensors", run_fingerprint=FINGERPRINT)
    assert not list(tmp_path.iterdir())


def test_the_current_lora_is_not_saved(tmp_path):
    dataclasses.replace(FULL, current_lora=lora_of("blocks.0.attn")).save(tmp_path / "a", run_fingerprint=FINGERPRINT)
    assert TrainingState.load(tmp_path / "a", run_fingerprint=FINGERPRINT).current_lora is None


@pytest.mark.parametrize("name", FINGERPRINT)
def test_a_file_of_another_training_is_refused_naming_what_differs(tmp_path, name):
    FULL.save(tmp_path / "state", run_fingerprint=FINGERPRINT)
    with pytest.raises(StorageError) as error:
        TrainingState.load(tmp_path / "state", run_fingerprint={**FINGERPRINT, name: "other"})
    assert f"belongs to another training ({name}: {FINGERPRINT[name]} there, other here)" in str(error.value)


def test_a_file_of_another_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("artaug.training.state._VERSION", "0")
    FULL.save(tmp_path / "state", run_fingerprint=FINGERPRINT)
    monkeypatch.undo()
    with pytest.raises(StorageError, match=r"its version: 0, expected \d"):
        TrainingState.load(tmp_path / "state", run_fingerprint=FINGERPRINT)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_a_file_that_was_cut_is_refused(tmp_path, kept):
    path = tmp_path / "state"
    FULL.save(path, run_fingerprint=FINGERPRINT)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(StorageError, match=r"is no checkpoint.*Delete it to go on from the one before"):
        TrainingState.load(path, run_fingerprint=FINGERPRINT)


def test_bits_of_a_file_that_flip_are_noticed(tmp_path):
    path = tmp_path / "state"
    TrainingState(step=1, losses=(0.5,), adapter=tensors_of("a")).save(path, run_fingerprint={"seed": "0"})
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 31):  # test_sealed.py flips every bit of a smaller file
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(StorageError, match=r"Delete it to go on from the one before"):
            TrainingState.load(path, run_fingerprint={"seed": "0"})


@pytest.mark.parametrize(
    "change",
    [
        {"step": "x"},
        {"step": None},
        {"validations": "[3]"},
        {"validations": '[{"step": 1}]'},
        {"validations": "[" * 100_000},
        {"optimizer": '{"__tensor__": "gone"}'},
        {"optimizer": '{"__tensor__": []}'},
        {"optimizer": '{"pairs": [3]}'},
        {"optimizer": '{"pairs": [[[], 3]]}'},
        {"optimizer": "{"},
        {"companion": None},
        {"companion": "[]"},
        {"companion": '{"optimizer": null}'},
        {"companion": '{"optimizer": null, "loss_scale": {"size": 1}}'},
    ],
)
def test_a_header_that_was_sealed_but_says_nonsense_is_refused(tmp_path, change):
    header = {
        "version": "6",
        "step": "1",
        "seconds": "1.5",
        "ema_updates": "0",
        "loss_scale": "null",
        "companion": "null",
        "validations": "[]",
        "optimizer": "null",
        **change,
    }
    tensors = {name: torch.zeros(0, dtype=torch.float64) for name in ("losses", "base_scores")}
    save_sealed(tensors, tmp_path / "state", {name: text for name, text in header.items() if text is not None})
    with pytest.raises(StorageError, match=r"is no checkpoint that artaug wrote.*Delete it"):
        TrainingState.load(tmp_path / "state", run_fingerprint={})


def test_a_write_that_fails_halfway_leaves_the_file_before_it(tmp_path, monkeypatch):
    path = tmp_path / "state"
    TrainingState(step=1).save(path, run_fingerprint=FINGERPRINT)

    def save_half(_tensors, partial, _header):
        partial.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("artaug.training.state.save_sealed", save_half)
    with pytest.raises(StorageError, match=r"no space left on device.*go on from the last"):
        FULL.save(path, run_fingerprint=FINGERPRINT)
    assert [file.name for file in tmp_path.iterdir()] == ["state"]
    assert TrainingState.load(path, run_fingerprint=FINGERPRINT).step == 1


def test_after_a_stage_its_lora_is_applied_and_after_the_last_it_is_the_groups_result():
    first, second = lora_of("blocks.0.attn"), lora_of("blocks.0.attn", seed=1)
    between = FULL.after_phase(first, is_last_stage=False)
    assert (between.stage_loras, between.group_loras) == ((*FULL.stage_loras, first), FULL.group_loras)
    after = between.after_phase(second, is_last_stage=True)
    assert (after.stage_loras, after.group_loras) == ((), (*FULL.group_loras, second))
    for state in (between, after):
        assert (state.adapter, state.ema, state.ema_updates, state.optimizer) == ({}, {}, 0, None)
        assert (state.step, state.losses, state.loss_scale) == (FULL.step, FULL.losses, FULL.loss_scale)


def test_what_has_been_learned_is_the_mean_over_the_groups():
    loras = tuple(lora_of("blocks.0.attn", seed=seed) for seed in range(3))
    mean = TrainingState(group_loras=loras).lora().layers["blocks.0.attn"]
    deltas = [lora.layers["blocks.0.attn"].delta() for lora in loras]
    torch.testing.assert_close(mean.delta(), torch.stack(deltas).mean(0))
    current = lora_of("blocks.1.attn")
    assert TrainingState(group_loras=loras, current_lora=current).lora() is current


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_checkpoints_stay_and_the_latest_is_read(tmp_path, keep):
    checkpoints = Checkpoints(folder=tmp_path, keep=keep)
    assert checkpoints.latest(run_fingerprint=FINGERPRINT) is None
    for step in (2, 9, 10, 100):
        checkpoints.write(TrainingState(step=step), run_fingerprint=FINGERPRINT)
    kept = [f"step-{step:08}.safetensors" for step in (2, 9, 10, 100)[-keep:]]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    assert checkpoints.latest(run_fingerprint=FINGERPRINT).step == 100


def test_a_state_is_public():
    assert aa.training.TrainingState is TrainingState
