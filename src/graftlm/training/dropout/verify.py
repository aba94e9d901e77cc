"""What a model's dropouts really drop, seen in a forward pass in training mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from graftlm.errors import ModelError
from graftlm.training.dropout.noise import ATTENTION, gaussian_noise
from graftlm.training.dropout.sites import Block, Site, in_kernel, is_dropout

_ROWS, _TOKENS = 8, 32
_SIGMAS = 5.0
_SEEN_THROUGH = ("eager", "sdpa", ATTENTION)


def measure(backbone: nn.Module, blocks: Sequence[Block], noise: str) -> dict[str, tuple[float | None, int]]:
    """Path of each dropout → the share of elements that it dropped in a forward pass, and their number.

    With Gaussian noise the share is the rate that has the variance found; None: it did not run.
    """
    sites = [site for block in blocks for site in block.sites]
    modes = {module: module.training for module in backbone.modules()}
    devices = sorted({p.device.index for p in backbone.parameters() if p.device.type == "cuda"})
    watcher = _Watcher(sites, backbone, gaussian=noise == "gaussian")
    try:
        backbone.train()
        with torch.random.fork_rng(devices=devices), torch.no_grad(), _visible_attention(backbone), watcher:
            torch.manual_seed(0)
            backbone(**_made_up_batch(backbone))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return watcher.rates()


def _made_up_batch(backbone: Any) -> dict[str, Tensor]:
    config = backbone.config.get_text_config()
    tokens = min(_TOKENS, getattr(config, "max_position_embeddings", None) or _TOKENS)
    device = next(backbone.parameters()).device
    ids = torch.randint(config.vocab_size, (_ROWS, tokens), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return batch | {"decoder_input_ids": ids} if config.is_encoder_decoder else batch


@contextmanager
def _visible_attention(backbone: Any):
    """Flash attention's mask cannot be seen; the rate reaches it through the same argument as eager attention's."""
    before = backbone.config._attn_implementation
    hidden = before not in _SEEN_THROUGH
    try:
        if hidden:
            backbone.set_attn_implementation("eager")
        yield
    finally:
        if hidden:
            backbone.set_attn_implementation(before)


class _Watcher(TorchFunctionMode):
    """Counts what each dropout drops, in dropout modules, in functional dropout and inside SDPA's kernel."""

    def __init__(self, sites: Sequence[Site], backbone: nn.Module, *, gaussian: bool):
        super().__init__()
        # an adapter's dropout inside an attention is not the attention's
        self._paths: dict[nn.Module, str] = {module: "" for module in backbone.modules() if is_dropout(module)}
        for site in sites:
            value = site.value
            self._paths[site.watch if in_kernel(site) else value] = site.path
            if in_kernel(site):
                self._paths.pop(value, None)  # where it is called as a module, it is the attention's
        self._sums: dict[str, float] = dict.fromkeys((site.path for site in sites), 0.0)
        self._counts = dict.fromkeys(self._sums, 0)
        self._gaussian = gaussian
        self._running: list[str] = []
        self._handles: list = []

    def __enter__(self):
        for module, path in self._paths.items():
            self._handles.append(module.register_forward_pre_hook(lambda *_, path=path: self._running.append(path)))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        return super().__enter__()

    def __exit__(self, *exception):
        for handle in self._handles:
            handle.remove()
        return super().__exit__(*exception)

    def _leave(self, *_) -> None:
        self._running.pop()

    def rates(self) -> dict[str, tuple[float | None, int]]:
        found: dict[str, tuple[float | None, int]] = {}
        for path, count in self._counts.items():
            share = self._sums[path] / count if count else None
            found[path] = (share / (1 + share) if self._gaussian and share is not None else share, count)
        return found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if self._running and self._running[-1]:
            if function in (nn.functional.dropout, gaussian_noise):
                self._look_at(function, args, kwargs, result)
            elif function is nn.functional.scaled_dot_product_attention:
                self._look_into_kernel(function, args, kwargs)
        return result

    def _look_at(self, function, args, kwargs, result: Tensor) -> None:
        x = args[0] if args else kwargs["input"]
        if not x.any():  # the output of an adapter that has not learned yet: zeros, which show no mask
            x = torch.ones_like(x)
            result = function(x, *args[1:], **{name: value for name, value in kwargs.items() if name != "input"})
        self._count(x, result)

    def _look_into_kernel(self, function, args, kwargs) -> None:
        """With the identity as the values, the kernel's output is its attention probabilities, dropped or not."""
        names = ("query", "key", "value", "attn_mask", "dropout_p")
        given = dict(zip(names, args, strict=False)) | kwargs
        key = given["key"]
        eye = torch.eye(key.shape[-2], dtype=key.dtype, device=key.device)
        given["value"] = eye.expand(*key.shape[:-2], -1, -1)
        self._count(function(**given | {"dropout_p": 0.0}), function(**given))

    def _count(self, x: Tensor, y: Tensor) -> None:
        path = self._running[-1]
        there = x != 0
        if self._gaussian:
            self._sums[path] += float((y[there] / x[there] - 1).double().square().sum())
        else:
            self._sums[path] += int((there & (y == 0)).sum())
        self._counts[path] += int(there.sum())


def compare(
    blocks: Sequence[Block], rates: Mapping[str, float], measured: Mapping[str, tuple[float | None, int]], noise: str
) -> None:
    """Holds what was measured against what was set.

    Raises:
        ModelError: a rate that does not agree, or a dropout that did not run.
    """
    for block in blocks:
        for site in block.sites:
            share, count = measured[site.path]
            p = rates[block.name]
            if share is None:
                raise ModelError(
                    "a dropout that was set takes no part in the forward pass, so its rate would have no effect",
                    found=f"{site.path} (block {block.name})",
                    fix="use the model with this dropout active; disabled or merged adapters have none",
                )
            spread = (p * (1 - p) / count) ** 0.5 if noise == "bernoulli" else p * (1 - p) * (2 / count) ** 0.5
            if abs(share - p) > _SIGMAS * spread + 1e-6:
                raise ModelError(
                    "the measured mask rate does not agree with the rate that was set",
                    found=f"{site.path}: set {p:.4f}, measured {share:.4f} on {count} elements",
                )
