"""For people who write their own parts: checks that a part keeps its contract, and doubles that need no model.

The checks raise `AssertionError` with a sentence that says what was expected and what came; a pytest test is one line:

>>> import artaug as aa
>>> from artaug.testing import FixedCritic, check_critic
>>> check_critic(FixedCritic(aa.Critique()))

For a model family there is `artaug.diffusion.check_family`.
"""

from artaug.testing.doubles import FixedCritic, FixedFilter, FixedJudge, FixedScorer, SwatchSynthesizer
from artaug.testing.guides import check_guide
from artaug.testing.loop import check_critic, check_filter, check_judge, check_planner, check_scorer, check_synthesizer
from artaug.testing.training import check_fuser, check_objective

__all__ = [
    "FixedCritic",
    "FixedFilter",
    "FixedJudge",
    "FixedScorer",
    "SwatchSynthesizer",
    "check_critic",
    "check_filter",
    "check_fuser",
    "check_guide",
    "check_judge",
    "check_objective",
    "check_planner",
    "check_scorer",
    "check_synthesizer",
]
