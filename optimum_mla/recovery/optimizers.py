"""Muon for weight matrices, AdamW for the rest, as one optimizer for `Trainer`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from optimum_mla.core.errors import OptionError

OPTIMIZERS = ("adamw", "muon")
"""Names of optimizers; `adamw` stands for the one that `TrainingArguments.optim` names."""


class MuonAdamW(Optimizer):
    """Two of torch's optimizers in one: Muon (Jordan et al., 2024) for matrices, and AdamW for all other parameters.

    Muon's steps are scaled to the root mean square of AdamW's (Liu et al., arXiv 2502.16982), so one learning rate
    serves both. Weight decay is that of the matrices, and betas are AdamW's.
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
        if matrices:
            self.parts.append(Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.parts.append(AdamW(others, lr=lr, weight_decay=0.0, betas=betas))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both optimizers work on this one's groups and state, which schedules set and checkpoints hold."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take loaded groups and states."""
        super().__setstate__(state)
        self._share()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            OptionError: It has another form, as in the checkpoints of older versions, or is of other parameters.
        """
        try:
            super().load_state_dict(state_dict)
        except (KeyError, ValueError) as error:
            raise OptionError(
                "--resume: the state of the optimizer muon in the checkpoint has another form than this version's, as "
                "older versions of optimum-mla wrote it. Go on with the version that began the training, or start over "
                "with --overwrite instead of --resume."
            ) from error

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters."""
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss


def muon(
    model: nn.Module, lr: float, weight_decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.999)
) -> MuonAdamW:
    """Return the optimizer for the parameters of a model that train.

    Token embeddings and the output head are left to AdamW although they are matrices.
    """
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    apart = {id(p) for module in (*tables, head) if module is not None for p in module.parameters()}
    training = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in training if p.ndim == 2 and id(p) not in apart]
    others = [p for p in training if p.ndim != 2 or id(p) in apart]
    return MuonAdamW(matrices, others, lr, weight_decay, betas)


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
