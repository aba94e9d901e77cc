"""graftlm: graft a new language, domain or task onto a pretrained language model.

The public names are those of the stub beside this file. Each is imported when it is first used, so that
`import graftlm` needs neither torch nor transformers nor peft. PEFT learns our methods when it is imported itself.
"""

import lazy_loader
import wrapt

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

wrapt.register_post_import_hook("graftlm.adapters.registry:register_all", "peft")
