# `make demo` answers questions about a video; `make test` runs the tests. Both set up all they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := setup.cfg requirements/constraints.txt
# Tests are small: one thread in each of as many processes as there are cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test test-slow test-versions test-transformers test-gpu check docs clean

demo: $(VENV)/.installed  ## questions about samples/shapes.mp4, answered by the bundled checkpoint
	@$(BIN)/python samples/demo.py

test: $(VENV)/.installed  ## the fast tests
	$(PYTEST) -n auto

test-slow: $(VENV)/.installed  ## the tests that take minutes
	$(PYTEST) -m slow

test-versions: $(VENV)/.installed  ## a fast subset on every supported Transformers; ALL=1 runs every test
	$(BIN)/python requirements/try_versions.py $(if $(ALL),--all)

test-gpu: $(VENV)/.installed  ## the tests that need a GPU; a missing one is a failure
	CROSSLMM_EXPECT_GPU=1 $(PYTEST) -m gpu

test-transformers: $(VENV)/.installed  ## Transformers' common suites; SUITES=/a/checkout/of/the/installed/release
	@test -d "$(SUITES)/tests" || { echo "Say where a checkout of Transformers lies: make test-transformers SUITES=..."; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check parameterized httpx
	CROSSLMM_TRANSFORMERS_SUITES=$(SUITES) $(PYTEST) -o addopts= -o filterwarnings= modeling_tests/transformers_suites

check: $(VENV)/.installed  ## lint, format and types; repairs nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed  ## the site, in site/, and every code block of its pages and of the README
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(PYTEST) modeling_tests/test_docs.py -m "slow or not slow"

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache

# torch first and by itself: pinned, so that no later requirement brings another build.
$(VENV)/.installed: $(SETUP)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt -e ".[dev]"
	touch $@
