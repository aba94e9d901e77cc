"""Squared norms of per-example gradients, from one forward and backward pass of the whole batch."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ExampleGradients:
    r"""Records a forward pass, then gives :math:`\lVert \nabla_\theta \langle z_i, v_i \rangle \rVert^2` per example i.

    For a linear layer with inputs X (tokens × in) and output gradients G (tokens × out) of one example the gradient is
    :math:`G^\top X`, and its squared norm :math:`\langle XX^\top, GG^\top \rangle`; whichever of the two is smaller is
    formed. Embeddings use the second with "same token" in place of :math:`XX^\top`. Any other module with parameters
    of its own is differentiated example by example through `torch.func`, on that module alone. Nothing is accumulated
    into ``.grad``, and the gradients of the weights themselves are not asked of the autograd engine.

    Args:
        model: the model whose forward pass is recorded inside the ``with`` block, once.
        parameters: the parameters to measure.
        rows: the length of the first dimension of a layer's input.
        examples: the number of examples; `rows` is a multiple of it (several choices an example).

    Attributes:
        unseen: parameters that no recorded call can account for (shared between modules, used without a call of their
            module, or in a call without a batch dimension); the caller has to differentiate them one by one.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter], rows: int, examples: int):
        self._rows, self._examples = rows, examples
        self._calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        owners: dict[nn.Parameter, list[nn.Module]] = {p: [] for p in parameters}
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if parameter in owners:
                    owners[parameter].append(module)
        self._owner = {p: modules[0] for p, modules in owners.items() if len(modules) == 1}
        self._strange: set[nn.Module] = set()
        self._handles: list = []
        self.unseen: list[nn.Parameter] = list(parameters)

    def __enter__(self) -> "ExampleGradients":
        for module in dict.fromkeys(self._owner.values()):
            if isinstance(module, nn.Embedding):
                self._handles.append(module.register_forward_pre_hook(self._expand))
            self._handles.append(module.register_forward_hook(self._record, with_kwargs=True))
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        seen = {module for module in self._calls if module not in self._strange}
        self.unseen = [p for p in self.unseen if self._owner.get(p) not in seen]

    def squared_norms(self, outputs: Tensor, direction: Tensor) -> dict[nn.Parameter, Tensor]:
        """Parameter → (examples,) for the vector-Jacobian product of `outputs` with `direction`."""
        modules = [module for module in self._calls if module not in self._strange]
        tensors = [output for module in modules for _, output in self._calls[module]]
        if not tensors:
            return {}
        gradients = iter(torch.autograd.grad(outputs, tensors, direction, retain_graph=True, allow_unused=True))
        norms: dict[nn.Parameter, Tensor] = {}
        for module in modules:
            calls = [(x, g) for (x, _), g in [(c, next(gradients)) for c in self._calls[module]] if g is not None]
            if calls:
                found = self._module_norms(module, calls)
                wanted = dict(module.named_parameters(recurse=False))
                norms |= {p: found[name] for name, p in wanted.items() if self._owner.get(p) is module}
        return norms

    def _record(self, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        plain = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(output, Tensor)
        self._calls.setdefault(module, [])
        if not plain or not self._has_batch(module, args[0], output):
            self._strange.add(module)
            return
        self._calls[module].append((args[0].detach(), output))

    def _has_batch(self, module: nn.Module, x: Tensor, output: Tensor) -> bool:
        if x.ndim < 2 or len(x) != self._rows or len(output) != self._rows or not output.requires_grad:
            return False
        if not isinstance(module, nn.Embedding):
            return True
        # A table of relative positions is called with (query, key), which can look like (rows, tokens); subclasses
        # scale what they look up.
        return type(module) is nn.Embedding and x.ndim == 2 and (x.shape[0] != x.shape[1] or self._rows == 1)

    def _expand(self, module: nn.Module, args: tuple) -> tuple | None:
        """Position ids come once for the whole batch; one copy an example changes nothing but keeps examples apart."""
        if len(args) == 1 and args[0].ndim == 2 and len(args[0]) == 1 < args[0].shape[1] and self._rows > 1:
            return (args[0].expand(self._rows, -1),)
        return None

    def _module_norms(self, module: nn.Module, calls: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        if type(module) is nn.Linear:  # a subclass may compute something else
            x, g = (torch.cat([self._by_example(pair[i]) for pair in calls], dim=1) for i in (0, 1))
            norms = {"weight": _linear_norms(x, g)}
            return norms | {"bias": g.sum(1).square().sum(-1)} if module.bias is not None else norms
        if isinstance(module, nn.Embedding):
            ids = torch.cat([x.reshape(self._examples, -1) for x, _ in calls], dim=1)
            g = torch.cat([self._by_example(g) for _, g in calls], dim=1)
            if module.padding_idx is not None:
                g = g * (ids != module.padding_idx).unsqueeze(-1)
            same = ids.unsqueeze(1) == ids.unsqueeze(2)
            return {"weight": (torch.einsum("bsd,btd->bst", g, g) * same).sum((1, 2))}
        totals: dict[str, Tensor] = {}
        for x, g in calls:
            for name, gradient in self._gradients_by_example(module, x, g).items():
                totals[name] = totals.get(name, 0) + gradient
        return {name: value.float().flatten(1).square().sum(1) for name, value in totals.items()}

    def _by_example(self, x: Tensor) -> Tensor:
        """(rows, …, d) → (examples, tokens, d) in float32, or in float64 where it was."""
        x = x if x.dtype == torch.float64 else x.float()
        return x.reshape(self._examples, -1, x.shape[-1])

    def _gradients_by_example(self, module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        weights = {name: p.detach() for name, p in module.named_parameters(recurse=False)}
        rest = {k: v for k, v in module.named_parameters() if k not in weights} | dict(module.named_buffers())

        def one(row: Tensor, gradient: Tensor) -> dict[str, Tensor]:
            _, pull = torch.func.vjp(lambda w: torch.func.functional_call(module, (w, rest), (row,)), weights)
            return pull(gradient)[0]

        split = (self._examples, self._rows // self._examples)
        return torch.func.vmap(one)(x.reshape(*split, *x.shape[1:]), g.reshape(*split, *g.shape[1:]))


def _linear_norms(
    x: Float[Tensor, "examples tokens in"], g: Float[Tensor, "examples tokens out"]
) -> Float[Tensor, " examples"]:
    tokens, width_in, width_out = x.shape[1], x.shape[2], g.shape[2]
    if tokens * (width_in + width_out) < width_in * width_out:
        return (torch.einsum("bsi,bti->bst", x, x) * torch.einsum("bso,bto->bst", g, g)).sum((1, 2))
    return torch.einsum("bto,bti->boi", g, x).square().sum((1, 2))
