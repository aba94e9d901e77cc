"""Tiny random models of every supported architecture, built in memory from their configs: no download, no file.

    from tiny import ARCHITECTURES, available, tiny_batch, tiny_model, tiny_tokenizer

A model has width 16, 4 heads and a vocabulary of 96; a batch holds padded rows of different lengths and the labels that
its task needs.
"""

from __future__ import annotations

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 96
PAD, EOS, BOS, MASK, UNKNOWN = 0, 1, 2, 3, 4
FIRST_WORD = 5

ARCHITECTURES: tuple[str, ...] = (
    "bert",
    "roberta",
    "xlm-roberta",
    "distilbert",
    "modernbert",
    "llama",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3",
    "gpt2",
    "t5",
    "mt5",
)
ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert", "modernbert")
DECODERS = ("llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt2")
ENCODER_DECODERS = ("t5", "mt5")

TASKS = {
    "base": "AutoModel",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "masked_lm": "AutoModelForMaskedLM",
    "causal_lm": "AutoModelForCausalLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
}
_MODEL_TYPES = {"gemma3": "gemma3_text"}


def available(architecture: str, task: str) -> bool:
    """Whether transformers has this architecture with this head, in the form in which people use it."""
    if architecture not in ARCHITECTURES or task not in TASKS:
        raise ValueError(f"unknown pair {architecture!r}, {task!r}: {ARCHITECTURES}, {tuple(TASKS)}")
    if task == "causal_lm" and architecture not in DECODERS:
        return False  # BERT's and RoBERTa's causal heads exist for encoder-decoder pairs only
    return type(_config(architecture)) in _auto_class(task)._model_mapping


