"""Systems of the family as short functions over the library's nouns, to call as they are or to copy and change."""

from artaug.recipes.chat import ServedChat
from artaug.recipes.checklists import ChatRequirements, Checked, checklist
from artaug.recipes.dream_sync import dreamsync
from artaug.recipes.layouts import ChatLayout, LaidOut, layout_first
from artaug.recipes.online_rollouts import Rollout, RolloutRound, Rollouts, rollouts
from artaug.recipes.rewards import draw_pairs, normalized_rewards
from artaug.recipes.rewriting import ChatRewriter, PromptRewriter

__all__ = [
    "ChatLayout",
    "ChatRequirements",
    "ChatRewriter",
    "Checked",
    "LaidOut",
    "PromptRewriter",
    "Rollout",
    "RolloutRound",
    "Rollouts",
    "ServedChat",
    "checklist",
    "draw_pairs",
    "dreamsync",
    "layout_first",
    "normalized_rewards",
    "rollouts",
]
