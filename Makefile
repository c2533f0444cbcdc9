# Sluice. `make` alone says what there is.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help install demo test lint unit engine serving docs bench clean system-packages

VENV ?= .venv
MODEL ?= models/twin-gated
PORT ?= 8000
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

help: ## this list
	@echo "make TARGET [VENV=.venv] [MODEL=models/twin-gated] [PORT=8000]"
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

install: ## virtual environment with vLLM's CPU build, Sluice and the test tools
	@deploy/cpu/install.sh "$(VENV)"

demo: install ## serve MODEL on PORT with traffic, metrics, live page and Prometheus until Ctrl-C
	@exec $(BIN)/sluice demo "$(MODEL)" --port "$(PORT)"

test: system-packages install ## lint and all tests, the fast ones first
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory unit
	@$(MAKE) --no-print-directory engine
	@$(MAKE) --no-print-directory serving

lint: install ## ruff, mypy, and whether docs/metrics.md is up to date
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy plugin $(wildcard bench/*.py)
	@$(BIN)/sluice metrics docs --check docs/metrics.md

unit: install ## tests that need no model
	@$(PYTEST) -q tests/unit $(wildcard tests/live)

engine: install ## tests with vLLM in the same process
	@$(PYTEST) -q tests/engine

serving: install ## tests with a real server, Prometheus and browser
	@$(PYTEST) -q tests/serving

docs: install ## write docs/metrics.md from the catalogue
	@$(BIN)/sluice metrics docs --output docs/metrics.md

bench: install ## measurements in bench/, if there are any
	@set -e; for file in $(wildcard bench/bench_*.py); do echo "$$file"; $(BIN)/python "$$file"; done

system-packages: # Debian's packages, where they may be installed; elsewhere the tests that need them say the command
	@if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		deploy/cpu/debian-packages.sh; fi

clean: ## remove caches and build leftovers; keeps the virtual environment and the models
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist plugin/*.egg-info
