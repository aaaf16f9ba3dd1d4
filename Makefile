PYTHON ?= python3
BIN := .venv/bin

PAIRS ?= $(wildcard ../shared/data/label_reg_sample)

.PHONY: demo train test bench lint clean

demo: .venv/installed  ## phantoms, and a pair of PAIRS, registered with the weights in models/; pictures in demo/
	$(BIN)/python -m scripts demo --output_dir demo $(if $(PAIRS),--pairs $(PAIRS))

train: .venv/installed  ## three minutes of training on phantoms, then others registered; in demo/ likewise
	$(BIN)/python -m scripts demo --train True --output_dir demo

test: .venv/installed-test  ## the whole test suite
	$(BIN)/python -m pytest -q -n auto --dist loadfile tests

bench: .venv/installed .venv-bench/installed  ## every comparison of docs/benchmarks.md, about an hour; leave the machine alone
	for part in loss registration training prefilt classical growth; do .venv-bench/bin/python benchmarks/$$part.py || exit 1; done
	$(BIN)/python benchmarks/startup.py

lint: .venv/installed-test
	$(BIN)/ruff check scripts tests benchmarks && $(BIN)/ruff format --check scripts tests benchmarks

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

.venv/installed-test: .venv/installed requirements-test.txt requirements-crossval.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements-test.txt
	touch $@

.venv-bench/installed: requirements-bench.txt
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --disable-pip-version-check -q -r requirements-bench.txt
	touch $@

clean:
	rm -rf demo runs eval .pytest_cache .ruff_cache
