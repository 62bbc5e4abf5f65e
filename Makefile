# `make` lists the targets. The first one that needs Python creates .venv and installs into it;
# after that a run starts at once, until pyproject.toml or the constraints change.
#
#   make test PYTEST_ARGS="-k decode"            arguments for pytest
#   make benchmark BENCHMARK_ARGS="--model tiny" arguments for fastattn benchmark
#   make test PIP_ARGS="--extra-index-url URL"   arguments for pip (say, where CPU builds of torch are)
#   make test GPU=                               pretend that there is no GPU

PYTHON ?= python3
VENV   ?= .venv
PIP_ARGS ?=
CONSTRAINTS ?= constraints.txt
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo 1)

ifeq ($(GPU),)
  ifeq ($(origin PYTEST_ARGS),undefined)
    PYTEST_ARGS := -n 2
    # torch spreads over all cores by itself; with a test process per core that only gets in the way.
    TEST_ENV := OMP_NUM_THREADS=1
  endif
  RUN_EXTRAS := hf
  BENCHMARK_ARGS ?= --model tiny -p 512 -g 64 -n 2 --attn fastattn,sdpa,eager
else
  PYTEST_ARGS ?=
  RUN_EXTRAS := cuda,hf
  BENCHMARK_ARGS ?= --model llama-3.1-8b -p 2049 -g 128 -n 4 --attn fastattn,sdpa
endif

PY := $(VENV)/bin/python
# Keyed by content, not by time: a checkout that only touches the files installs nothing again.
KEY := $(shell cat pyproject.toml $(CONSTRAINTS) | cksum | cut -d' ' -f1)-$(if $(GPU),gpu,cpu)
RUN_STAMP := $(VENV)/.fastattn-run-$(KEY)
DEV_EXTRAS ?= dev
TESTS ?= tests
DEV_STAMP := $(VENV)/.fastattn-dev-$(KEY)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help benchmark test quick test-oldest test-newest wheel-test fuzz families gpuless gpu-test mutations support sanitize docs report lint format clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

benchmark: $(RUN_STAMP) ## run a language model through fastattn and compare (with a GPU: Llama-3.1-8B's shape)
	$(VENV)/bin/fastattn benchmark $(BENCHMARK_ARGS)

test: $(DEV_STAMP) ## run the tests; those that need a GPU are skipped and counted without one
	$(if $(TEST_ENV),$(TEST_ENV) )$(PY) -m pytest $(PYTEST_ARGS) $(TESTS)

# The operator, its reference, validation, dispatch, the keys of plans, the layers, a quarter of the random problems.
QUICK := tests/test_call.py tests/test_layers.py tests/test_import.py tests/test_debug.py tests/test_reference.py \
  tests/test_validation.py tests/test_varlen.py tests/test_shape_cache.py tests/dispatch/test_operators.py \
  tests/dispatch/test_routes.py tests/dispatch/test_fast_path.py tests/dispatch/test_layouts_and_modes.py \
  tests/dispatch/test_use_backend.py tests/dispatch/test_eager_gradients.py tests/backends/test_torch.py \
  tests/backends/cudnn/test_keys.py
PROBLEMS := tests/differential/test_problems.py::test_problems

quick: $(DEV_STAMP) ## run the core tests, about a minute on two cores
	$(if $(TEST_ENV),$(TEST_ENV) )$(PY) -m pytest $(PYTEST_ARGS) $(QUICK) '$(PROBLEMS)[outputs-0]' '$(PROBLEMS)[gradients-0]'

# What depends on the versions of other libraries.
BY_VERSION := tests/_compat tests/integrations/transformers tests/lm

test-oldest: ## run the tests of hf and lm with the oldest versions that are promised, in an environment of their own
	@$(MAKE) --no-print-directory test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt DEV_EXTRAS=test \
	  TESTS="$(BY_VERSION)"

test-newest: ## the same with what the registry has now
	@rm -f .venv-newest/.fastattn-dev-*
	@$(MAKE) --no-print-directory test VENV=.venv-newest CONSTRAINTS=constraints-newest.txt DEV_EXTRAS=test \
	  PIP_ARGS="$(PIP_ARGS) --upgrade --upgrade-strategy eager" TESTS="$(BY_VERSION)"

