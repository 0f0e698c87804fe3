"""The benchmark of the probe: its rows, on a model that is small enough for a test."""

from dataclasses import replace

import torch
from benchmarks import _flux as flux
from benchmarks import probe

TINY = replace(flux.PLAYGROUND, double_blocks=1, single_blocks=1, heads=2, head_channels=32)


def test_every_way_to_read_has_a_row_beside_its_plain_step():
    rows = probe.point_rows(TINY, side=4, rounds=2, training=True)
    tasks = {}
    for row in rows:
        tasks.setdefault(row["task"], []).append(row["probe"])
        assert row["rounds"] == 2
        assert row["ratio_to_plain"] > 0
    assert tasks == {
        "drawing": ["plain", "2 phrases", "4 phrases", "2 phrases, over the prompt"],
        "drawing with regions": ["plain", "2 phrases"],
        "moving latents": ["plain", "Attend-and-Excite", "Attend-and-Excite, recomputed", "A-STAR"],
        "training": ["plain", "2 phrases"],
    }
    assert all(row["ratio_to_plain"] == 1 for row in rows if row["probe"] == "plain")
    assert probe.plot(rows).axes


def test_a_training_step_goes_back_through_the_maps():
    received = []
    setting = flux.Setting(geometry=TINY, model=TINY.model(), side=4, pictures=((),), gradients=True)
    run = replace(setting.run, phrase_tokens=probe._phrase_tokens)  # noqa: SLF001 - of the benchmark itself
    probe.step_seconds(setting, run, probe.probes(received)["2 phrases"], received)
    assert all(layer.maps.requires_grad for layer in received[0].layers)
    with_maps = setting.kwargs["hidden_states"].grad.clone()
    setting.kwargs["hidden_states"].grad = None
    probe.step_seconds(setting, run, None, received)
    assert not torch.allclose(with_maps, setting.kwargs["hidden_states"].grad)
