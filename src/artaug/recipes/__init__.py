"""Systems of the family as short functions over the library's nouns, to call as they are or to copy and change."""

from artaug.recipes.a_star import AStar
from artaug.recipes.attend_and_excite import AttendAndExcite
from artaug.recipes.chat import ChatCritic, ServedChat
from artaug.recipes.checklists import ChatRequirements, Checked, checklist
from artaug.recipes.contexts import ContextGuidance, serial_guidance
from artaug.recipes.dream_sync import dreamsync
from artaug.recipes.edit_plans import grape
from artaug.recipes.edits import ChatEdits, EditPlanner
from artaug.recipes.interleaved import irg
from artaug.recipes.irgl import irgl_conversations, trajectory_from_irgl
from artaug.recipes.layouts import ChatLayout, LaidOut, layout_first
from artaug.recipes.online_rollouts import Rollout, RolloutRound, Rollouts, rollouts
from artaug.recipes.reflections import ChatReflection, ChatThought, Reflection, ReflectionPlanner
from artaug.recipes.rewards import draw_pairs, normalized_rewards
from artaug.recipes.rewriting import ChatRewriter, PromptRewriter
from artaug.recipes.separate_and_enhance import TEXT_KEYS, SeparateAndEnhance, sepen

__all__ = [
    "TEXT_KEYS",
    "AStar",
    "AttendAndExcite",
    "ChatCritic",
    "ChatEdits",
    "ChatLayout",
    "ChatReflection",
    "ChatRequirements",
    "ChatRewriter",
    "ChatThought",
    "Checked",
    "ContextGuidance",
    "EditPlanner",
    "LaidOut",
    "PromptRewriter",
    "Reflection",
    "ReflectionPlanner",
    "Rollout",
    "RolloutRound",
    "Rollouts",
    "SeparateAndEnhance",
    "ServedChat",
    "checklist",
    "draw_pairs",
    "dreamsync",
    "grape",
    "irg",
    "irgl_conversations",
    "layout_first",
    "normalized_rewards",
    "rollouts",
    "sepen",
    "serial_guidance",
    "trajectory_from_irgl",
]
