PYTHON ?= python3
BIN := .venv/bin

PAIRS ?= $(wildcard ../shared/data/label_reg_sample)

.PHONY: demo train test bench faults experiments release lint audit clean

demo: .venv/installed  ## phantoms, and a pair of PAIRS, registered with the weights in models/; pictures in demo/
	$(BIN)/python -m scripts demo --output_dir demo $(if $(PAIRS),--pairs $(PAIRS))

train: .venv/installed  ## two minutes of training on phantoms, then others registered; in demo/ likewise
	$(BIN)/python -m scripts demo --train True --output_dir demo

test: .venv/installed-test  ## the whole test suite
	$(BIN)/python -m pytest -q -n auto --dist loadfile tests

bench: .venv/installed .venv-bench/installed  ## every comparison of docs/benchmarks.md, about an hour; leave the machine alone
ifeq ($(DEVICE),cuda)
	for part in loss registration training growth; do $(BIN)/python benchmarks/$$part.py --device cuda || exit 1; done
else
	for part in loss registration training prefilt classical growth; do .venv-bench/bin/python benchmarks/$$part.py || exit 1; done
	$(BIN)/python benchmarks/startup.py
endif

faults: .venv/installed-test  ## processes, disks and files that fail, repeated; the table of docs/reliability.md
	$(BIN)/python -m pytest -q -m slow tests
	$(BIN)/python benchmarks/faults.py
	$(BIN)/python benchmarks/load.py

PAIRWISE := $(foreach m,none nmi ncc ssd,$(m) $(m)+rigid $(m)+centroids)
NETWORKS := baseline delta0 delta14 l2 msce prefilt no_additive global_net composite_net localnet
comma := ,
joined = $(subst $(eval) ,$(comma),$(strip $(1)))
CROSSVAL = $(BIN)/python -m scripts crossval --cores_per_fold 1

experiments: .venv/installed-test  ## every experiment of docs/experiments.md, two to three hours each; PAIRS is label-reg's sample
	$(CROSSVAL) --dataset_dir $(PAIRS) --folds 4 --moving_axes PRS --fixed_axes PRS --base real_pairs_cpu+experiments_real \
		--variants $(call joined,$(NETWORKS) segmentation+fine_tune $(PAIRWISE)) --output_dir runs/experiments_real
	$(BIN)/python -m scripts report runs/experiments_real
	test -d runs/paper_cohort || $(BIN)/python -m scripts phantom --like_paper --seed 1 --output_dir runs/paper_cohort
	$(CROSSVAL) --dataset_dir runs/paper_cohort --folds 12 --patient_pattern '(patient[0-9]+)_' --base experiments_phantoms \
		--variants $(call joined,baseline delta0 global_net segmentation+fine_tune $(PAIRWISE)) --output_dir runs/experiments_phantoms
	$(BIN)/python -m scripts report runs/experiments_phantoms

release: .venv/installed  ## dist/prostate_mr_trus_registration_vVERSION.zip, as MONAI's model zoo wants it
	$(BIN)/python -m scripts release --output_dir dist

lint: .venv/installed-test
	$(BIN)/ruff check scripts tests benchmarks integrations && $(BIN)/ruff format --check scripts tests benchmarks integrations

audit: .venv/installed-test .venv-audit/installed  ## known vulnerabilities of every installed and pinned package; fails if one cannot be asked for
	$(BIN)/python -m pip freeze | sed 's/+.*//' > .venv-audit/installed.txt
	for file in .venv-audit/installed.txt requirements-bench.txt requirements-audit.txt; do \
		.venv-audit/bin/pip-audit --strict --disable-pip --no-deps -r $$file || failed=1; done; test -z "$$failed"

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

.venv/installed-test: .venv/installed $(addsuffix .txt,$(addprefix requirements-,test crossval dicom surfaces view tutorial))
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements-test.txt
	touch $@

.venv-bench/installed: requirements-bench.txt
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --disable-pip-version-check -q -r requirements-bench.txt
	touch $@

.venv-audit/installed: requirements-audit.txt
	test -x .venv-audit/bin/python || $(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --disable-pip-version-check -q -r requirements-audit.txt
	touch $@

clean:
	rm -rf demo dist runs eval .pytest_cache .ruff_cache
