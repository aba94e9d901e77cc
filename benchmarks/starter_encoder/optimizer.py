"""How both starter models are trained: the optimizer, and its rate over the time given."""

import math
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

WARM_UP = 0.04


class Optimizer:
    """AdamW and Muon (for the matrices with `layers` in their names) on float32 copies of bf16 weights."""

    def __init__(self, model: nn.Module, layers: str, rate: float, muon: bool = True) -> None:
        self.weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.copies = [parameter.detach().float().clone() for parameter in self.weights]
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        matrix = [muon and layers in name and copy.ndim == 2 for name, copy in zip(names, self.copies, strict=True)]
        rest = [copy for copy, is_matrix in zip(self.copies, matrix, strict=True) if not is_matrix]
        self.parts = [torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, foreach=True)]
        if muon:
            matrices = [copy for copy, is_matrix in zip(self.copies, matrix, strict=True) if is_matrix]
            for half in (matrices[::2], matrices[1::2]):
                self.parts.append(torch.optim.Muon(half, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
        self.rate = rate

    @torch.no_grad()
    def step(self, gradients: list[tuple[torch.Tensor, ...]], factor: float, pool: ThreadPoolExecutor) -> None:
        for copy, *parts in zip(self.copies, *gradients, strict=True):
            copy.grad = sum(part.float() for part in parts) / len(parts)
        nn.utils.clip_grad_norm_(self.copies, 1.0)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.rate * factor
        list(pool.map(lambda part: part.step(), reversed(self.parts)))
        torch._foreach_copy_(self.weights, self.copies)

    def state_dict(self) -> dict:
        return {"copies": self.copies, "parts": [part.state_dict() for part in self.parts]}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        torch._foreach_copy_(self.copies, state["copies"])
        torch._foreach_copy_(self.weights, self.copies)
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)


def schedule(progress: float) -> float:
    """Linear warm-up, then a cosine to zero; `progress` is the share of the training time that has passed."""
    return (
        progress / WARM_UP
        if progress < WARM_UP
        else 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))
    )
