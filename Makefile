# `make demo` and `make test` work from a fresh clone: each installs first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Through the environment the pins also hold where pip builds a package; newer pips read the second name there.
PIP := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python -m pip --disable-pip-version-check

# natten has to be built with the torch that is installed, or the build fetches another. It is asked for its
# FlexAttention route alone: where it sees a GPU its build compiles CUDA kernels.
NATTEN := env -u PIP_BUILD_CONSTRAINT CUDA_VISIBLE_DEVICES= PIP_CONSTRAINT=constraints.txt \
	$(BIN)/python -m pip --disable-pip-version-check install --no-build-isolation natten

.DEFAULT_GOAL := help
.PHONY: help install demo test bench clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED)  ## make .venv and install regard with everything that tests need

# The stamp is written last: an install that was interrupted is taken up again, a finished one is not looked at twice.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "constraints.txt needs Python 3.11 or newer; say which with 'make PYTHON=python3.11'"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --editable '.[dev]'
	$(NATTEN)
	touch $@

demo: $(INSTALLED)  ## compare the training-free mechanisms on the embedded model; report in runs/demo
	$(BIN)/regard compare --training-free --length 2048 --out runs/demo

# Two processes of one thread each: on two cores, more threads than that slow one another down.
test: $(INSTALLED)  ## ruff, mypy and pytest
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2

bench: $(INSTALLED)  ## measure the kernels side by side with what else could be used
	$(BIN)/python -m benchmarks

clean:  ## remove caches and build outputs; .venv and runs stay
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
