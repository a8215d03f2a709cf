# make demo    train on the built-in pictures, then time the loss (the first time, with installing, five minutes or so)
# make test    the whole test suite
# make bench   every benchmark (ten to fifteen minutes on two cores); writes bench/results/, its report, and the README's tables
# make fuzz    ten thousand damaged image files through the reader (minutes)
# make lint    ruff, mypy, clang-format
# make sanitize   the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer
# make gpu-check OUT=folder   on a machine with a GPU: build, test every backend, benchmark, with $(PYTHON) as it is
#
# Each other target creates .venv when it is missing and installs what changed since the last time.

SHELL := bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV ?= .venv
OUT ?= gpu-check
BIN := $(VENV)/bin
SOURCES := setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# Two threads that spin while they wait for each other cost more than they bring: PyTorch too is faster this way.
export OMP_WAIT_POLICY ?= passive
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test bench lint format fuzz sanitize gpu-check clean

$(VENV)/.dependencies: pyproject.toml constraints.txt
	@echo "== creating $(VENV) and installing dependencies (a few minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy
	MLFAST_NATIVE=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,triton]"
	@touch $@

$(VENV)/.built: $(VENV)/.dependencies $(SOURCES)
	@echo "== compiling csrc/ (CUDA too where nvcc is found; MLFAST_CUDA=0 leaves it out)"
	MLFAST_NATIVE=1 $(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/mlfast backends
	@touch $@

demo: $(VENV)/.built
	$(BIN)/mlfast train
	@echo "== the loss alone: reference, torch.compile, mlfast (smaller is better)"
	$(BIN)/python -m pytest bench/bench_aam_loss.py --quick -q --benchmark-quiet -p no:warnings

test: $(VENV)/.built
	$(BIN)/python -m pytest

# Ten thousand damaged image files: each gives an image or a clean error.
fuzz: $(VENV)/.built
	MLFAST_FUZZ=10000 $(BIN)/python -m pytest tests/deploy/test_images.py -k fuzz

bench: $(VENV)/.built
	$(BIN)/python -m pytest bench --save-results --benchmark-quiet -p no:warnings
	$(BIN)/python -m bench.gpu_static
	$(BIN)/python -m bench.report
	$(BIN)/python -m bench.readme

lint: $(VENV)/.dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.dependencies
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# The instrumented module replaces the usual one for the run; afterwards it goes, and the next target builds anew. Left out
# are tests of other backends and of compilers, and those that take memory or hold rounding to bounds: about a minute is left.
NOT_SANITIZED := triton or cuda or reference or opcheck or compile or exporter or two_to_the_31 or any_numbers or no_memory
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
sanitize: $(VENV)/.dependencies
	CXXFLAGS="$(SANITIZE) -O1 -g" LDFLAGS="$(SANITIZE)" MLFAST_CUDA=0 MLFAST_NATIVE=1 $(BIN)/python setup.py --quiet \
	  build_ext --inplace --force --build-temp build/sanitize --build-lib build/sanitize
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  $(BIN)/python -m pytest tests/ops tests/test_graph.py -k "not ($(NOT_SANITIZED))"; \
	  status=$$?; rm -f mlfast/_native*.so $(VENV)/.built; exit $$status

# Installs nothing: needs torch with CUDA, triton, pybind11, ninja, setuptools, matplotlib, pytest, pytest-benchmark, hypothesis.
gpu-check:
	mkdir -p "$(OUT)"
	MLFAST_NATIVE=1 MLFAST_CUDA=1 $(PYTHON) setup.py --quiet build_ext --inplace
	$(PYTHON) -m mlfast backends | tee "$(OUT)/backends.txt"
	$(PYTHON) -m pytest tests/ops tests/kernels/test_losses_triton.py tests/test_backends.py \
	  --junit-xml "$(OUT)/tests.xml" | tee "$(OUT)/tests.txt"
	$(PYTHON) -m pytest bench --device cuda --json "$(OUT)/bench.json" --benchmark-quiet -p no:warnings \
	  | tee "$(OUT)/bench.txt"
	$(PYTHON) -m bench.report "$(OUT)/bench.json"

clean:
	rm -rf build *.egg-info mlfast/_native*.so
