"""A run as a model of lm-evaluation-harness, so that its tasks can be put to what a recipe trained."""

import os
from pathlib import Path
from typing import Any

import torch

from graftlm import recipe as recipes
from graftlm.errors import MissingExtra, SetupError
from graftlm.folder import RESOLVED, load


def lm_eval_model(folder: str | os.PathLike[str], *, device: str | None = None, **options: Any) -> Any:
    """A finished `causal_lm` run as a model of lm-evaluation-harness (the extra ``lm-eval``).

    Args:
        folder: a run folder, such as `runs/causal-lm`.
        device: where it runs; None: the accelerator where there is one, else the processor.
        options: of ``lm_eval.models.huggingface.HFLM``, such as ``batch_size=16`` or ``max_length=512``.

    Returns:
        An ``lm_eval.api.model.LM`` to hand on::

            import graftlm, lm_eval

            model = graftlm.lm_eval_model("runs/causal-lm", batch_size=16)
            lm_eval.simple_evaluate(model=model, tasks=["belebele_dan_Latn"])

    Raises:
        MissingExtra: lm-evaluation-harness is not installed.
        SetupError: a run of another task; the harness asks for the likelihood of text.
        DataError: the folder holds no finished run.
    """
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise MissingExtra(
            "lm-evaluation-harness is not installed", found=str(error), fix='pip install "graftlm[lm-eval]"'
        ) from error
    model, tokenizer = load(folder, tokenizer=True)
    task = recipes.load_recipe(Path(folder) / RESOLVED).task
    if task != "causal_lm":
        raise SetupError(
            "lm-evaluation-harness asks for the likelihood of text, which only a causal language model has",
            found=f"task: {task} in {folder}",
            allowed="task: causal_lm",
        )
    model.to(device or torch.accelerator.current_accelerator() or "cpu")
    return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", **options)
