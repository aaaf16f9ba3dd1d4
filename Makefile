PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/installed  ## phantoms, three minutes of training, a table and pictures in demo/
	$(BIN)/python -m scripts demo --output_dir demo

test: .venv/installed-test  ## the whole test suite
	$(BIN)/python -m pytest -q tests

lint: .venv/installed-test
	$(BIN)/ruff check scripts tests && $(BIN)/ruff format --check scripts tests

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

.venv/installed-test: .venv/installed requirements-test.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements-test.txt
	touch $@

clean:
	rm -rf demo runs eval .pytest_cache .ruff_cache
