# make demo   sets everything up in .venv and runs the demonstration
# make test   sets everything up in .venv and runs linters, type checks and all tests
# make gpu-report             on a machine with an NVIDIA GPU: tests, speed and memory in one report (benchmarks/results/gpu)
# make gpu-report DRY_RUN=1   anywhere: the same scripts under Triton's interpreter, without figures (build/gpu_report)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
PYTEST_FLAGS ?= -q

.DELETE_ON_ERROR:
.PHONY: demo test test-parity lint gpu-report clean

demo: $(VENV)/.built
	$(BIN)/m3 demo

test: $(VENV)/.built lint
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu-report: $(VENV)/.built
	$(BIN)/python -m benchmarks.gpu_report $(if $(DRY_RUN),--dry-run)

# Official FlagEmbedding in an environment of its own, compared with this model on the same weights.
test-parity: $(VENV)/.built .venv-parity/.installed
	M3_PARITY_PYTHON=$(abspath .venv-parity/bin/python) $(BIN)/python -m pytest -m parity tests/parity

# The interpreter's torch is installed first, so that the package is built with the torch that it will run with.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "setuptools>=77" wheel ninja numpy
	@touch $@

SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

$(VENV)/.built: $(VENV)/.torch pyproject.toml setup.py $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[demo,test,eval,milvus,train]"
	@touch $@

.venv-parity/.installed:
	$(PYTHON) -m venv .venv-parity
	.venv-parity/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	.venv-parity/bin/python -m pip install --quiet --disable-pip-version-check FlagEmbedding==1.4.2 transformers==5.23.0
	@touch $@

clean:
	rm -rf build dist *.egg-info m3kernels/*.so .cache
