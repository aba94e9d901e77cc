"""Makes the fixtures beside it with AdapterHub's own package, which cannot share an environment with ours.

    python -m venv hub && hub/bin/pip install torch==2.13.0 adapters==1.3.0
    hub/bin/python tests/adapters/adapterhub/make.py

Each folder holds a tiny random masked language model, an adapter with drawn weights as the package saves it, and what
the package computes: input ids and logits.
"""

import shutil
from pathlib import Path

import adapters
import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

HERE = Path(__file__).parent
SMALL = {"vocab_size": 40, "max_position_embeddings": 20}
BERT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 20}
DISTIL = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 20}
CASES = {  # folder → model, configuration, whether the file is of the newer kind
    "bert-pfeiffer-inv": (BertForMaskedLM, BertConfig(**BERT, **SMALL), "seq_bn_inv[reduction_factor=2]", True),
    "bert-houlsby": (BertForMaskedLM, BertConfig(**BERT, **SMALL), "double_seq_bn[reduction_factor=4]", False),
    "xlm-roberta-left-out": (
        XLMRobertaForMaskedLM,
        XLMRobertaConfig(**BERT, **SMALL),
        adapters.SeqBnConfig(reduction_factor=4, leave_out=[1], scaling=0.5),
        True,
    ),
    "distilbert-houlsby-inv": (
        DistilBertForMaskedLM,
        DistilBertConfig(**DISTIL, **SMALL),
        "double_seq_bn_inv[reduction_factor=4]",
        True,
    ),
}


def main() -> None:
    for number, (name, (kind, config, adapter, safetensors)) in enumerate(CASES.items()):
        torch.manual_seed(number)
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        bare = kind(config).eval()
        for parameter in bare.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        bare.save_pretrained(folder / "model")
        # with a head of the package's own, because it undoes the invertible adapter in front of these only
        model = adapters.AutoAdapterModel.from_pretrained(folder / "model").eval()
        model.heads["default"].get_output_embeddings().bias.data.copy_(bare.get_output_embeddings().bias)
        model.add_adapter("made", config=adapter)
        model.set_active_adapters("made")
        for key, parameter in model.named_parameters():
            if ".made." in key:
                parameter.data = 0.3 * torch.randn_like(parameter)
        model.model_name = f"{name}/model"  # no path of the machine that made it
        model.save_adapter(str(folder / "adapter"), "made", with_head=False, use_safetensors=safetensors)
        ids = torch.randint(5, 40, (3, 9))
        with torch.no_grad():
            logits = model(input_ids=ids).logits
            without = bare(input_ids=ids).logits
            model.set_active_adapters(None)
            torch.testing.assert_close(model(input_ids=ids).logits, without)
        save_file({"input_ids": ids, "logits": logits, "without": without}, folder / "computed.safetensors")


if __name__ == "__main__":
    main()
