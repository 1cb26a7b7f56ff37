"""Learning from a reward: any number that can be computed from what the model writes, differentiable or not.

Each example's prompt is answered under both signs of its own direction in one batch, every token drawn by the
same random numbers for both; the difference of the two rewards is the example's projected gradient.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from agzo_edge.config import RunConfig
from agzo_edge.errors import DataError, RewardError
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.model.writing import Uniforms, written_texts
from agzo_edge.numerics.sampling import uniform_numbers
from agzo_edge.train.data import Batch
from agzo_edge.train.judge import Judge, Question
from agzo_edge.train.objective import Goal, Outcome

REWARD_MU = 0.1  # a reward is a step function: no probe finds a plateau (docs/decisions/0022)


@dataclass(frozen=True)
class RewardGoal(Goal):
    """The loss is minus the reward of what the model writes."""

    judge: Judge
    max_new_tokens: int
    temperature: float
    seed: int
    step: int = 0

    def losses(self, model: EdgeModel, batch: Batch) -> Tensor:
        """(streams, examples) float32."""
        n = len(batch.places)
        numbers = partial(_numbers, n, seed=self.seed, step=self.step, first_example=batch.first_example)
        return -self._rewards(model, batch, temperature=self.temperature, uniforms=numbers)

    def outcome(self, model: EdgeModel, batch: Batch) -> Outcome:
        """The losses of the likeliest answers."""
        return Outcome(-self._rewards(model, batch, temperature=0.0)[0])

    def at(self, step: int, /) -> "RewardGoal":
        """The goal with the random numbers of a step."""
        return replace(self, step=step)

    def close(self) -> None:
        """End the reward's process."""
        self.judge.close()

    def _rewards(
        self, model: EdgeModel, batch: Batch, *, temperature: float, uniforms: Uniforms | None = None
    ) -> Tensor:  # (streams, examples) float32
        texts = written_texts(
            model,
            batch.input_ids,
            batch.attention_mask,
            max_new_tokens=self.max_new_tokens,
            temperature=temperature,
            uniforms=uniforms,
        )
        n = len(batch.places)
        questions = [
            Question(batch.fields[i % n]["prompt"], text, batch.fields[i % n], batch.places[i % n])
            for i, text in enumerate(texts)
        ]
        rewards = torch.tensor(self.judge.rewards(questions), dtype=torch.float32)
        return rewards.view(-1, n).to(batch.weights.device)


def _numbers(n_examples: int, position: int, *, seed: int, step: int, first_example: int) -> Tensor:
    return uniform_numbers(n_examples, seed=seed, step=step, position=position, first_example=first_example)


def reward_goal(config: RunConfig) -> RewardGoal:
    """The goal that the settings describe; its process runs. Raises ConfigError when the reward cannot be loaded."""
    assert config.reward is not None
    judge = Judge(
        config.reward,
        argument=config.reward_argument,
        answer_field=config.answer_field or "answer",
        timeout_s=config.reward_timeout_s,
    )
    return RewardGoal(judge, config.max_new_tokens, config.temperature, config.seed)


@contextmanager
def refused_as_data() -> Iterator[None]:
    """Inside, a reward that fails is refused as the data are: nothing was written yet."""
    try:
        yield
    except RewardError as error:
        raise DataError(f"{error}. Nothing was trained") from None
