# make repro: run the pipeline. make report: the history of its figures. make test: lint and tests.
# Each sets up .venv when it is missing or out of date.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: repro report test bench

repro: .venv/installed
	dvc repro

report: .venv/installed
	python -m tools.report

test: .venv/installed
	ruff check . && ruff format --check .
	python -m pytest -q -n 2

bench: .venv/installed-bench
	python -m benchmarks.run all

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11" >&2; exit 1; }
	@echo "Installing requirements.txt into .venv: this takes some minutes."
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	.venv/bin/python -m tools.offline_plots
	touch $@

.venv/installed-bench: .venv/installed requirements-bench.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-bench.txt
	touch $@
