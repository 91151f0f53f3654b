"""Muon for weight matrices, AdamW for the rest, as one optimizer for `Trainer`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

OPTIMIZERS = ("adamw", "muon")
"""Names of optimizers; `adamw` stands for the one that `TrainingArguments.optim` names."""


class MuonAdamW(Optimizer):
    """Two of torch's optimizers in one: Muon (Jordan et al., 2024) for matrices, and AdamW for all other parameters.

    Muon's steps are scaled to the root mean square of AdamW's (Liu et al., arXiv 2502.16982), so one learning rate
    serves both.

    Args:
        matrices: Parameters of two dimensions.
        others: All other parameters that train.
        lr: Learning rate.
        weight_decay: Weight decay of the matrices.
        betas: The betas of AdamW.
    """

    def __init__(
        self,
        matrices: Sequence[Tensor],
        others: Sequence[Tensor],
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        self.parts: list[Optimizer] = []
        super().__init__([*matrices, *others], {"lr": lr})
        if matrices:
            self.parts.append(Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.parts.append(AdamW(others, lr=lr, weight_decay=0.0, betas=betas))

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Return the parameter groups of both optimizers, in which schedules set the learning rates."""
        return [group for part in self.parts for group in part.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        """Ignore what the base class sets when it is made, because both optimizers keep their own groups."""

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        """Return the state of both optimizers."""
        both: defaultdict[Tensor, Any] = defaultdict(dict)
        for part in self.parts:
            both.update(part.state)
        return both

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        """Ignore what the base class sets when it is made, because both optimizers keep their own state."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters."""
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both optimizers, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the states that `state_dict` returned."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)


def muon(
    model: nn.Module, lr: float, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.999)
) -> MuonAdamW:
    """Return the optimizer for the parameters of a model that train.

    Token embeddings and the output head are left to AdamW although they are matrices.
    """
    tables = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        tables |= {id(parameter) for parameter in head.parameters()}
    training = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [p for p in training if p.ndim == 2 and id(p) not in tables]
    chosen = {id(p) for p in matrices}
    return MuonAdamW(matrices, [p for p in training if id(p) not in chosen], lr, weight_decay, betas)


def trainer_options(name: str, arguments: Any) -> dict[str, Any]:
    """Return the keyword arguments of `Trainer` that make it use an optimizer of `OPTIMIZERS`."""
    if name != "muon":
        return {}
    options = {
        "lr": arguments.learning_rate,
        "weight_decay": arguments.weight_decay,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
    }
    # Trainer calls the first of the pair and then calls the result with the model, whose modules `muon` has to see.
    return {"optimizer_cls_and_kwargs": (lambda: muon, options)}
