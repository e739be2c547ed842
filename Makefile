# Each target sets up .venv when it is missing or out of date.
PYTHON ?= python3
N ?= 3
EPOCHS ?= 1 2 4 8
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: help setup repro report seeds curve test bench lock

help:
	@echo "make setup   install what the pipeline needs into .venv"
	@echo "make repro   run the pipeline: dvc repro"
	@echo "make report  the history of its figures, as a page: report.html"
	@echo "make seeds   the settings under N=3 seeds: how much the seed alone changes the figures"
	@echo "make curve   what EPOCHS=\"1 2 4 8\" bring, and what more would: curve.svg"
	@echo "make test    lint, check the types, run the tests"
	@echo "make bench   measure the speed beside four peers"
	@echo "make lock    write requirements.lock anew, after a change of requirements*.txt"

setup: .venv/installed

repro: .venv/installed
	dvc repro

report: .venv/installed
	python -m tools.report

seeds: .venv/installed
	dvc exp run --queue -S "seed_everything=$$(seq -s, 1 $(N))"
	dvc exp run --run-all
	python -m tools.compare --noise

curve: .venv/installed
	for n in $(EPOCHS); do \
		dvc exp run --name epochs-$$n -S trainer.max_epochs=$$n || exit 1; \
	done
	python -m tools.curve $(EPOCHS:%=epochs-%)

test: .venv/installed-dev
	ruff check . && ruff format --check .
	basedpyright
	python -m pytest -q -n 3 --dist worksteal

bench: .venv/installed-dev
	python -m benchmarks.run $(if $(QUICK),quick,all)

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt requirements.lock | .venv/bin/python
	@echo "Installing requirements.txt into .venv: this takes some minutes."
	$(PIP) -r requirements.txt -c requirements.lock
	.venv/bin/python -m tools.offline_plots
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(PIP) -r requirements-dev.txt -c requirements.lock
	touch $@

lock: | .venv/bin/python
	$(PIP) --dry-run --ignore-installed --report .venv/lock.json -r requirements.txt -r requirements-dev.txt
	.venv/bin/python tests/lock.py .venv/lock.json > requirements.lock
