"""Find damaged artifacts, and set them aside, so that the next run remakes them.

posttrain verify
"""

from pathlib import Path

from posttrain.ground.errors import UserError
from posttrain.ground.files import listed, sha256, verify
from posttrain.ground.identity import DAMAGED, record_of


def verify_inputs(inputs: dict[str, Path | list[Path]]) -> None:
    """Compare the inputs with their manifests; fetched ones are in the shared cache and checked by `hub` when used."""
    for role, manifest in inputs.items():
        if role != "fetched" and isinstance(manifest, Path):
            verify_artifact(manifest)


def verify_artifact(manifest: Path) -> None:
    """Compare an artifact with its manifest, and the files beside that with their record. The manifest of a damaged one
    is renamed, so that Snakemake remakes it.

    Raises UserError naming every damaged file.
    """
    if damages := damages_of(manifest):
        reason = set_aside(manifest)
        todo = "run snakemake again, which remakes it"
        todo = f"{reason}; who may write there runs posttrain verify, and snakemake" if reason else todo
        raise UserError(*damages, f"{manifest.parent}: {todo}")


def damages_of(manifest: Path) -> list[str]:
    """What is damaged of an artifact, in lines. Raises UserError where it has no manifest."""
    try:
        verify(manifest)
        return [f"{file}: its bytes differ from its record" for file in altered(beside(manifest))]
    except UserError as error:
        if not manifest.is_file():
            raise
        return [problem for problem in error.problems if not problem.startswith("remake it")]


def digests(manifest: Path) -> dict[str, str]:
    """File -> sha256 of an artifact, as it was made; {} without a readable manifest."""
    try:
        files = {str(manifest.parent / name): digest for name, (digest, _) in listed(manifest).items()}
    except UserError:
        return {}
    return files | beside(manifest)


def beside(manifest: Path) -> dict[str, str]:
    """File -> sha256 of the files that a manifest does not list (`artifact.BESIDE`), by their record."""
    recorded = record_of(manifest.parent).get("beside", {})
    return {str(manifest.parent / name): digest for name, digest in recorded.items()}


def altered(files: dict[str, str]) -> list[str]:
    """Those of the files that exist and have another sha256."""
    return [file for file, digest in files.items() if Path(file).is_file() and sha256(Path(file)) != digest]


def set_aside(manifest: Path) -> str:
    """Rename the manifest of a damaged artifact, so that the next run remakes it; returns why it stays, "" where it
    does not. A reader without permission to write must learn which file is damaged all the same."""
    try:
        manifest.replace(manifest.with_name(DAMAGED))
    except FileNotFoundError:  # another process has renamed it meanwhile
        return ""
    except OSError as error:
        return f"its manifest cannot be renamed: {error.strerror}"
    return ""
