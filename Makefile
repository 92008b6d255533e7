# `make run` and `make test` set up what they need first. Typed again, they do only what is missing.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
PIP := pip install --quiet --disable-pip-version-check

.PHONY: run test test-slurm test-slurm-full setup lint clean

run: setup
	POSTTRAIN_SUMMARY=later snakemake --cores all
	@posttrain summary  # printed here, so that it is also printed where nothing was to be done

# Files run in the order of `testpaths`, the longest first, so that no core is idle at the end.
test: lint
	tests/slurm/install.sh
	pytest -n 2 --dist loadfile --no-loadscope-reorder

# The tests on a cluster: Debian's SLURM, installed if it is missing (as root).
test-slurm: .venv/tests
	tests/slurm/install.sh
	pytest tests/slurm

# The default campaign on such a cluster, without and with accounting; takes about half an hour.
test-slurm-full: .venv/tests
	tests/slurm/install.sh accounting
	pytest tests/slurm/full.py

lint: .venv/tests
	ruff check . && ruff format --check .
	lint-imports --no-cache
	mypy
	snakefmt --check workflow && snakemake --lint

setup: .venv/ready

# What a run needs. Changed pins make the environment anew.
.venv/ready: envs/requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(PIP) -r envs/requirements.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

# What only tests, linters and the type checker need.
.venv/tests: .venv/ready envs/tests.txt
	$(PIP) -r envs/tests.txt
	touch $@

clean:
	rm -rf .venv
