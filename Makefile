# make train      environment, installation, and the main job: TD-MPC2 learns to run
# make test       environment, installation, lint, types, fast tests
# make test-all   the same with the slow tests
# make docs       the site, in site/; a warning is an error
# make dist       sdist and wheel to hand on, and the wheel that stands in for labmaze on Python 3.13
# ENV, STEPS, ALGO, ARGS and LOGS change what is trained, PYTHON and VENV where, TORCH which build,
# JOBS by how many processes the tests are run.

PYTHON ?= python3
VENV ?= .venv
ENV ?= DMC/cheetah-run-v0
ALGO ?= tdmpc2
STEPS ?=
LOGS ?= logs
ARGS ?=
JOBS ?= 2

# cpu: the build without CUDA. default: PyPI's, which is for CUDA on Linux and for MPS on a Mac.
# auto: cpu on a Linux machine without an NVIDIA driver, else default.
TORCH ?= auto
TORCH_VERSION := $(shell sed -n 's/^torch==\([0-9.]*\).*/\1/p' constraints.txt)
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
# One thread a process: small matrices gain nothing from a second one, and two busy processes whose
# threads wait for each other on two cores are slower by far than one after the other.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile

.PHONY: train install install-dev lint types test test-all docs dist clean
.DELETE_ON_ERROR:

train: install
	$(VENV)/bin/python -m rl_zoo3.train --algo $(ALGO) --env $(ENV) -f $(LOGS) -P \
		$(if $(STEPS),-n $(STEPS)) $(ARGS)

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	@build=$(TORCH); \
	if [ "$$build" = auto ]; then \
		if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; \
		then build=cpu; else build=default; fi; \
	fi; \
	echo "installing torch $(TORCH_VERSION), build: $$build"; \
	if [ "$$build" = cpu ]; then \
		$(PIP) install --quiet -c constraints.txt "torch==$(TORCH_VERSION)+cpu" 2>/dev/null \
		|| $(PIP) install --index-url $(TORCH_CPU_INDEX) "torch==$(TORCH_VERSION)"; \
	else \
		$(PIP) install -c constraints.txt "torch==$(TORCH_VERSION)"; \
	fi
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml hatch_build.py startup/tdmpc2_sb3_startup.pth startup/tdmpc2_sb3_startup.py
	$(PIP) install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet -c constraints.txt -e ".[dev,docs,postgres]"
	touch $@

lint: install-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: install-dev
	$(VENV)/bin/mypy

test: lint types
	$(PYTEST)

test-all: lint types
	$(PYTEST) -m "slow or not slow"

# Material's note about the next major version of MkDocs is no warning about these pages.
docs: install-dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --site-dir site

dist: install-dev
	rm -rf dist
	$(VENV)/bin/python -m build --outdir dist .
	$(VENV)/bin/python -m build --wheel --outdir dist placeholders/labmaze

clean:
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache
