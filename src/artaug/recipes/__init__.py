"""Systems of the family as short functions over the library's nouns, to call as they are or to copy and change."""

from artaug.recipes.dream_sync import dreamsync
from artaug.recipes.online_rollouts import Rollout, RolloutRound, Rollouts, rollouts
from artaug.recipes.rewards import draw_pairs, normalized_rewards

__all__ = [
    "Rollout",
    "RolloutRound",
    "Rollouts",
    "draw_pairs",
    "dreamsync",
    "normalized_rewards",
    "rollouts",
]
