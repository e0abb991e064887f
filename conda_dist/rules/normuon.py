"""NorMuon (arXiv 2510.05491): Muon's update, divided by the root mean square of each row."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from conda_dist.rules.muon import MuonRule


class NorMuonRule(MuonRule):
    """NorMuon's arithmetic on whole matrices.

    States: ``momentum_buffer`` (m, n); ``second_moment`` (m, 1), the mean square of each row of the
    orthogonalised momentum, in at least float32.

    The released code differs from the paper, and the rule follows the code. The momentum is
    Nesterov's. After the division the update gets back the norm it had before, which the learning
    rate multiplies as Muon's does; the paper makes its root mean square 0.2, which
    ``adjust_lr_fn="match_rms_adamw"`` comes near. The division and both norms are computed in
    float32; the code computes them in bfloat16.
    """

    name, title = "normuon", "NorMuon"
    state_names = frozenset({"momentum_buffer", "second_moment"})
    hyperparameters: ClassVar[tuple[str, ...]] = (*MuonRule.hyperparameters, "beta2")

    def second_shape(self, m: int, n: int) -> tuple[int, ...]:
        """See OrthogonalRule."""
        return (m, 1)

    def direction(
        self,
        momentum: Tensor,
        grad: Tensor,
        second: Tensor | None,
        group: Mapping[str, Any],
        step: int,
    ) -> tuple[Tensor, Tensor | None]:
        """See OrthogonalRule."""
        assert second is not None
        update = self.orthogonalise(momentum, group).to(second.dtype).contiguous()
        norm = update.norm()
        second.lerp_(update.square().mean(-1, keepdim=True), 1 - group["beta2"])
        update = update / (second.sqrt() + group["eps"])
        update *= norm / (update.norm() + group["eps"])
        return update.to(self.iteration_dtype), None
