# `make help` lists the targets. Each one installs the environment if needed; it takes python3 (3.11+), git and make.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

CONFIG ?=
DATA ?=
MODEL ?=
ARGS ?=
ENCODER ?=
AGAINST ?=
TASKS ?=
RUNS ?=
OUT ?=
CONFIG_AUT := $(or $(CONFIG),conf/aut_tiny.yaml)
CONFIG_UNIWHISPER := $(or $(CONFIG),conf/uniwhisper_tiny.yaml)
OVERRIDES := $(if $(MODEL),model.path=$(MODEL)) $(if $(DATA),data.root=$(DATA)) $(ARGS)

export TOKENIZERS_PARALLELISM := false
# Where it is set, as in many containers, every start would compile the sources again and take twice as long.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup lock train-aut train-uniwhisper probe experiment report test test-all smoke notebooks bench docs lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## install the pinned environment into .venv (about a minute; runs by itself where needed)

# uv is installed with pip into its own environment, so that .venv has exactly the packages of the lock. uv does not compile bytecode, so
# the last line imports all modules.
IMPORT_ALL := import importlib, pkgutil, whisper_aut as w; \
	[importlib.import_module(found.name) for found in pkgutil.walk_packages(w.__path__, 'whisper_aut.')]
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, this is {v.major}.{v.minor}")'
	@test -x .uv/bin/uv || { $(PYTHON) -m venv .uv && .uv/bin/pip install -q --disable-pip-version-check uv; }
	@.uv/bin/uv venv -q --allow-existing --python $(PYTHON) $(VENV)
	@.uv/bin/uv pip install -q --python $(BIN)/python --require-hashes -r requirements.lock
	@.uv/bin/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	@$(BIN)/python -c "$(IMPORT_ALL)"
	@touch $@

lock: ## resolve the dependencies and rewrite requirements.lock
	@test -x .uv/bin/uv || { $(PYTHON) -m venv .uv && .uv/bin/pip install -q --disable-pip-version-check uv; }
	.uv/bin/uv pip compile -q pyproject.toml --extra all --group dev \
		--python-version 3.11 --generate-hashes --no-emit-index-url --no-header -o requirements.lock

train-aut: $(STAMP) ## the whole AuT pipeline: data, training, export, probes, report (CONFIG=, MODEL=, DATA=, ARGS="key=value")
	@$(BIN)/whisper-aut train $(CONFIG_AUT) $(OVERRIDES)

train-uniwhisper: $(STAMP) ## the whole UniWhisper pipeline, through a frozen language model (CONFIG=, MODEL=, DATA=, ARGS="key=value")
	@$(BIN)/whisper-aut train $(CONFIG_UNIWHISPER) $(OVERRIDES)

probe: $(STAMP) ## score an encoder (ENCODER=, TASKS="a b", optional AGAINST=, DATA=, OUT=, ARGS="--kind knn")
	@test -n "$(ENCODER)" -a -n "$(TASKS)" || { echo 'make probe ENCODER=DIR_OR_HUB_ID TASKS="esc50 fsdd" [AGAINST="BASE logmel"] [DATA=FOLDER]'; exit 1; }
	@$(BIN)/whisper-aut probe $(ENCODER) $(foreach base,$(AGAINST),--against $(base)) --tasks $(TASKS) \
		$(if $(DATA),--root $(DATA)) $(if $(OUT),--out $(OUT)) $(ARGS)

experiment: $(STAMP) ## a grid of configs and seeds; resumes if it was stopped (CONFIG=, DATA=, OUT=, ARGS="--plan")
	@test -n "$(CONFIG)" || { echo 'make experiment CONFIG=conf/experiments/e4_mixture.yaml [DATA=FOLDER] [OUT=FOLDER] [ARGS=--plan]'; exit 1; }
	@$(BIN)/whisper-aut experiment $(CONFIG) $(if $(DATA),root=$(DATA)) $(if $(OUT),--out $(OUT)) $(ARGS)

report: $(STAMP) ## tables and plots of runs (RUNS="runs/NAME/TIMESTAMP …", optional OUT=)
	@test -n "$(RUNS)" || { echo 'make report RUNS="runs/NAME/latest …" [OUT=FOLDER]'; exit 1; }
	@$(BIN)/whisper-aut report $(RUNS) --out $(or $(OUT),runs/report)

# A file's tests stay in one process, so that its fixtures are made once.
TWO := -n 2 --dist loadfile --no-loadscope-reorder
test: $(STAMP) ## the test suite (ARGS="-k name")
	@$(BIN)/python -m pytest $(TWO) $(ARGS)

test-all: $(STAMP) ## the slow tests too: several processes, kills, long runs (half an hour on two cores)
	@$(BIN)/python -m pytest $(TWO) -m "not gpu and not network" $(ARGS)

smoke: $(STAMP) ## shards to report through the real command line, for both decoders
	@$(BIN)/python -m pytest tests/integration/test_smoke.py $(ARGS)

notebooks: $(STAMP) ## run all notebooks top to bottom; copies with their outputs go to runs/notebooks/executed
	@mkdir -p runs/notebooks/executed
	@for notebook in notebooks/*.ipynb; do \
		$(BIN)/jupyter-execute --timeout=$(if $(MODEL),-1,600) "$$notebook" --output="$(CURDIR)/runs/notebooks/executed/$$(basename "$$notebook")" || exit 1; done

bench: $(STAMP) ## run every benchmark and rewrite benchmarks/RESULTS.md (DATA=FOLDER with esc10/; half an hour on two cores)
	@DATA=$(DATA) $(BIN)/python benchmarks/all.py $(ARGS)

docs: $(STAMP) ## build the pages of docs/ and the API reference into runs/site; a warning fails it
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict && echo 'The pages are in runs/site. With search: $(BIN)/python -m http.server --directory runs/site'

# Not `.`: ruff would also format the model card of an export that a user wrote into the checkout.
SOURCES := whisper_aut tests benchmarks notebooks docs *.md
lint: $(STAMP) ## ruff and pyright
	@$(BIN)/ruff check $(SOURCES) && $(BIN)/ruff format --check $(SOURCES) && $(BIN)/pyright

clean: ## remove the environment and caches; runs/ and data/ stay
	rm -rf $(VENV) .uv .pytest_cache .ruff_cache *.egg-info
