"""The versions of Snakemake and its SLURM executor whose private interfaces this room patches and parses."""

from posttrain.ground.pinned import require

SNAKEMAKE = "9.27.1"
SLURM_EXECUTOR = "2.8.0"


def check(on_slurm: bool) -> None:
    """Raise UserError where another version is installed. on_slurm: whether jobs go through the SLURM executor."""
    require(
        "snakemake",
        SNAKEMAKE,
        "the format of its records, the lines of its log, its locks and the attributes of its workflow",
    )
    if on_slurm:
        used = "the methods that submit, watch and cancel jobs, and the names that it gives them"
        require("snakemake-executor-plugin-slurm", SLURM_EXECUTOR, used)
