"""A guide is called in one place, which names it where it does not return a context manager."""

from contextlib import contextmanager

import pytest
from torch import nn

import artaug as aa
from artaug.regional import Branches, Denoiser
from artaug.regional.guide import steer


class Plain(Denoiser):
    def branches(self, kwargs):
        return Branches(cond=range(0))

    def with_prompt_embeds(self, kwargs, rows, prompts):
        return dict(kwargs)


DENOISER = Plain(module=nn.Identity(), grid=(1, 1))


class Forgotten(aa.Guide):
    def steering(self, denoiser, regions):  # without @contextmanager
        yield


class Complete(aa.Guide):
    def __init__(self):
        self.log = []

    @contextmanager
    def steering(self, denoiser, regions):
        self.log.append("entered")
        yield
        self.log.append("left")


def test_a_guide_without_a_context_manager_is_named_with_what_it_returned():
    with pytest.raises(
        aa.ContractError, match=r"^Forgotten\.steering returned generator .* regions of 2 picture\(s\)\. Exp"
    ):
        steer(Forgotten(), DENOISER, [[], []])


def test_a_guide_with_a_context_manager_is_entered_and_left_once():
    guide = Complete()
    with steer(guide, DENOISER, []):
        assert guide.log == ["entered"]
    assert guide.log == ["entered", "left"]


def test_a_second_guide_on_one_denoiser_is_refused():
    with (
        aa.OutputMix().steering(DENOISER, [[]]),
        pytest.raises(aa.GuideError, match=r"OutputMix\(\) cannot steer a Identity that OutputMix\(\) is steering"),
        aa.OutputMix().steering(DENOISER, [[]]),
    ):
        pass


def test_a_run_in_which_the_denoiser_was_not_called_is_told_from_one_in_which_it_was():
    with steer(Complete(), DENOISER, [[]]) as run:
        with pytest.raises(aa.GuideError, match="had no effect: a step was drawn without a call of the Identity"):
            run.check_called()
        DENOISER.module(1)
        run.check_called()
