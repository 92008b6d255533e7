"""Fetch of a campaign's models on the hub `config.json` and the headers of their weights alone, for planning.

posttrain fetch --shapes [CAMPAIGN]
"""

import json
from pathlib import Path

from posttrain.config.sections import HubModel
from posttrain.config.sources import hub_items
from posttrain.dag import campaign
from posttrain.dag.given import SHAPES
from posttrain.dag.plan import Plan
from posttrain.data.hub import explained
from posttrain.ground import credentials, progress
from posttrain.ground.errors import UserError, gather
from posttrain.ground.files import write_json
from posttrain.stages import fetch


def run_fetch(config: str | None, output: Path | None, shapes: str | None) -> None:
    """Fetch what a section names or, with `shapes`, what planning a campaign needs."""
    if shapes:
        progress.name = "fetch"
        credentials.reveal()
        gather(lambda item: fetch_shapes(*item), list(models(campaign.load(shapes)).items()))
    elif config and output:
        fetch.run_fetch(config, output)
    else:
        raise UserError("fetch: give --config and --output, or --shapes")


def models(plan: Plan) -> dict[str, HubModel]:
    """Folder under results/fetch/ -> the model, for each base on the hub."""
    bases = [experiment.base for experiment in plan.experiments.values() if experiment.base.hub]
    return {item: base.hub for base in bases for item in hub_items(base) if base.hub}


def fetch_shapes(item: str, model: HubModel) -> None:
    """Write `shapes.json` of a model beside the manifest that `fetch` will write: its commit, its configuration and the
    shape of each weight. Raises UserError for errors of the hub and the network."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import NotASafetensorsRepoError

    with explained("model", model.id, model.revision):
        commit = HfApi().repo_info(model.id, revision=model.revision, timeout=10).sha
        config = json.loads(Path(hf_hub_download(model.id, "config.json", revision=commit)).read_text("utf-8"))
        try:
            files = HfApi().get_safetensors_metadata(model.id, revision=commit).files_metadata
        except NotASafetensorsRepoError as error:
            raise UserError(f"model {model.id} at {commit}: {error}") from None
    weights = {name: tensor.shape for file in files.values() for name, tensor in file.tensors.items()}
    folder = Path("results/fetch", item)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SHAPES, {"revision": commit, "config": config, "weights": weights})
    progress.say(f"{model.id} at {commit}: config.json and the shapes of {len(weights)} weights in {folder / SHAPES}")
