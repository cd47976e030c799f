# Every target works on a fresh clone that has Python >= 3.10 and make; the first one to run makes the environment.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python -m dmlr
INSTALLED := $(VENV)/.installed

# Nothing here reports home.
export HF_HUB_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1
export MPLBACKEND := agg

.PHONY: help setup demo bench lmms-eval test test-all lint format notebooks compared table1 report lab clean

help:            ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

setup: $(INSTALLED)  ## make .venv with the pinned dependencies

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "dmlr needs Python 3.10 or newer; try: make PYTHON=python3.11")'
	@echo "Installing into $(VENV): one to two minutes on a fast line, about 5 GB with torch's GPU libraries ..."
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

demo: $(INSTALLED)  ## three embedded models, the benchmark, a walkthrough: tables and reports; five minutes on two cores, MODEL=... for another
	@$(if $(MODEL),,HF_HUB_OFFLINE=1) $(RUN) demo $(if $(MODEL),--model $(MODEL))

bench: $(INSTALLED)  ## the loop beside the released behaviour on this machine; a quarter of an hour on two idle cores
	@$(RUN) bench

# A module's tests share its fixtures, so they stay in one process; one thread each, for as many processes as cores.
TEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadscope

test: $(INSTALLED)  ## the tests of every room, without those that start kernels, Ray or a browser
	@$(TEST) $(ARGS)

test-all: $(INSTALLED)  ## every test
	@$(TEST) -m '' $(ARGS)

lint: $(INSTALLED)  ## ruff: rules and format, notebooks included
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

format: $(INSTALLED)  ## let ruff mend what it can
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

# Two at a time, the long ones first, on one thread each; 06 measures, so it runs alone.
STORED := 04_compare 02_ablations 07_do_latents_matter 05_perception_and_confidence 01_walkthrough 03_benchmark
STORE = HF_HUB_OFFLINE=1 $(RUN) run notebooks/$(1).ipynb --keep

notebooks: $(INSTALLED)  ## run every analysis notebook with its defaults, store its outputs in it and render it; eleven minutes on two cores
	@rm -rf reports/sweeps  # what is stored is measured anew
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --jobs=2 $(STORED:%=store-%)
	@$(call STORE,06_efficiency)

$(STORED:%=store-%): store-%:
	@$(call STORE,$*)

store-04_compare: compared
store-03_benchmark: store-04_compare  # which reads all runs there are, and is stored with a grid's

compared:
	@HF_HUB_OFFLINE=1 $(RUN) table1 shapes-seek shapes-vl --benchmarks shapes-seek,shapes-visual --seeds 0,1 \
	  -p methods vanilla,unoptimised,displaced,dmlr -p end_data_idx 48

table1: $(INSTALLED)  ## every method on the embedded benchmark, in the form of Table 1; a quarter of an hour on two cores
	@HF_HUB_OFFLINE=1 $(RUN) table1 shapes-vl --benchmarks shapes-mathematics,shapes-visual,shapes-composition \
	  -p methods vanilla,multimodal-cot,ccot,icot,self-consistency,ltpo,ulr,unoptimised,random,dmlr

lmms-eval:       ## an environment for lmms-eval with this package as its model `dmlr`: .venv-lmms
	@$(PYTHON) -m venv .venv-lmms
	@.venv-lmms/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[lmms-eval]'

report: $(INSTALLED)  ## write reports/index.html again from the runs that are there
	@$(RUN) report

lab: $(INSTALLED)  ## open JupyterLab on the walkthrough
	@$(VENV)/bin/jupyter lab notebooks/01_walkthrough.ipynb

clean:           ## remove the environment and the caches, not the runs
	rm -rf $(VENV) .pytest_cache .ruff_cache *.egg-info
