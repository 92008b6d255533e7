"""Stages, mathematics and records of a declarative workflow for LLM post-training; imports no Snakemake."""
