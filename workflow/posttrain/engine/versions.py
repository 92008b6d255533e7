"""The versions of Snakemake and its SLURM executor whose private interfaces this room patches and parses."""

from posttrain.ground.pinned import require

SNAKEMAKE = "9.27.1"
SLURM_EXECUTOR = "2.8.0"


def check_snakemake() -> None:
    """Raise UserError where another version of Snakemake is installed."""
    used = "the format of its records, the lines of its log, its locks and the attributes of its workflow"
    require("snakemake", SNAKEMAKE, used)


def check_slurm_executor() -> None:
    """Raise UserError where another version of the SLURM executor is installed; called before it is patched."""
    used = "the methods that submit, watch and cancel jobs, and the names that it gives them"
    require("snakemake-executor-plugin-slurm", SLURM_EXECUTOR, used)
