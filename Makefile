# Two commands: `make run` and `make test`. Either sets up what is missing first; again, it does only what is missing.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
PIP := pip install --quiet --disable-pip-version-check

.PHONY: run test test-slurm test-slurm-full setup lint clean

run: setup
	POSTTRAIN_SUMMARY=later snakemake --cores all
	@posttrain summary  # here, so that it is printed too where nothing was to be done

# The longest files first, in the order of `testpaths`, so that no core is idle at the end.
test: lint
	tests/slurm/install.sh
	pytest -n 2 --dist loadfile --no-loadscope-reorder

# The part of `test` that needs a cluster: Debian's SLURM, installed where it is missing (as root).
test-slurm: .venv/tests
	tests/slurm/install.sh
	pytest tests/slurm

# The default campaign on such a cluster, without and with accounting; about half an hour.
test-slurm-full: .venv/tests
	tests/slurm/install.sh accounting
	pytest tests/slurm/full.py

lint: .venv/tests
	ruff check . && ruff format --check .
	lint-imports --no-cache
	snakefmt --check workflow && snakemake --lint

setup: .venv/ready

# What a run needs. The environment counts as ready only for the pins it was made from.
.venv/ready: envs/requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(PIP) -r envs/requirements.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

# What tests, linters and the type checker need besides.
.venv/tests: .venv/ready envs/tests.txt
	$(PIP) -r envs/tests.txt
	touch $@

clean:
	rm -rf .venv
