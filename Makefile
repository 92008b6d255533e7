# `make run` and `make test` set up what they need first. Typed again, they do only what is missing.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Modules are compiled when they are imported first: pip would compile all of them, most of which nothing imports.
PIP := pip install --quiet --disable-pip-version-check --no-compile
export PYTHONDONTWRITEBYTECODE :=

.PHONY: run verify test test-slurm test-slurm-full setup lint clean .slurm .tested

run: setup
	POSTTRAIN_SUMMARY=later snakemake --cores all
	@posttrain summary  # printed here, so that it is also printed where nothing was to be done

# Rules on the claims of the default campaign, controls that must fail among them; fails where one does not hold.
verify: setup
	snakemake --cores all verify

# Two at once: SLURM is installed beside the packages, and linted beside the tests.
test:
	$(MAKE) --no-print-directory --jobs 2 lint .tested

# Files run in the order of collection, the longest first (tests/conftest.py), so that no core is idle at the end. Three
# processes for two cores: the tests on a cluster wait most of their time.
.tested: .venv/tests .venv/validator/ready .slurm
	pytest -n 3 --dist loadfile --no-loadscope-reorder

.slurm:
	tests/slurm/install.sh

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

# Changed pins make the environment anew. Its packages come in one call of pip, which takes ten seconds to find that
# nothing is missing.
define environment
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(PIP) -r envs/$(1).txt
	$(PIP) --no-deps --no-build-isolation --editable .
	touch .venv/ready $@
endef

# What a run needs.
.venv/ready: envs/requirements.txt pyproject.toml
	$(call environment,requirements)

# The validator of bundles, apart from the packages that it contradicts.
.venv/validator/ready: envs/validator.txt .venv/tests
	$(PYTHON) -m venv .venv/validator
	.venv/validator/bin/$(PIP) -r envs/validator.txt
	touch $@

# With what only tests, linters and the type checker need.
.venv/tests: envs/tests.txt envs/requirements.txt pyproject.toml
	$(call environment,tests)

clean:
	rm -rf .venv
