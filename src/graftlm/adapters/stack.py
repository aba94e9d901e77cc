"""Adapters on top of each other: a task adapter that reads what a language adapter gives (MAD-X)."""

from __future__ import annotations

from collections.abc import Sequence

from peft import PeftModel
from torch import nn

from graftlm.adapters.tuner import SublayerModel
from graftlm.errors import SetupError


def stack(model: nn.Module, adapters: Sequence[str], *, inference_mode: bool = False) -> None:
    r"""Activate several bottleneck adapters of a model, one on top of the other, and train the last one only.

    At a sublayer that gives f, the first adapter reads what it would read alone, h; each further one reads what the one
    below gives, and adds its part to f again:

    .. math:: v_1 = f + A_1(h), \qquad v_i = f + A_i(v_{i-1}), \qquad f \leftarrow v_k

    So an adapter below acts through those above it: with a fresh one on top (U = 0) the model equals its base. Parallel
    adapters do not read each other: their parts add up. A layer that some of them do not have is passed on to the next.
    The head in use (`modules_to_save`) is that of the last adapter, or the model's own if it has none.

    The stack belongs to its last adapter: whenever PEFT or a Trainer activates that one by its name, those below it are
    active too. Another call changes it, such as another language at test time; ``stack(model, [NAME])`` ends it.

    Args:
        model: a `PeftModel` with `graftlm.BottleneckConfig` adapters, also inside DDP or `torch.compile`.
        adapters: names, bottom first.
        inference_mode: whether the last one is frozen as well.

    Raises:
        SetupError: a name that the model does not have or that comes twice, adapters of different kinds, no adapter, or
            a model without bottleneck adapters; the model is left as it was.

    Source: Pfeiffer et al., *MAD-X*, arXiv 2005.00052, Equations 1 and 2.

    Differs from the paper in: see `graftlm.BottleneckConfig`. PEFT's own `set_adapter([…])` refuses a list, or trains
    all of it.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from graftlm.adapters.bottleneck import BottleneckConfig
        >>> config = BertConfig(
        ...     num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=10
        ... )
        >>> base = BertForSequenceClassification(config)
        >>> model = get_peft_model(base, BottleneckConfig(bottleneck_size=2), adapter_name="lang_de")
        >>> model.add_adapter("sentiment", BottleneckConfig(bottleneck_size=2, task_type="SEQ_CLS"))
        >>> stack(model, ["lang_de", "sentiment"])
        >>> {name.split(".")[-2] for name, parameter in model.named_parameters() if parameter.requires_grad}
        {'sentiment'}
    """
    peft_model = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
    if peft_model is None or not isinstance(peft_model.base_model, SublayerModel):
        raise SetupError(
            "only bottleneck adapters can be stacked",
            found=type(model if peft_model is None else peft_model.base_model).__name__,
            fix='get_peft_model(base, graftlm.BottleneckConfig(reduction_factor=16), adapter_name="lang_de")',
        )
    there = peft_model.peft_config
    if isinstance(adapters, str) or not adapters:
        raise SetupError("a stack is a list of adapter names, bottom first", found=repr(adapters), allowed=there)
    if missing := [name for name in adapters if name not in there]:
        raise SetupError(
            "the model has no adapter of this name",
            found=", ".join(missing),
            allowed=there,
            fix=f'model.load_adapter(FOLDER, "{missing[0]}")',
        )
    if len(set(adapters)) < len(adapters):
        raise SetupError("an adapter stands twice in the stack", found=", ".join(adapters))
    kinds = {name: there[name].kind for name in adapters}
    if len(set(kinds.values())) > 1:
        raise SetupError(
            "the adapters of a stack act at different places",
            found=", ".join(f"{name}: {kind}" for name, kind in kinds.items()),
            allowed="adapters of one kind",
        )
    peft_model.base_model.stack(adapters, inference_mode=inference_mode)
    peft_model.active_adapter = adapters[-1]
