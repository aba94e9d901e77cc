"""Squared norms of per-example gradients, from one forward and backward pass of the whole batch."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn


class ExampleGradients:
    r"""Records a forward pass, then gives :math:`\lVert \nabla_\theta \langle z_i, v_i \rangle \rVert^2` per example i.

    For a linear layer with inputs X (tokens × in) and output gradients G (tokens × out) of one example the gradient is
    :math:`G^\top X`, and its squared norm :math:`\langle XX^\top, GG^\top \rangle`; whichever of the two is smaller is
    formed. Embeddings use the second with "same token" in place of :math:`XX^\top`; a matrix that embeds the input and
    makes the output (tied) has both parts and twice their product. Any other module with parameters of its own is
    differentiated example by example through `torch.func`, on that module alone. Nothing is accumulated into ``.grad``,
    and the gradients of the weights themselves are not asked of the autograd engine.

    Args:
        model: the model whose forward pass is recorded inside the ``with`` block, once.
        parameters: the parameters to measure.
        rows: the length of the first dimension of a layer's input.
        examples: the number of examples; `rows` is a multiple of it (several choices an example).

    Attributes:
        unseen: parameters that no recorded call can account for (shared between modules other than embeddings and
            linear layers, used without a call of their module, or in a call without a batch dimension); the caller has
            to differentiate them one by one.
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
        self._tied = {
            p: modules
            for p, modules in owners.items()
            if len(modules) > 1 and all(isinstance(m, nn.Embedding) or type(m) is nn.Linear for m in modules)
        }
        self._strange: set[nn.Module] = set()
        self._scales: dict[nn.Module, float | None] = {}
        self._handles: list = []
        self.unseen: list[nn.Parameter] = list(parameters)

    def __enter__(self) -> "ExampleGradients":
        several = [module for modules in self._tied.values() for module in modules]
        for module in dict.fromkeys([*self._owner.values(), *several]):
            if isinstance(module, nn.Embedding):
                self._handles.append(module.register_forward_pre_hook(self._expand))
            self._handles.append(module.register_forward_hook(self._record, with_kwargs=True))
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        seen = {module for module in self._calls if module not in self._strange}
        self._tied = {
            p: [m for m in modules if m in self._calls]
            for p, modules in self._tied.items()
            if not self._strange.intersection(modules) and seen.intersection(modules)
        }
        self.unseen = [p for p in self.unseen if self._owner.get(p) not in seen and p not in self._tied]

    def squared_norms(self, outputs: Tensor, direction: Tensor) -> dict[nn.Parameter, Tensor]:
        """Parameter → (examples,) for the vector-Jacobian product of `outputs` with `direction`."""
        modules = [module for module in self._calls if module not in self._strange]
        tensors = [output for module in modules for _, output in self._calls[module]]
        if not tensors:
            return {}
        gradients = iter(torch.autograd.grad(outputs, tensors, direction, retain_graph=True, allow_unused=True))
        calls = {
            module: [(x, g) for (x, _), g in [(call, next(gradients)) for call in self._calls[module]] if g is not None]
            for module in modules
        }
        norms: dict[nn.Parameter, Tensor] = {}
        for module in modules:
            wanted = {name: p for name, p in module.named_parameters(recurse=False) if self._owner.get(p) is module}
            if calls[module] and wanted:
                found = self._module_norms(module, calls[module])
                norms |= {p: found[name] for name, p in wanted.items()}
        for parameter, owners in self._tied.items():
            lookups = [self._lookup(m, x, g) for m in owners if isinstance(m, nn.Embedding) for x, g in calls[m]]
            products = [(x, g) for m in owners if not isinstance(m, nn.Embedding) for x, g in calls[m]]
            if lookups or products:
                norms[parameter] = self._tied_norms(lookups, products)
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
        # A table of relative positions is called with (query, key), which can look like (rows, tokens).
        if x.ndim != 2 or (x.shape[0] == x.shape[1] and self._rows > 1):
            return False
        if type(module) is not nn.Embedding:  # Gemma multiplies what it looks up
            self._scales[module] = _scale(module, x, output)
            return self._scales[module] is not None
        return True

    def _expand(self, module: nn.Module, args: tuple) -> tuple | None:
        """Position ids come once for the whole batch; one copy an example changes nothing but keeps examples apart."""
        if len(args) == 1 and args[0].ndim == 2 and len(args[0]) == 1 < args[0].shape[1] and self._rows > 1:
            return (args[0].expand(self._rows, -1),)
        return None

    def _module_norms(self, module: nn.Module, calls: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        if type(module) is nn.Linear or _is_transposed_linear(module):  # a subclass may compute something else
            x, g = (_joined([self._by_example(pair[i]) for pair in calls]) for i in (0, 1))
            norms = {"weight": _linear_norms(x, g)}
            return norms | {"bias": g.sum(1).square().sum(-1)} if module.bias is not None else norms
        if isinstance(module, nn.Embedding):
            ids, g = (_joined(parts) for parts in zip(*(self._lookup(module, x, g) for x, g in calls), strict=True))
            return {"weight": _lookup_norms(ids, g)}
        if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
            x, g = (_joined([self._by_example(pair[i]) for pair in calls]) for i in (0, 1))
            normed = nn.functional.layer_norm(x, module.normalized_shape, eps=module.eps)
            norms = {"weight": (g * normed).sum(1).square().sum(-1)}
            return norms | {"bias": g.sum(1).square().sum(-1)} if module.bias is not None else norms
        totals: dict[str, Tensor] = {}
        for x, g in calls:
            for name, gradient in self._gradients_by_example(module, x, g).items():
                totals[name] = totals.get(name, 0) + gradient
        return {name: value.float().flatten(1).square().sum(1) for name, value in totals.items()}

    def _lookup(self, module: nn.Embedding, ids: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """(examples, tokens) ids and the gradients (examples, tokens, d) that arrive at their rows of the table."""
        if type(module) is not nn.Embedding:
            g = g * self._scales[module]  # type: ignore[operator]  # a module without a scale was refused
        g = self._by_example(g)
        ids = ids.reshape(self._examples, -1)
        return ids, g if module.padding_idx is None else g * (ids != module.padding_idx).unsqueeze(-1)

    def _tied_norms(self, lookups: list[tuple[Tensor, Tensor]], products: list[tuple[Tensor, Tensor]]) -> Tensor:
        """For one table W used by rows (e = W[ids]) and as a matrix (z = W x): the squared norm of the sum of both."""
        norms = torch.zeros(())
        if lookups:
            ids, g = (_joined(parts) for parts in zip(*lookups, strict=True))
            norms = _lookup_norms(ids, g)
        if products:
            x, z = (_joined([self._by_example(pair[i]) for pair in products]) for i in (0, 1))
            x, z = _used_positions(x, z)
            norms = norms + _linear_norms(x, z)
            if lookups:
                columns = z.gather(2, ids.unsqueeze(1).expand(-1, z.shape[1], -1))
                norms = norms + 2 * (columns * torch.einsum("bsd,btd->bst", x, g)).sum((1, 2))
        return norms

    def _by_example(self, x: Tensor) -> Tensor:
        """(rows, …, d) → (examples, tokens, d) in float32, or in float64 where it was."""
        x = x if x.dtype == torch.float64 else x.float()
        return x.reshape(self._examples, -1, x.shape[-1])

    def _gradients_by_example(self, module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        weights = {name: p.detach() for name, p in module.named_parameters(recurse=False)}
        rest = {k: v for k, v in module.named_parameters() if k not in weights} | dict(module.named_buffers())

        def one(row: Tensor, gradient: Tensor) -> dict[str, Tensor]:
            _, pull = torch.func.vjp(  # type: ignore[misc]  # three values only with has_aux
                lambda w: torch.func.functional_call(module, (w, rest), (row,)), weights
            )
            return pull(gradient)[0]

        split = (self._examples, self._rows // self._examples)
        return torch.func.vmap(one)(x.reshape(*split, *x.shape[1:]), g.reshape(*split, *g.shape[1:]))


def squared_norms(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    parameters: Sequence[nn.Parameter],
    forward: Callable[[Mapping[str, Tensor], slice], tuple[Tensor, Iterable[Tensor]]],
    *,
    examples: int,
    rows: int,
) -> Float[Tensor, "examples parameters"]:
    """Squared gradient norms in float64 on the CPU: in one pass, and example by example for what that cannot reach.

    Args:
        model: see `ExampleGradients`.
        batch: tensors by name, examples first.
        parameters: what is differentiated.
        forward: (a batch, which examples of the whole one it holds) → outputs and the directions at them; the norms of
            several directions are added.
        examples: their number.
        rows: see `ExampleGradients`.
    """
    columns = {parameter: column for column, parameter in enumerate(parameters)}
    squares = torch.zeros(examples, len(columns), dtype=torch.float64)
    with ExampleGradients(model, parameters, rows, examples) as recorder:
        outputs, directions = forward(batch, slice(None))
    for direction in directions:
        for parameter, values in recorder.squared_norms(outputs, direction).items():
            squares[:, columns[parameter]] += values.double().cpu()
    for row in range(examples) if recorder.unseen else ():
        one = slice(row, row + 1)
        outputs, directions = forward({name: value[one] for name, value in batch.items()}, one)
        for direction in directions:
            gradients = torch.autograd.grad(outputs, recorder.unseen, direction, retain_graph=True, allow_unused=True)
            for parameter, gradient in zip(recorder.unseen, gradients, strict=True):
                if gradient is not None:
                    squares[row, columns[parameter]] += gradient.double().square().sum().cpu()
    return squares


def _linear_norms(
    x: Float[Tensor, "examples tokens in"], g: Float[Tensor, "examples tokens out"]
) -> Float[Tensor, " examples"]:
    tokens, width_in, width_out = x.shape[1], x.shape[2], g.shape[2]
    if tokens * (width_in + width_out) < width_in * width_out:
        return (torch.einsum("bsi,bti->bst", x, x) * torch.einsum("bso,bto->bst", g, g)).sum((1, 2))
    return torch.einsum("bto,bti->boi", g, x).square().sum((1, 2))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The tokens of several calls one behind the other; those of a single one are not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _lookup_norms(
    ids: Shaped[Tensor, "examples tokens"], g: Float[Tensor, "examples tokens width"]
) -> Float[Tensor, " examples"]:
    same = ids.unsqueeze(1) == ids.unsqueeze(2)
    return (torch.einsum("bsd,btd->bst", g, g) * same).sum((1, 2))


def _used_positions(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The positions with a gradient, moved to the front; a masked LM has one at every seventh of them."""
    used = (z != 0).any(-1)
    most = int(used.sum(1).max())
    order = used.int().argsort(dim=1, descending=True, stable=True)[:, : max(most, 1)].unsqueeze(-1)
    return x.gather(1, order.expand(-1, -1, x.shape[-1])), z.gather(1, order.expand(-1, -1, z.shape[-1]))


def _is_transposed_linear(module: nn.Module) -> bool:
    """GPT-2's Conv1D: a linear layer that keeps its weight as (in, out)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _scale(module: nn.Embedding, ids: Tensor, output: Tensor) -> float | None:
    """The number that a subclass of Embedding multiplies its rows with, or None if it does something else."""
    rows, found = module.weight.detach()[ids].float(), output.detach().float()
    scale = float((found * rows).sum() / rows.square().sum().clamp_min(1e-30))
    tolerance = 2 * torch.finfo(output.dtype).eps
    return scale if torch.allclose(found, scale * rows, rtol=tolerance * 4, atol=tolerance * abs(scale)) else None
