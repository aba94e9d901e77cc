"""The bridge into PEFT: our methods are known to it from the moment it is imported, before or after graftlm.

Nothing here imports PEFT on its own: `import graftlm` has to stay light. A method is a module that ends with a call of
`register`; it needs a line in `METHODS`. It must not import `Trainer` or anything that does, such as `TrainerCallback`:
transformers imports PEFT, and with it the methods, while its own trainer is only half there.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

METHODS = ("graftlm.adapters.bottleneck", "graftlm.adapters.flare", "graftlm.adapters.neutral")


def register_all(peft: ModuleType) -> None:
    """Register every method; called by the import hook in `graftlm` once `peft` has been imported."""
    for name in METHODS:
        # A method that is just being imported, and so has imported peft, comes to its own `register` by itself.
        if name not in sys.modules:
            importlib.import_module(name)


def register(name: str, config_cls: type, model_cls: type) -> None:
    """Make a method known to PEFT: its type, configuration, tuner and the prefix of its parameters.

    Args:
        name: in lower case; in `adapter_config.json` it stands in upper case under `peft_type`. Parameters begin with
            this name and an underscore.
        config_cls: a `peft.PeftConfig`.
        model_cls: a `peft.tuners.tuners_utils.BaseTuner`.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    if PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type(name)) is not config_cls:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=f"{name}_")


def peft_type(name: str):
    """The member of PEFT's enumeration of methods, added to it if need be.

    `register_peft_method` insists on a member, and an enumeration cannot be subclassed. The member is a real one: it
    is found by name and by value, and survives pickle, copies and JSON.
    """
    from peft import PeftType

    value = name.upper()
    if value not in PeftType.__members__:
        member = str.__new__(PeftType, value)
        member._name_ = member._value_ = value
        member.__objclass__ = PeftType
        member._sort_order_ = len(PeftType.__members__)
        type.__setattr__(PeftType, value, member)
        PeftType._member_names_.append(value)
        PeftType._member_map_[value] = member
        PeftType._value2member_map_[value] = member
    return PeftType[value]
