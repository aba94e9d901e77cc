"""The starter kit: two small models and some text, shipped with the package, so that nothing needs a network."""

from pathlib import Path

from graftlm.errors import DataError, ModelError

STARTER = "starter:"  # a path into the kit, in a recipe
MODELS = {"starter": "encoder", "starter-decoder": "decoder"}  # `model:` in a recipe → folder of the kit


def starter_path(text: str = "") -> Path:
    """The file or folder behind `starter:…`, or the whole kit.

    Raises:
        DataError: a path that leads out of the kit.
    """
    root = Path(__file__).parent
    path = (root / text.removeprefix(STARTER).lstrip("/")).resolve()
    if not path.is_relative_to(root.resolve()):
        raise DataError("a starter: path leads out of the starter kit", found=text)
    return path


def starter_model(name: str) -> Path:
    """The folder of a shipped model.

    >>> starter_model("starter").name
    'encoder'

    Raises:
        ModelError: an installation without it.
    """
    folder = starter_path(MODELS[name])
    if not (folder / "config.json").is_file():
        raise ModelError(f"the model {name!r} is not in this installation", found=folder, fix="reinstall graftlm")
    return folder
