# Everything runs in a virtual environment of the project's own; `make demo` and `make test` need only Python and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ROOMS := base zoo metrics metrics/collapse align align/nets align/residual align/scales align/subclasses align/units align/widths merge merge/averages merge/layerwise merge/paths merge/repairs merge/spawning merge/task_vectors merge/zipping isthmus isthmus/commands
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test lint format bench survey studies notebooks clean

demo: $(VENV)/.linked
	$(BIN)/isthmus demo

# One thread for each process: more would wait for one another.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 8 --cov --cov-report=term

lint: $(VENV)/.linked
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.linked
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.linked
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[bench]" --config-settings editable_mode=strict
	$(BIN)/python benchmarks/foundation.py
	$(BIN)/python benchmarks/similarity.py
	$(BIN)/python benchmarks/units.py
	$(BIN)/python benchmarks/matching.py --networks build/networks
	$(BIN)/python benchmarks/connectivity.py --networks build/networks
	$(BIN)/python benchmarks/feature_connectivity.py --networks build/networks
	$(BIN)/python benchmarks/repairing.py --networks build/networks
	$(BIN)/python benchmarks/averaging.py --networks build/networks
	$(BIN)/python benchmarks/zipping.py --networks build/networks

# Both come without what they depend on: torchvision would bring another build of torch.
survey: $(VENV)/.linked
	$(PIP) install --upgrade --no-deps --target build/survey timm==1.0.31 torchvision
	PYTHONPATH=build/survey $(BIN)/python benchmarks/symmetry_coverage.py
	PYTHONPATH=build/survey $(BIN)/python benchmarks/symmetry_coverage.py --timing

studies: $(VENV)/.linked
	$(BIN)/pytest -m slow

notebooks: $(VENV)/.linked
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[notebooks]" --config-settings editable_mode=strict
	$(BIN)/jupyter execute --inplace notebooks/*.ipynb

# What the project needs, at the tested versions.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt pip setuptools
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[dev]" --config-settings editable_mode=strict
	touch $@

# A strict editable install links each file, which type checkers can follow; files that are added need new links.
$(VENV)/.linked: $(VENV)/.installed $(ROOMS)
	$(PIP) install --no-deps --no-build-isolation -e . --config-settings editable_mode=strict
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage* isthmus-demo
