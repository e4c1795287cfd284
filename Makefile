# `make demo` trains both stages on drawn scenes and draws; `make test` runs the tests. Each sets up what it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/ready
	$(BIN)/ldm demo --out runs/scenes

# Tests that fork, which workers with threads must not
FORKING = tests/test_faults.py tests/test_resume.py tests/test_sharding.py

test: .venv/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical $(addprefix --ignore ,$(FORKING))
	OMP_NUM_THREADS=1 $(BIN)/pytest $(FORKING)

lint: .venv/ready-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What installing takes on its way to the 7 GB of .venv, in MB
ROOM = 9000

.venv/ready: pyproject.toml
	@[ -d .venv ] || df -Pm . | awk 'NR == 2 && $$4 < $(ROOM) { print "Only " $$4 " MB are free here, and PyTorch with the other" \
		" packages takes $(ROOM) to install: make room, or clone on a larger disk."; exit 1 }'
	@echo "Setting up .venv with PyTorch and the other packages: 7 GB, a few minutes, only this once."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/ready-test: .venv/ready
	@echo "Adding what the tests need."
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[test]"
	@touch $@

clean:
	rm -rf .venv runs build *.egg-info .pytest_cache .ruff_cache .mypy_cache
