"""The authors' own trajectories, copied whole from the project's oracle; see golden/README.md."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "golden"
CASES: dict[str, dict[str, Any]] = json.loads((FOLDER / "index.json").read_text())
FLOAT32 = [name for name, case in CASES.items() if case["dtype"] == "float32"]
TOLERANCE = 1e-4
"""Of the distance travelled, at every step; golden/README.md says why not less."""


@dataclass
class Case:
    """One parameter, its gradients and what the authors' code made of it."""

    name: str
    settings: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def load(cls, name: str) -> "Case":
        return cls(name, CASES[name], load_file(FOLDER / f"{name}.safetensors"))

    def group(self, param: Tensor) -> dict[str, Any]:
        """The parameter group with the case's hyperparameters."""
        s = self.settings
        return {
            "params": [param],
            "algorithm": "conda" if s["gap"] else "adamw",
            "lr": s["lr"],
            "betas": tuple(s["betas"]),
            "eps": s["eps"],
            "weight_decay": s["wd"],
            "scale": s["scale"],
            "update_proj_gap": max(s["gap"], 1),
            "correct_bias": s.get("correct_bias", True),
        }

    def replay(
        self,
        param: torch.nn.Parameter,
        optimizer: torch.optim.Optimizer,
        place: Callable[[Tensor], Tensor] = torch.clone,
        whole: Callable[[Tensor], Tensor] = torch.clone,
    ) -> float:
        """Takes all steps; the worst error, relative to the distance travelled by then.

        Args:
            param: the parameter, at its start.
            optimizer: optimizes it.
            place: makes the parameter's kind of tensor of a whole gradient.
            whole: makes a whole tensor of the parameter.
        """
        worst, start = 0.0, self.tensors["param"].float()
        for t in range(self.settings["T"]):
            for group in optimizer.param_groups:
                group["lr"] = self.settings.get("lrs", [self.settings["lr"]] * (t + 1))[t]
            missing = t in self.settings.get("none_at", [])
            param.grad = None if missing else place(self.tensors["grads"][t])
            optimizer.step()
            theirs = self.tensors["params"][t].float()
            error = (whole(param.detach()).float() - theirs).norm() / (theirs - start).norm()
            worst = max(worst, error.item())
        return worst
