# Two commands: `make demo` and `make test`. Both set up everything they need in .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test clients check wheel clean

demo: $(READY)
	$(BIN)/fullpipe demo

test: $(READY)
	$(BIN)/fullpipe pull smollm2-135m qwen2.5-coder-0.5b
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -rs -m "not hosts"
	$(BIN)/pytest -rs -m hosts

clients: $(READY)
	$(BIN)/fullpipe pull smollm2-135m qwen2.5-coder-0.5b
	$(BIN)/python tests/server/clients/run.py

check: $(READY)
	$(BIN)/ruff check src tests lab
	$(BIN)/mypy

wheel: $(READY)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

$(READY): pyproject.toml setup.py lab/pyproject.toml constraints.txt $(wildcard src/fullpipe/kernels/*.[ch])
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=23"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]" --editable lab
	touch $(READY)

clean:
	rm -rf $(VENV) build dist src/*.egg-info lab/src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
