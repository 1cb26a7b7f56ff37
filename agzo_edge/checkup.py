"""How well finite differences do with a model on this machine."""

from agzo_edge.budget.facts import model_facts
from agzo_edge.config import RunConfig
from agzo_edge.errors import ConfigError
from agzo_edge.model.load import load_model
from agzo_edge.model.memory import refused_as_budget
from agzo_edge.preparation import fitted_here
from agzo_edge.train.examples import load_examples
from agzo_edge.train.fidelity import Fidelity, fidelity
from agzo_edge.train.goal import goal_of


def fidelity_of(config: RunConfig) -> Fidelity:
    """What `fidelity` sees of a run's model and data. Raises BudgetError where exact differences do not fit."""
    if config.difference == "exact":
        raise ConfigError("exact differences have no mu to check: ask about central or forward ones")
    if config.objective == "reward":
        raise ConfigError("a reward has no exact difference to compare with: ask about another objective")
    exact = config.model_copy(update={"difference": "exact"})  # what needs the most memory
    facts = model_facts(str(config.model))
    fitted, _ = fitted_here(facts, exact)
    with refused_as_budget(fitted.plan):
        loaded = load_model(str(config.model), fitted.config)
    examples = load_examples(str(config.data), loaded.tokenizer, config, facts=facts)
    loaded.require_positions(examples.report.longest_tokens)
    checked = fitted.config.model_copy(update={"difference": config.difference})
    return fidelity(loaded, examples, checked, goal=goal_of(config))
