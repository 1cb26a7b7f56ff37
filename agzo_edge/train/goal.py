"""The goal that a run's settings describe."""

from agzo_edge.config import RunConfig
from agzo_edge.train.objective import GOALS, Goal
from agzo_edge.train.preference import preference_goal
from agzo_edge.train.reward import reward_goal


def goal_of(config: RunConfig) -> Goal:
    """What a run learns; close it at the end. Raises ConfigError for a reward that cannot be loaded."""
    if config.objective == "preference":
        return preference_goal(config)
    if config.objective == "reward":
        return reward_goal(config)
    return GOALS[config.objective]
