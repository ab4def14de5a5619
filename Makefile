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
# A folder of `make wheelhouse`; the one that .venv was made from is used again, unless another is named (or none: WHEELHOUSE=).
WHEELHOUSE ?= $(file < $(STAMP))
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
export DVC_NO_ANALYTICS := true

# FFCV and the pixel library are compiled here; Slurm, PostgreSQL, a browser and LaTeX are for the tests.
APT_BUILD := build-essential pkg-config libopencv-imgproc-dev libturbojpeg0-dev libjpeg-dev
APT_SLURM := slurm-wlm slurmdbd munge mariadb-server
APT_TRACKING := postgresql chromium texlive-latex-recommended

.PHONY: help setup demo test check soak fuzz fresh-machine bench dashboard wheelhouse apt-list apt-test

LINT := ruff check .; ruff format --check .; lint-imports
SIDE_BY_SIDE := --numprocesses 3 --dist loadscope

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## install what is missing: apt packages when root, .venv from the lock file (PYTHON=, WHEELHOUSE=)

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

fresh-machine:  ## the set-up in bare Debian systems, made with debootstrap (as root; SUITES= WAYS= TRY=)
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

wheelhouse:  ## wheels for machines without root, compiler or network (OUT=folder): there, make setup WHEELHOUSE=folder
	@APT="$(APT_BUILD)" VERSIONS="$(PYTHON_VERSIONS)" PYTHON="$(PYTHON)" ./.ci/wheelhouse $(or $(OUT),build/wheelhouse)

apt-list:  ## the apt packages that `make setup` needs, beside Python with its -venv and -dev packages
	@echo $(APT_BUILD)

apt-test:
	@packages="$(APT_SLURM) $(APT_TRACKING)" ./.ci/apt-install --optional

$(STAMP): requirements.lock requirements-build.lock pyproject.toml $(wildcard pipeline/*/native/* .ci/ffcv/*)
	@APT="$(APT_BUILD)" VERSIONS="$(PYTHON_VERSIONS)" PYTHON="$(PYTHON)" WHEELHOUSE="$(WHEELHOUSE)" ./.ci/setup
	echo "$(WHEELHOUSE)" > $@