WHEEL_VENV := .venv-wheel
wheel-test: | $(PY) ## build a wheel, install it into a new environment and run it there
	rm -rf out/wheel && $(PY) -m venv --clear $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip wheel -q --no-deps -w out/wheel .
	$(WHEEL_VENV)/bin/python -m pip install -q $(PIP_ARGS) -c $(CONSTRAINTS) "$$(echo out/wheel/*.whl)[$(RUN_EXTRAS)]"
	cd out/wheel && export PATH="$(CURDIR)/$(WHEEL_VENV)/bin:$$PATH" PYTHONPATH= && \
	  fastattn --help && python -c 'import fastattn, fastattn.hf, fastattn.lm, fastattn.parallel' && \
	  fastattn benchmark --model tiny -p 64 -g 16 -n 1

N ?= 5000
fuzz: $(DEV_STAMP) ## hold every backend against the truth on N random problems: make fuzz N=20000
	FASTATTN_EXAMPLES=$(N) $(if $(TEST_ENV),$(TEST_ENV) )$(PY) -m pytest -q $(if $(GPU),,-n 2) tests/differential

FAMILIES ?=
families: $(DEV_STAMP) ## write docs/families.md anew: every model family of transformers against eager attention (15 minutes)
	OMP_NUM_THREADS=1 $(PY) tests/families/run.py $(if $(FAMILIES),,--page docs/families.md) $(FAMILIES)

# The library alone: its own dependencies are for running what it plans.
gpuless: $(DEV_STAMP) ## fetch cuDNN (350 MB), so that `make test` asks it about GPUs that are not here
	test -e $(VENV)/gpuless/nvidia/cudnn/lib/libcudnn.so.9 || \
	  $(PY) -m pip install -q --no-deps --target $(VENV)/gpuless nvidia-cudnn-cu13==9.19.0.56

gpu-test: $(DEV_STAMP) ## run only the tests that need a GPU
	@test -n "$(GPU)" || { echo "make gpu-test: nvidia-smi finds no GPU here" >&2; exit 1; }
	$(PY) -m pytest -m gpu $(PYTEST_ARGS) tests

mutations: $(DEV_STAMP) ## make deliberate mistakes in a copy of the tree: the tests must notice each (10 minutes)
	$(PY) tests/mutations/run.py -j 2

support: gpuless ## write docs/support.md anew: what cuDNN says of each kind of call and GPU
	$(PY) tests/gpuless/support_page.py

# Without torch's caching allocator, so that what lies past a tensor is nobody's. A slow tool: some of the tests only.
SANITIZED := tests/backends/triton/decode/test_decode.py tests/backends/cudnn/test_kernels.py tests/lm/runners/fused/test_runner.py
SANITIZED_K := cuda and (test_features or test_offsets or test_sinks or full_row)
TOOLS ?= memcheck racecheck
sanitize: $(DEV_STAMP) ## the Triton kernels under NVIDIA's compute-sanitizer (needs a GPU)
	for tool in $(TOOLS); do PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 9 \
	  --target-processes all $(PY) -m pytest -q -m gpu -k "$(SANITIZED_K)" $(SANITIZED) || exit 9; done

docs: $(DEV_STAMP) ## build the documentation's site with its page of benchmarks: out/site
	$(PY) -m benchmarks.site
	$(VENV)/bin/zensical build --strict

report: $(DEV_STAMP) ## one page of all figures that are kept: out/report.html
	mkdir -p out
	$(PY) -m benchmarks.report benchmarks/results/*/*.json --html out/report.html

lint: $(DEV_STAMP) ## ruff and mypy, changing nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(DEV_STAMP) ## let ruff fix and format
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

clean: ## remove caches and builds (to start all over, delete .venv as well)
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf docs/benchmarks docs/benchmarks.md
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fastattn needs Python 3.11 or later; name one with: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUN_STAMP): | $(PY)
	$(PY) -m pip install -q $(PIP_ARGS) -c $(CONSTRAINTS) -e '.[$(RUN_EXTRAS)]'
	@rm -f $(VENV)/.fastattn-run-* && touch $@

$(DEV_STAMP): | $(PY)
	$(PY) -m pip install -q $(PIP_ARGS) -c $(CONSTRAINTS) -e '.[$(DEV_EXTRAS)]'
	@rm -f $(VENV)/.fastattn-dev-* && touch $@
