"""Stages, mathematics and records of a declarative workflow for LLM post-training; imports no Snakemake."""

__version__ = "0.1.0"
