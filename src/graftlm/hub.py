"""The hub, only where a recipe asks for it: licences that go with a run, and its upload."""

import shutil
import tempfile
from pathlib import Path

import huggingface_hub
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from graftlm.errors import ModelError
from graftlm.folder import MODEL, RESOLVED, locate
from graftlm.language_adapters import ADAPTER
from graftlm.recipe import Recipe
from graftlm.starter import STARTER, starter_path


def licences(recipe: Recipe) -> dict[str, str | None]:
    """Licences of model, data and weights: from the recipe, else from the cards beside local files, else None."""
    model, data = recipe.licences.model, recipe.licences.data
    if model is None:
        model = _in_card(Path(locate(recipe)))
    if data is None and recipe.data.train.path.startswith(STARTER):
        data = _in_card(starter_path(recipe.data.train.path).parent)
    return {"model": model, "data": data, "weights": recipe.licences.weights or model}


def _in_card(folder: Path) -> str | None:
    card = folder / "README.md"
    if not card.is_file():
        return None
    found = ModelCard.load(card, ignore_metadata_errors=True).data.license
    return found if isinstance(found, str) else None


def push(recipe: Recipe, folder: Path) -> str:
    """Uploads weights, card, report and result of a finished run; predictions and checkpoints stay here.

    Returns:
        The address of the repository.

    Raises:
        ModelError: the hub refuses.
    """
    api = huggingface_hub.HfApi()
    repository = str(recipe.output.push_to_hub)
    weights = next(folder / name for name in (ADAPTER, MODEL) if (folder / name).is_dir())
    try:
        address = str(api.create_repo(repository, private=recipe.output.private, exist_ok=True))
        with tempfile.TemporaryDirectory() as temporary:
            staged = Path(temporary)
            shutil.copytree(weights, staged, dirs_exist_ok=True)
            for name in ("README.md", "report.html", "result.json", RESOLVED, "recipe.yaml"):
                shutil.copy(folder / name, staged / name)
            api.upload_folder(repo_id=repository, folder_path=staged, commit_message=f"graftlm run {recipe.name}")
    except (HfHubHTTPError, RepositoryNotFoundError) as error:
        raise ModelError("the hub refuses the upload", found=f"{repository}: {error}", fix="hf auth login") from error
    return address
