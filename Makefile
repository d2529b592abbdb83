# Every target does its own set-up. What a machine needs: Python 3.11 or newer with pip and venv, git, make.
#   make demo TORCH_INDEX=<address of PyTorch's CPU wheels>    installs a CPU-only torch first (README)
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
NB ?=
MODEL ?= tiny-encoder
PYTEST_ARGS ?=
FIGURES ?=
# Test files at once, each with one thread
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
MIN_PYTHON := $(shell sed -n 's/^min_python *= *//p' settings.ini)
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)
METADATA := settings.ini setup.py pyproject.toml constraints.txt
# torch's threads look for work for some microseconds and then sleep; without it they crawl beside a busy program
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 1000
# nbdev-export does nothing, silently, where IN_TEST is set
UNSET := env -u IN_TEST

.DEFAULT_GOAL := help
.PHONY: help demo test lab export wheel notebooks bench torture clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'

demo: $(VENV)/.base ## Fine-tune the embedded model, full and partial, and show the question before and after
	$(BIN)/llmft demo

test: $(VENV)/.dev ## Check the house, run every notebook in its miniature size, and the other tests (JOBS=0: one after another)
	$(UNSET) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

lab: $(VENV)/.dev ## Open JupyterLab on the tour
	$(BIN)/jupyter lab nbs/index.ipynb

export: $(VENV)/.dev ## Clean the notebooks, write the package from them, rebuild the README
	$(UNSET) $(BIN)/nbdev-clean
	$(UNSET) $(BIN)/nbdev-export
	$(BIN)/python tools/readme.py

wheel: $(VENV)/.dev ## Build the wheel and the source archive into dist/
	rm -rf build dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	@ls -l dist

notebooks: $(VENV)/.dev ## Run the notebooks in the student's size and store their outputs (NB="03_strategy …" for some)
	$(UNSET) $(BIN)/python tools/notebooks.py run $(NB)

bench: $(VENV)/.bench ## Train side by side with other trainers (MODEL=folder of all-MiniLM-L6-v2; LLMFT_DATA: data sets)
	$(BIN)/python benchmarks/bench.py --model $(MODEL) --write

torture: $(VENV)/.dev ## Kill, starve and fool runs, all figures in full; goes on where it was stopped (FIGURES=R1,D1 for some)
	$(BIN)/python tests/torture.py --figures "$(FIGURES)"

clean: ## Remove what was built; the environment and finished runs stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache nbs/.ipynb_checkpoints nbs/.last_checked
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print | xargs rm -rf

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(MIN_PYTHON)".split("."))))' || { \
	  echo "llmft_nb needs Python $(MIN_PYTHON) or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one, for example: make $(MAKECMDGOALS) PYTHON=python$(MIN_PYTHON)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(METADATA) | $(VENV)/bin/python
ifneq ($(TORCH_INDEX),)
	$(PIP) install --index-url $(TORCH_INDEX) $(TORCH)
endif
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.bench: $(VENV)/.base
	$(PIP) install -c constraints.txt -e ".[bench]"
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@
