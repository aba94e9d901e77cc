"""Embedding Space Maps from pairs of embeddings: in closed form, and by stochastic gradient descent."""

from __future__ import annotations

import numpy as np

from graftlm.errors import DataError, SetupError

METHODS = ("closed_form", "sgd")
RIDGES = np.logspace(-8, 2, 31)  # tried in generalised cross-validation; in units of the mean eigenvalue


def check(
    base: np.ndarray, tuned: np.ndarray, architecture: str, rank: int | None, method: str, ridge: float | None
) -> None:
    """An error where the arguments of `EmbeddingSpaceMap.fit` make no sense."""
    from graftlm.sources.esm import ARCHITECTURES, LINEAR

    for what, value, allowed in (("architecture", architecture, ARCHITECTURES), ("method", method, METHODS)):
        if value not in allowed:
            raise SetupError(f"unknown {what} of an Embedding Space Map", found=repr(value), allowed=allowed)
    if base.ndim != 2 or base.shape != tuned.shape or len(base) < 2:
        raise DataError(
            "base and tuned embeddings are tables of one shape, with two rows and more",
            found=f"{base.shape} and {tuned.shape}",
        )
    if not (np.isfinite(base).all() and np.isfinite(tuned).all()):
        raise DataError("embeddings hold NaN or infinities")
    if (rank is None) != (architecture == LINEAR):
        raise SetupError("a low-rank map has a rank, and a linear map has none", found=f"{architecture}, rank={rank}")
    if rank is not None and not 1 <= rank <= base.shape[1]:
        raise SetupError("no such rank", found=rank, allowed=f"1 to {base.shape[1]}, the width of the embeddings")
    if ridge is not None and not (np.isfinite(ridge) and ridge >= 0):
        raise SetupError("ridge is a number of at least 0", found=ridge)


def closed_form(
    base: np.ndarray, tuned: np.ndarray, architecture: str, rank: int | None, ridge: float | None
) -> tuple[dict[str, np.ndarray], float]:
    r"""Tensors of the map, and λ in units of the mean eigenvalue.

    :math:`W_\lambda = Y_0^\top X_0 (X_0^\top X_0 + \lambda)^{-1}`, the intercept unpenalised; of rank r:
    :math:`QQ^\top W_\lambda`, Q the first r eigenvectors of
    :math:`W_\lambda (X_0^\top X_0 + \lambda) W_\lambda^\top`. λ by generalised cross-validation is the one with the
    least :math:`\lVert Y_0 - X_0W_\lambda^\top \rVert^2 / (n - 1 - \mathrm{tr} H_\lambda)^2`.
    """
    x, y = base.astype(float), tuned.astype(float)
    if architecture == "identity_low_rank":
        y = y - x
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    x, y = x - x_mean, y - y_mean
    values, vectors = np.linalg.eigh(x.T @ x)
    values = np.maximum(values, 0.0)
    unit = values.mean()
    if unit == 0:
        raise DataError("all base embeddings are equal, so that there is nothing to fit a map to")
    turned = vectors.T @ (x.T @ y)
    if ridge is None:
        ridge = _cross_validated(values, (turned**2).sum(axis=1), (y**2).sum(), len(x))
    penalty = ridge * unit
    shrunk = values + penalty
    inverse = np.divide(1.0, shrunk, out=np.zeros_like(shrunk), where=shrunk > 1e-13 * values[-1])
    weight = (turned.T * inverse) @ vectors.T
    if rank is None:
        return {"weight": weight, "bias": y_mean - weight @ x_mean}, float(ridge)
    half = (turned.T * inverse) * np.sqrt(shrunk)
    _, directions = np.linalg.eigh(half @ half.T)
    up = directions[:, : -rank - 1 : -1].copy()
    down = weight.T @ up
    return {"up": up, "down": down, "bias": y_mean - up @ (down.T @ x_mean)}, float(ridge)


def _cross_validated(values: np.ndarray, energy: np.ndarray, total: float, rows: int) -> float:
    """The ridge of least generalised cross-validation error, all of them from one eigen-decomposition."""
    errors = []
    for ridge in RIDGES:
        shrunk = values + ridge * values.mean()
        residual = max(total - (energy * (2 / shrunk - values / shrunk**2)).sum(), 0.0)
        freedom = rows - 1 - (values / shrunk).sum()
        errors.append(residual / max(freedom, 1e-9) ** 2)
    return float(RIDGES[int(np.argmin(errors))])


def sgd(
    base: np.ndarray,
    tuned: np.ndarray,
    architecture: str,
    rank: int | None,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
) -> dict[str, np.ndarray]:
    """Tensors of the map after the paper's training: mean squared error, AdamW, linear decay, clipping at 1."""
    import torch
    from torch import nn

    for what, value in {"epochs": epochs, "batch_size": batch_size}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SetupError(f"{what} is a whole number of at least 1", found=repr(value))
    x, y = (torch.from_numpy(np.array(side, dtype=np.float32)) for side in (base, tuned))
    width = x.shape[1]
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> nn.Parameter:  # as nn.Linear starts
        return nn.Parameter((2 * torch.rand(*shape, generator=generator) - 1) / width**0.5)

    named = (
        {"weight": uniform(width, width)}
        if rank is None
        else {"up": uniform(width, rank), "down": uniform(width, rank)}
    )
    named["bias"] = uniform(width)
    identity = architecture == "identity_low_rank"
    if identity:
        with torch.no_grad():
            named["up"].zero_()

    def mapped(rows: torch.Tensor) -> torch.Tensor:
        moved = rows @ named["weight"].T if rank is None else (rows @ named["down"]) @ named["up"].T
        return moved + named["bias"] + (rows if identity else 0)

    optimizer = torch.optim.AdamW(named.values(), lr=learning_rate, weight_decay=weight_decay)
    steps = epochs * -(-len(x) // batch_size)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1 - step / steps, 0))
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch_size):
            loss = nn.functional.mse_loss(mapped(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(list(named.values()), 1.0)
            optimizer.step()
            decay.step()
    return {name: parameter.detach().numpy() for name, parameter in named.items()}
