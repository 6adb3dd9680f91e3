# The whole set-up on a machine with Python 3.11 and nothing else: `make demo`, `make test`.
# Each makes .venv on its first run; a stamp file there makes the second run quick.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
RUNTIME := $(VENV)/.installed-runtime
DEV := $(VENV)/.installed-dev

# One thread a process: the tests run several processes, and small tensors gain nothing from more.
test test-all: export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format bench readme figures constraints clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /|/' | awk -F'|' '{printf "make %-12s %s\n", $$1, $$2}'

demo: $(RUNTIME) ## Inspect a model with a real fault, then its healthy twin
	$(BIN)/gradflow inspect sample_models/deep_sigmoid_mlp.py
	@echo
	$(BIN)/gradflow inspect sample_models/residual_sigmoid_mlp.py

test: lint ## Lint, types and every test but the slow ones; what CI runs
	$(BIN)/pytest -q -n $(WORKERS) -m "not slow"

test-all: lint ## The same with the slow tests
	$(BIN)/pytest -q -n $(WORKERS)

lint: $(DEV) ## ruff check, ruff format --check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV) ## Let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DEV) ## What watching costs, and how long a start takes; wants a quiet machine
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/check.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/anatomy.py

readme: $(RUNTIME) ## Renew the screen in README.md from the real program
	$(BIN)/python docs/update_readme.py

figures: $(DEV) ## Run and draw the figures of docs/residual.md again: four minutes on one core
	$(BIN)/python docs/figures/draw.py

constraints: $(DEV) ## Write what .venv holds to constraints.txt
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' | LC_ALL=C sort -f > constraints.txt

clean: ## Remove caches and build output; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# torch goes first and alone, so that its pin is settled before anything that depends on it is resolved.
$(RUNTIME): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No python3 found: install Python 3.11 or newer, or set PYTHON." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is too old: gradflow needs Python 3.11 or newer; set PYTHON." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) --editable .
	@touch $@

$(DEV): $(RUNTIME)
	$(INSTALL) --editable '.[dev]'
	@touch $@
