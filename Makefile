# `make demo` and `make test` do all set-up themselves. Everything is installed into .venv; a second run is quick.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:

# The newest of these that is here makes the virtual environment; `make setup PYTHON=/path/to/python` takes another.
PYTHON_VERSIONS := 3.13 3.12 3.11
VENV := .venv
PORT ?= 5000
STAMP := $(VENV)/installed
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
export DVC_NO_ANALYTICS := true

# FFCV and the pixel library are compiled here; Slurm, PostgreSQL, a browser and LaTeX are for the tests.
APT_BUILD := build-essential pkg-config libopencv-dev libturbojpeg0-dev libjpeg-dev
APT_SLURM := slurm-wlm slurmdbd munge mariadb-server
APT_TRACKING := postgresql chromium texlive-latex-recommended

.PHONY: help setup demo test check soak fuzz fresh-machine bench dashboard apt-build apt-test

LINT := ruff check .; ruff format --check .; mypy; lint-imports
SIDE_BY_SIDE := --numprocesses 2 --dist loadscope

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## install what is missing (apt packages when root, .venv from the lock file)

demo: setup  ## the whole graph on handwritten digits, then the tables
	@dvc repro
	python -m pipeline show
	echo "Report: reports/index.html    Runs and curves: make dashboard"

test: setup apt-test  ## every check and every test, side by side
	@$(LINT)
	pytest $(SIDE_BY_SIDE) $(PYTEST)

check: setup  ## lint, types, import layers and the tests that take moments: no Slurm, no graph, no browser
	@$(LINT)
	pytest $(SIDE_BY_SIDE) -m "not slow" $(PYTEST)

soak: setup apt-test  ## random faults on a real Slurm for an hour, then the weights (as root; SOAK_S=seconds SEED=)
	@cd tests && python soak.py --seconds $(or $(SOAK_S),3600) --seed $(or $(SEED),0) $(SOAK)

fuzz: setup  ## the fuzzer under AddressSanitizer for an hour (FUZZ_S=seconds)
	@FUZZ_S=$(or $(FUZZ_S),3600) pytest --timeout=0 tests/test_native.py $(PYTEST)

fresh-machine:  ## both README commands in bare Debian systems, made with debootstrap (as root; SUITES=)
	@./.ci/fresh-machine $(SUITES)

bench: setup  ## data path, training step and the rest against timm and stock FFCV, on this machine
	@python -m benchmarks
	python -m benchmarks.training_step
	python -m benchmarks.data_scaling
	python -m benchmarks.data_behind_step
	python -m benchmarks.job_start
	python -m benchmarks.time_to_accuracy

dashboard: setup  ## MLflow's interface on http://127.0.0.1:5000 (PORT=)
	@python -m pipeline views http://127.0.0.1:$(PORT)
	mlflow server --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port $(PORT)

apt-build:
	@packages="$(APT_BUILD)" ./.ci/apt-install

apt-test:
	@packages="$(APT_SLURM) $(APT_TRACKING)" ./.ci/apt-install --optional

$(STAMP): requirements.lock requirements-build.lock pyproject.toml $(wildcard pipeline/*/native/*) | apt-build
	@if [ ! -x $(VENV)/bin/python ]; then
	  python=$$(PYTHON="$(PYTHON)" VERSIONS="$(PYTHON_VERSIONS)" ./.ci/find-python)
	  echo "== virtual environment ($$($$python --version))"
	  $$python -m venv $(VENV)
	fi
	echo "== installer"
	python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-build.lock
	echo "== packages (some GB the first time)"  # compiled here: a job on many nodes could not write beside them
	UV_COMPILE_BYTECODE_TIMEOUT=600 uv pip install --python $(VENV)/bin/python --no-build-isolation --compile-bytecode --require-hashes -r requirements.lock
	echo "== this project"
	uv pip install --quiet --python $(VENV)/bin/python --no-build-isolation --no-deps --reinstall -e .
	./.ci/private-dvc-cache
	touch $@
