"""Set-ups in which scheduled unfreezing would be silently wrong, or save nothing, found before the first step."""

from __future__ import annotations

import warnings

from accelerate.state import AcceleratorState, DistributedType, PartialState
from transformers import PreTrainedModel

from graftlm.errors import SetupError


def check_distributed(args, model) -> None:
    """Set-ups in which layers that open later would silently not train, or drift apart between processes."""
    kind = PartialState().distributed_type
    if kind == DistributedType.DEEPSPEED:
        raise SetupError(
            "scheduled unfreezing has not been tested under DeepSpeed, which fixes its parameters at the start",
            found="DeepSpeed",
            allowed="one device, DDP, FSDP2",
        )
    if kind == DistributedType.FSDP:
        plugin = AcceleratorState().fsdp_plugin
        if plugin.fsdp_version == 1 and not plugin.use_orig_params:
            raise SetupError(
                "FSDP1 flattens layers together, so they cannot be frozen one by one",
                found="fsdp_version=1, use_orig_params=False",
                fix='fsdp_config={"fsdp_version": 2} or {"use_orig_params": True}',
            )
    if kind in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.MULTI_XPU):
        found = args.ddp_find_unused_parameters
        checkpointing = _checkpointing(args, model)
        if found is False or (found is None and isinstance(model, PreTrainedModel) and checkpointing):
            raise SetupError(
                "DDP waits for the gradients of frozen layers unless it looks for unused parameters",
                found=f"ddp_find_unused_parameters={found}"
                + (" with activation checkpointing" if checkpointing else ""),
                fix="TrainingArguments(ddp_find_unused_parameters=True, "
                "activation_checkpointing_kwargs={'use_reentrant': False})",
            )
        if getattr(args, "ddp_static_graph", None):
            raise SetupError(
                "DDP's static graph cannot follow layers that open during the run",
                found="ddp_static_graph=True",
                fix="ddp_static_graph=False",
            )


def is_fsdp() -> bool:
    """Whether accelerate shards the model over the processes."""
    return PartialState().distributed_type == DistributedType.FSDP


def _checkpointing(args, model) -> bool:
    """transformers calls it activation checkpointing from 5.23 on, gradient checkpointing before."""
    said = getattr(args, "activation_checkpointing", None) or getattr(args, "gradient_checkpointing", None)
    name = (
        "is_activation_checkpointing" if hasattr(model, "is_activation_checkpointing") else "is_gradient_checkpointing"
    )
    return bool(said or getattr(model, name, False))


def check_traceable() -> None:
    """Raises where the Fisher trace of a sharded model has not been held against that of one process."""
    kind = PartialState().distributed_type
    flattened = kind == DistributedType.FSDP and AcceleratorState().fsdp_plugin.fsdp_version == 1
    if flattened or kind == DistributedType.DEEPSPEED:
        raise SetupError(
            "the Fisher trace has not been tested under this way of sharding a model over devices",
            found="fsdp_version=1" if flattened else kind.value,
            allowed="one device, DDP, FSDP2",
            fix='fsdp_config={"fsdp_version": 2}, or a schedule that needs no trace (gradual) without record_trace',
        )


def without_input_gradients(model) -> list[PreTrainedModel]:
    """Stops backward passes that go down to the embeddings below frozen layers, where that changes no gradient.

    Activation checkpointing makes the embeddings' output require gradients, which its reentrant kind needs and the
    other one does not.
    """
    found = [m for m in model.modules() if getattr(m, "_require_grads_hook", None) is not None]
    checkpointing = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    reentrant = [m for m in checkpointing if m._gradient_checkpointing_func.keywords.get("use_reentrant") is not False]
    if found and (reentrant or not checkpointing):
        warnings.warn(
            "the model passes gradients down to its input embeddings (enable_input_require_grads), so frozen layers "
            "save no time: "
            + (
                "use activation_checkpointing_kwargs={'use_reentrant': False}, which needs no such gradients"
                if checkpointing
                else "call disable_input_require_grads() on it if nothing below the adapters is to train"
            ),
            stacklevel=2,
        )
        return []
    for module in found:
        module.disable_input_require_grads()
    return found
