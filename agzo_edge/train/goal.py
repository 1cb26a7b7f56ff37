"""The goal that a run's settings describe."""

from agzo_edge.config import RunConfig
from agzo_edge.train.objective import GOALS, Goal
from agzo_edge.train.preference import preference_goal


def goal_of(config: RunConfig) -> Goal:
    """What a run learns."""
    if config.objective == "preference":
        return preference_goal(config)
    return GOALS[config.objective]
