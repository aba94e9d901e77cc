"""PEFT knows our methods from the moment it is imported, whoever is imported first."""

import copy
import json
import pickle
import subprocess
import sys

import peft
import pytest
import torch
from adapters.bottlenecks import adapted, outputs
from peft import PeftModel, PeftType, get_peft_model_state_dict
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from tiny import tiny_batch, tiny_model

from graftlm.adapters import registry
from graftlm.adapters.bottleneck import BottleneckConfig, BottleneckModel


def run(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An adapter on disk, its base, and the logits of both together."""
    folder = tmp_path_factory.mktemp("saved")
    model, batch = adapted("bert", task_type="SEQ_CLS"), tiny_batch("bert")
    tiny_model("bert", dropout=0.0).save_pretrained(folder / "base")
    model.save_pretrained(folder / "adapter")
    torch.save({"batch": batch, "logits": outputs(model, batch)}, folder / "expected.pt")
    (folder / "config.pickle").write_bytes(pickle.dumps(model.peft_config["default"]))
    return folder


LOAD = """
import sys, torch
from transformers import AutoModelForSequenceClassification
folder = sys.argv[1]
expected = torch.load(folder + "/expected.pt", weights_only=True)
base = AutoModelForSequenceClassification.from_pretrained(folder + "/base")
model = peft.PeftModel.from_pretrained(base, folder + "/adapter", is_trainable=True).eval()
torch.testing.assert_close(model(**expected["batch"]).logits, expected["logits"])
print(model.peft_type.name, *graftlm.trainable_layers(base).names, graftlm.ScheduledUnfreezing.__name__)
"""
UNPICKLE = """
import pickle, sys
config = pickle.load(open(sys.argv[1] + "/config.pickle", "rb"))
import peft
assert config.peft_type is peft.PeftType.BOTTLENECK is peft.PeftType("BOTTLENECK")
assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["BOTTLENECK"] is type(config)
print(type(config).__module__, config.bottleneck_size, len(peft.PeftType))
"""


@pytest.mark.parametrize("imports", ["import graftlm, peft", "import peft, graftlm"])
def test_from_pretrained_works_after_a_bare_import_in_either_order(saved, imports):
    assert run(imports + LOAD, saved) == "BOTTLENECK layer.0 layer.1 layer.2 ScheduledUnfreezing"


def test_unpickling_a_configuration_imports_what_it_needs(saved):
    assert run(UNPICKLE, saved) == f"graftlm.adapters.bottleneck 5 {len(PeftType)}"


def test_transformers_may_be_the_one_that_imports_peft():
    """Its trainer does so while it is itself being imported: a method that needs the trainer would fail then."""
    code = "import graftlm.adapters.registry; from transformers import Trainer; from peft import PeftType"
    assert run(f"{code}; print(PeftType('BOTTLENECK'), len(PeftType))") == f"PeftType.BOTTLENECK {len(PeftType)}"


def test_the_type_is_a_real_member():
    kind = PeftType.BOTTLENECK
    assert isinstance(kind, PeftType) and kind == "BOTTLENECK"
    assert PeftType("BOTTLENECK") is PeftType["BOTTLENECK"] is kind
    assert kind in list(PeftType) and "BOTTLENECK" in list(PeftType) and kind in PeftType
    assert pickle.loads(pickle.dumps(kind)) is kind and copy.deepcopy(kind) is kind and copy.copy(kind) is kind
    assert json.loads(json.dumps({"peft_type": kind})) == {"peft_type": "BOTTLENECK"}
    assert (kind.name, kind.value, repr(kind)) == ("BOTTLENECK", "BOTTLENECK", "<PeftType.BOTTLENECK: 'BOTTLENECK'>")
    assert len({*PeftType}) == len(PeftType.__members__) and {kind: 1}[PeftType("BOTTLENECK")] == 1
    with pytest.raises(ValueError, match="NONSENSE"):
        PeftType("NONSENSE")


def test_every_table_of_peft_has_it_and_registering_again_changes_nothing():
    def tables():
        found = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)
        return [dict(table) for table in found]

    before = tables()
    assert [table["BOTTLENECK"] for table in before] == [BottleneckConfig, BottleneckModel, "bottleneck_"]
    registry.register("bottleneck", config_cls=BottleneckConfig, model_cls=BottleneckModel)
    registry.register_all(peft)
    assert tables() == before


def test_the_configuration_comes_back_from_json(tmp_path):
    settings = {
        "kind": "houlsby",
        "reduction_factor": 8.0,
        "activation": "gelu",
        "dropout": 0.25,
        "scaling": 2.0,
        "layers_to_transform": [0, 1],
        "exclude_modules": ["layer.1.output"],
        "modules_to_save": ["pooler"],
    }
    BottleneckConfig(**settings, task_type="SEQ_CLS").save_pretrained(tmp_path)
    for loaded in (peft.PeftConfig.from_pretrained(tmp_path), BottleneckConfig.from_pretrained(tmp_path)):
        assert type(loaded) is BottleneckConfig and loaded.peft_type is PeftType.BOTTLENECK
        assert {key: getattr(loaded, key) for key in settings} == settings


@pytest.mark.parametrize("architecture", ["bert", "llama", "t5"])
def test_transformers_own_load_adapter(architecture, tmp_path):
    model, batch = adapted(architecture), tiny_batch(architecture)
    model.save_pretrained(tmp_path)
    native = tiny_model(architecture, dropout=0.0)
    plain = outputs(native, batch)
    info = native.load_adapter(str(tmp_path), adapter_name="other")
    assert not info.missing_keys and not info.unexpected_keys
    torch.testing.assert_close(outputs(native, batch), outputs(model, batch))
    saved, loaded = get_peft_model_state_dict(model), native.get_adapter_state_dict("other")
    assert {k.removeprefix("base_model.model.") for k in saved} == set(loaded)
    native.disable_adapters()
    assert torch.equal(outputs(native, batch), plain)
    native.enable_adapters()
    native.delete_adapter("other")
    assert torch.equal(outputs(native, batch), plain)


def test_auto_classes_of_peft(tmp_path):
    base = tiny_model("bert", dropout=0.0)
    base.save_pretrained(tmp_path / "base")
    model, batch = adapted("bert", task_type="SEQ_CLS"), tiny_batch("bert")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    assert isinstance(loaded, PeftModel)
    torch.testing.assert_close(outputs(loaded, batch), outputs(model, batch))
