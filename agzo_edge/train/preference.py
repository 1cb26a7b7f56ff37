"""Learning from pairs: of two answers to a prompt, the first is the better one.

    dpo     −log σ(β (log π(y⁺)/π₀(y⁺) − log π(y⁻)/π₀(y⁻)))     DPO, arXiv 2305.18290, eq. 7
    simpo   −log σ(β (log π(y⁺)/|y⁺| − log π(y⁻)/|y⁻|) − γ)      SimPO, arXiv 2405.14734, eq. 6

DPO's reference π₀ is the frozen base: the same model with the learned parts left out, in a plain pass of its
own before each step's. No second copy of the model is held, and what the reference says of a row is computed
once for both signs. SimPO needs no reference and no second pass.
"""

from dataclasses import dataclass

from torch import Tensor

from agzo_edge.data_config import DataConfig
from agzo_edge.model.runtime import EdgeModel
from agzo_edge.numerics.loss import preference_losses
from agzo_edge.train.data import Batch
from agzo_edge.train.objective import Goal, Outcome, label_scores, label_sums

BETAS = {"dpo": 0.1, "simpo": 2.0}  # TRL's default, and SimPO's table 7
SIMPO_GAMMA_SHARE = 0.25  # γ = β / 4, within the range of SimPO's table 7


@dataclass(frozen=True)
class PreferenceGoal(Goal):
    """The loss of pairs: an example's rows are the better answer and the worse one."""

    kind: str  # dpo or simpo
    beta: float

    def losses(self, model: EdgeModel, batch: Batch) -> Tensor:
        """(streams, examples) float32."""
        return preference_losses(self._margins(model, batch), beta=self.beta, gamma=self._gamma)

    def outcome(self, model: EdgeModel, batch: Batch) -> Outcome:
        """The losses, and the answer that is preferred: row 0 where the margin is positive, else row 1."""
        margins = self._margins(model, batch)[0]
        losses = preference_losses(margins, beta=self.beta, gamma=self._gamma)
        return Outcome(losses, (margins <= 0).long())

    @property
    def _gamma(self) -> float:
        return SIMPO_GAMMA_SHARE * self.beta if self.kind == "simpo" else 0.0

    def _margins(self, model: EdgeModel, batch: Batch) -> Tensor:  # (streams, examples)
        """By how much the better answer is likelier than the worse one, and, for dpo, than in the base."""
        if self.kind == "simpo":
            scores = -label_scores(model, batch)
        else:
            with model.context.running(mask=batch.attention_mask.bool(), base_only=True):
                reference = label_sums(model, batch)  # (1, rows)
            scores = reference - label_sums(model, batch)
        return scores[:, 0::2] - scores[:, 1::2]


def preference_goal(config: DataConfig) -> PreferenceGoal:
    """The goal that the settings describe."""
    return PreferenceGoal(config.preference_loss, config.beta or BETAS[config.preference_loss])