def tiny_model(
    architecture: str,
    task: str = "sequence_classification",
    *,
    num_layers: int = 3,
    num_labels: int = 3,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.1,
    seed: int = 0,
    **config: object,
) -> PreTrainedModel:
    """A random model in training mode; `dropout` reaches every dropout that the architecture has."""
    if not available(architecture, task):
        raise ValueError(f"transformers has no {architecture} for {task}")
    labels = {} if task == "question_answering" else {"num_labels": num_labels}
    settings = _config(architecture, num_layers=num_layers, dropout=dropout, **labels, **config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _auto_class(task).from_config(settings, dtype=dtype)
        with torch.no_grad():  # biases and norms away from 0 and 1, so that no gradient is zero by construction
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.train()


def tiny_batch(
    architecture: str,
    task: str = "sequence_classification",
    batch_size: int = 4,
    length: int = 7,
    seed: int = 0,
    num_labels: int = 3,
) -> dict[str, torch.Tensor]:
    """Model inputs with right padding (every second row is shorter) and labels; unlabelled positions carry -100."""
    if not available(architecture, task):
        raise ValueError(f"transformers has no {architecture} for {task}")
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    ids = integers(FIRST_WORD, VOCABULARY, batch_size, length)
    lengths = torch.tensor([length if row % 2 == 0 else max(3, length - 1 - row) for row in range(batch_size)])
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids[:, 0] = BOS
    ids[torch.arange(batch_size), lengths - 1] = EOS  # one end mark a row, as T5's classifier wants
    ids = ids.masked_fill(mask == 0, PAD)
    batch = {"input_ids": ids, "attention_mask": mask}
    if task == "sequence_classification":
        batch["labels"] = integers(0, num_labels, batch_size)
    elif task == "token_classification":
        batch["labels"] = integers(0, num_labels, batch_size, length).masked_fill(mask == 0, -100)
    elif task == "question_answering":
        start = torch.ones(batch_size, dtype=torch.long)
        batch |= {
            "start_positions": start,
            "end_positions": (start + integers(0, 2, batch_size)).clamp(max=lengths - 1),
        }
    elif task == "causal_lm":
        batch["labels"] = ids.masked_fill(mask == 0, -100)
    elif task == "masked_lm":
        hidden = (torch.rand(ids.shape, generator=generator) < 0.3) & (ids >= FIRST_WORD)
        hidden[:, 1] = True
        batch |= {"labels": ids.masked_fill(~hidden, -100), "input_ids": ids.masked_fill(hidden, MASK)}
    elif task == "seq2seq_lm":
        targets = integers(FIRST_WORD, VOCABULARY, batch_size, length - 2)
        targets[1::2, -2:] = -100
        batch["labels"] = targets
    elif architecture in ENCODER_DECODERS:  # task "base": T5Model has no labels to shift into decoder inputs
        batch["decoder_input_ids"] = ids
    return batch


def tiny_tokenizer(words: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with the special ids above, `words` and then "w0", "w1", … up to the tiny vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = {"[PAD]": PAD, "[EOS]": EOS, "[BOS]": BOS, "[MASK]": MASK, "[UNK]": UNKNOWN}
    filler = [f"w{number}" for number in range(VOCABULARY)]
    ordered = list(dict.fromkeys([*words, *filler]))[: VOCABULARY - FIRST_WORD]
    if missing := set(words) - set(ordered):
        raise ValueError(f"{len(missing)} words do not fit into a vocabulary of {VOCABULARY}")
    vocabulary = special | {word: FIRST_WORD + number for number, word in enumerate(ordered)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", pair="[BOS] $A [EOS] $B [EOS]", special_tokens=[("[BOS]", BOS), ("[EOS]", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        eos_token="[EOS]",
        bos_token="[BOS]",
        mask_token="[MASK]",
        unk_token="[UNK]",
        cls_token="[BOS]",
        sep_token="[EOS]",
        model_max_length=32,
    )


def _auto_class(task: str):
    return getattr(transformers, TASKS[task])


def _config(architecture: str, *, num_layers: int = 3, dropout: float = 0.1, **more: object) -> PreTrainedConfig:
    width, heads, inner = 16, 4, 32
    usual = {
        "hidden_size": width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "max_position_embeddings": 64,
    }
    bert_dropout = {
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "classifier_dropout": dropout,
    }
    decoder = usual | {"num_key_value_heads": 2, "head_dim": 4, "attention_dropout": dropout}
    t5 = {
        "d_model": width,
        "d_kv": 4,
        "d_ff": inner,
        "num_layers": num_layers,
        "num_decoder_layers": num_layers,
        "num_heads": heads,
        "dropout_rate": dropout,
        "classifier_dropout": dropout,
        "decoder_start_token_id": PAD,
    }
    settings: dict[str, dict[str, object]] = {
        "bert": usual | bert_dropout,
        "roberta": usual | bert_dropout,
        "xlm-roberta": usual | bert_dropout,
        "distilbert": {
            "dim": width,
            "n_layers": num_layers,
            "n_heads": heads,
            "hidden_dim": inner,
            "max_position_embeddings": 64,
            "dropout": dropout,
            "attention_dropout": dropout,
            "seq_classif_dropout": dropout,
            "qa_dropout": dropout,
        },
        "modernbert": usual
        | {
            "embedding_dropout": dropout,
            "mlp_dropout": dropout,
            "attention_dropout": dropout,
            "classifier_dropout": dropout,
            "global_attn_every_n_layers": 2,
            "local_attention": 8,
            "cls_token_id": BOS,
            "sep_token_id": EOS,
        },
        "llama": decoder,
        "qwen3": decoder,
        "mistral": decoder | {"sliding_window": None},
        "gemma2": decoder | {"sliding_window": 4, "query_pre_attn_scalar": 4},
        "gemma3": decoder | {"sliding_window": 4, "query_pre_attn_scalar": 4},
        "gpt2": {
            "n_embd": width,
            "n_layer": num_layers,
            "n_head": heads,
            "n_positions": 64,
            "resid_pdrop": dropout,
            "embd_pdrop": dropout,
            "attn_pdrop": dropout,
            "summary_first_dropout": dropout,
        },
        "t5": t5,
        "mt5": t5,
    }
    common = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
    name = _MODEL_TYPES.get(architecture, architecture)
    return AutoConfig.for_model(name, **(settings[architecture] | common | more))
