# One place for what people and CI run. Each target is idempotent: stamp files remember what is done.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
MODEL ?= smollm2
HOST ?= 127.0.0.1
PORT ?= 8000
PROMPT ?= Explain in two sentences why the sky is blue.
PYTEST_ARGS ?=

BIN := .venv/bin
# cmake, ninja and setuptools live apart: the environment that serves stays small.
BUILD_BIN := .venv-build/bin
PIP := -m pip --disable-pip-version-check --quiet
LOCKED := $(PIP) install --require-hashes --no-deps -r
CPP_SOURCES := $(shell find csrc -type f 2>/dev/null)
BENCH_SOURCES := $(wildcard benchmarks/kernels/*.cpp benchmarks/kernels/*.h)
CPP_FORMATTED := $(filter %.cpp %.h %.inl %.cu %.cuh,$(CPP_SOURCES)) $(BENCH_SOURCES)
CMAKE := PATH="$(CURDIR)/$(BUILD_BIN):$$PATH" cmake

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables: MODEL=$(MODEL) HOST=$(HOST) PORT=$(PORT) PYTHON=$(PYTHON)"

# --- build -----------------------------------------------------------------------------------------------------------

.PHONY: build
build: .venv/.stamp-package ## make .venv, install the locked dependencies, build the extension

.venv/.stamp-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llmserve needs Python 3.11 or newer; set PYTHON=")'
	@command -v c++ >/dev/null || { echo "llmserve needs a C++20 compiler (Debian: apt install g++)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@touch $@

.venv/.stamp-runtime: requirements/runtime.txt .venv/.stamp-python
	@echo "installing the locked dependencies into .venv"
	@$(BIN)/python $(LOCKED) requirements/runtime.txt
	@touch $@

.venv-build/.stamp: requirements/build.txt .venv/.stamp-python
	@echo "installing the locked build tools into .venv-build"
	@test -x $(BUILD_BIN)/python || $(BIN)/python -m venv .venv-build
	@$(BUILD_BIN)/python $(LOCKED) requirements/build.txt
	@touch $@

build/.stamp-extension: $(CPP_SOURCES) CMakeLists.txt setup.py .venv-build/.stamp
	@echo "building the extension llmserve._C"
	@$(BUILD_BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# An editable wheel made by the build environment, so that .venv needs no build tools.
.venv/.stamp-package: pyproject.toml build/.stamp-extension .venv/.stamp-runtime
	@mkdir -p build/editable && rm -f build/editable/*.whl
	@$(BUILD_BIN)/python -c "import setuptools.build_meta as m; m.build_editable('build/editable')" >build/editable.log 2>&1 \
		|| { cat build/editable.log >&2; exit 1; }
	@$(BIN)/python $(PIP) install --no-deps --no-index --force-reinstall build/editable/*.whl
	@touch $@

.venv/.stamp-dev: requirements/dev.txt .venv/.stamp-package
	@echo "installing the locked test and check tools into .venv"
	@$(BIN)/python $(LOCKED) requirements/dev.txt
	@touch $@

.PHONY: dev
dev: .venv/.stamp-dev ## build, and install the tools that test and check need

# --- run -------------------------------------------------------------------------------------------------------------

.PHONY: serve
serve: build ## serve MODEL over OpenAI-compatible HTTP on HOST:PORT
	@exec $(BIN)/llmserve serve $(MODEL) --host $(HOST) --port $(PORT)

.PHONY: demo
demo: build ## from nothing to one streamed answer of MODEL to PROMPT
	@$(BIN)/llmserve chat $(MODEL) --prompt "$(PROMPT)" --temperature 0

# --- test ------------------------------------------------------------------------------------------------------------

.PHONY: test
test: dev test-cpp test-cuda ## C++ tests under sanitizers, then pytest; ends with the list of skips and their reasons
	@$(BIN)/llmserve pull smollm2 || echo "the default model could not be fetched: tests that need it will skip"
	@$(BIN)/python -m pytest -q -rs --ignore tests/cuda $(PYTEST_ARGS)

# The packages of .venv, and torch for CPUs beside them.
TORCH_BIN := .venv-torch/bin
TORCH_SITE = $$($(TORCH_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
BASE_SITE = $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

.venv-torch/.stamp: requirements/torch.txt .venv/.stamp-dev
	@echo "installing torch into .venv-torch"
	@test -x $(TORCH_BIN)/python || $(BIN)/python -m venv .venv-torch
	@$(TORCH_BIN)/python $(PIP) install -r requirements/torch.txt
	@echo "$(BASE_SITE)" >"$(TORCH_SITE)/llmserve.pth"
	@touch $@

.PHONY: test-cuda
test-cuda: .venv-torch/.stamp cuda-emulator ## the CUDA executor with its kernels in torch: whole networks without a GPU
	@OMP_NUM_THREADS=1 $(TORCH_BIN)/python -m pytest -q -rs -m "not gpu" tests/cuda $(PYTEST_ARGS)

.PHONY: test-cpp
test-cpp: .venv-build/.stamp ## C++ tests under ASan + UBSan (all ISA levels) and TSan (scalar)
	@for preset in asan tsan; do \
		echo "C++ tests: $$preset"; \
		$(CMAKE) --preset $$preset >build/$$preset.log || { cat build/$$preset.log; exit 1; }; \
		$(CMAKE) --build build/$$preset -j "$$(nproc)" >build/$$preset.log || { cat build/$$preset.log; exit 1; }; \
		build/$$preset/llmserve_tests; \
	done

# --- check -----------------------------------------------------------------------------------------------------------

.PHONY: check
check: dev check-python check-cpp check-wheel ## format, lint, types, import contracts, size, ISA symbols, wheel

.PHONY: check-python
check-python: dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python scripts/check_size.py
	@$(BIN)/python -m benchmarks.table --check

.PHONY: check-cpp
check-cpp: dev
	@$(BIN)/clang-format --dry-run --Werror $(CPP_FORMATTED)
	@$(BIN)/python scripts/check_isa_symbols.py
	@$(BIN)/python scripts/check_cuda.py

.PHONY: wheel
wheel: .venv-build/.stamp ## build the wheel into dist/
	@rm -rf dist && $(BUILD_BIN)/python $(PIP) wheel . --no-build-isolation --no-deps -w dist

.PHONY: check-wheel
check-wheel: wheel .venv/.stamp-python
	@$(BIN)/python scripts/check_wheel.py dist/*.whl $(BIN)/python

.PHONY: format
format: dev ## format Python and C++ in place
	@$(BIN)/ruff check --quiet --fix-only . ; $(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CPP_FORMATTED)

# --- GPU, benchmarks, reference --------------------------------------------------------------------------------------

HAS_GPU = nvidia-smi -L >/dev/null 2>&1
HAS_FILES = compgen -G "$(1)" >/dev/null

# PEERS: of llama.cpp, ik_llama.cpp, openvino, vllm; those that are not installed are, each into .venv-peers*.
# PEER: the folder with llama-server, llama-bench and llama-batched-bench; empty builds them into .venv-peers.
PEERS ?= llama.cpp,openvino
PEER ?= $(LLMSERVE_PEER_LLAMA_CPP)
BENCH_ARGS ?=

.PHONY: bench
bench: build ## llmserve beside PEERS (PEER=DIR: llama.cpp's binaries; else it is built, about 10 minutes)
	@$(BIN)/python -m benchmarks.peers --peers $(PEERS) $(if $(PEER),--binaries "$(PEER)") --model $(MODEL) $(BENCH_ARGS)

.PHONY: serving-bench
serving-bench: build ## latencies, throughput and goodput of MODEL served (BENCH_ARGS: see python -m benchmarks.serving --help)
	@$(BIN)/python -m benchmarks.serving $(MODEL) $(BENCH_ARGS)

.PHONY: kernel-bench-build
kernel-bench-build: .venv-build/.stamp
	@mkdir -p build
	@$(CMAKE) --preset benchmarks >build/benchmarks.log || { cat build/benchmarks.log; exit 1; }
	@$(CMAKE) --build build/benchmarks -j "$$(nproc)" >build/benchmarks.log || { cat build/benchmarks.log; exit 1; }

.PHONY: kernel-bench
kernel-bench: build kernel-bench-build ## CPU GEMM kernels against the roofs of this machine (BENCH_ARGS=--quick: 20 s)
	@$(BIN)/python -m benchmarks.kernels $(BENCH_ARGS)

.PHONY: cuda
cuda: .venv-build/.stamp ## build the CUDA kernels for sm_80, sm_90a and later (needs nvcc)
	@command -v nvcc >/dev/null || { echo "make cuda needs nvcc (the CUDA toolkit)" >&2; exit 1; }
	@mkdir -p build
	@$(CMAKE) --preset cuda >build/cuda.log || { cat build/cuda.log; exit 1; }
	@$(CMAKE) --build build/cuda --target llmserve_cuda -j "$$(nproc)" >build/cuda.log || { cat build/cuda.log; exit 1; }
	@cp build/cuda/libllmserve_cuda.so llmserve/

.PHONY: cuda-emulator
cuda-emulator: .venv-build/.stamp # the same kernels for the CPU: csrc/cuda/emulator
	@if ! command -v nvcc >/dev/null; then echo "no CUDA kernels on the CPU: CUDA's headers are missing (the CUDA toolkit)"; exit 0; fi; \
	mkdir -p build; \
	{ $(CMAKE) --preset cuda-emulator && $(CMAKE) --build build/cuda-emulator --target llmserve_cuda_emulator -j "$$(nproc)"; } >build/cuda-emulator.log \
		|| { cat build/cuda-emulator.log; exit 1; }

# On a GPU box nothing is fetched: its own Python, and beside it the wheels of build/gpu/wheels, which gpu-wheels fills
# where there is a network. Results go into the folder that OUT names.
GPU_PYTHON ?= python3
GPU_RUN := PYTHONPATH="$(CURDIR)/build/gpu/site:$(CURDIR)" $(GPU_PYTHON)
GPU_WHEELS := msgspec gguf
GPU_PLATFORMS := $(foreach tag,manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1,--platform $(tag)_x86_64)

.PHONY: gpu-wheels
gpu-wheels: .venv/.stamp-python ## fetch what a GPU box lacks, for Python 3.12, to be carried there
	@$(BIN)/python $(PIP) download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
		$(GPU_PLATFORMS) -d build/gpu/wheels $(GPU_WHEELS)

build/gpu/.stamp: $(CPP_SOURCES) CMakeLists.txt setup.py
	@command -v nvcc >/dev/null || { echo "GPU tests need nvcc (the CUDA toolkit)" >&2; exit 1; }
	@mkdir -p build/gpu/site
	@if ls build/gpu/wheels/*.whl >/dev/null 2>&1; then \
		$(GPU_PYTHON) $(PIP) install --no-index --no-deps --no-compile --upgrade --target build/gpu/site build/gpu/wheels/*.whl; fi
	@$(GPU_PYTHON) setup.py --quiet build_ext --inplace
	@cmake -S . -B build/gpu/cuda -G Ninja -DCMAKE_BUILD_TYPE=Release -DLLMSERVE_BUILD_PYTHON=OFF -DLLMSERVE_CUDA=ON >build/gpu/log \
		&& cmake --build build/gpu/cuda --target llmserve_cuda >build/gpu/log || { cat build/gpu/log; exit 1; }
	@cp build/gpu/cuda/libllmserve_cuda.so llmserve/
	@touch $@

.PHONY: gpu-test
gpu-test: ## tests that need an NVIDIA GPU, the kernels also under compute-sanitizer
	@if ! $(HAS_GPU); then echo "skipped: no NVIDIA GPU (nvidia-smi finds none)"; \
	else $(MAKE) --no-print-directory build/gpu/.stamp && $(GPU_RUN) scripts/gpu_test.py $(GPU_TEST_ARGS); fi

.PHONY: gpu-bench
gpu-bench: ## benchmarks that need an NVIDIA GPU
	@if ! $(HAS_GPU); then echo "skipped: no NVIDIA GPU (nvidia-smi finds none)"; \
	else $(MAKE) --no-print-directory build/gpu/.stamp && $(GPU_RUN) -m benchmarks.gpu $(GPU_BENCH_ARGS); fi

.PHONY: reference-env
reference-env: ## build .venv-reference: torch and transformers, which golden values come from
	@test -x .venv-reference/bin/python || $(PYTHON) -m venv .venv-reference
	@.venv-reference/bin/python $(PIP) install -r requirements/reference.in

.PHONY: lock
lock: ## write requirements/*.txt anew (needs uv)
	@scripts/lock.sh

.PHONY: clean
clean: ## remove build outputs, keep the environments
	@rm -rf build dist llmserve/*.so llmserve.egg-info
