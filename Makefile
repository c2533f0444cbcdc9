# Sluice. `make` alone says what there is.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help install demo stack test lint unit monitoring engine serving docs pictures bench clean system-packages

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

stack: install ## serve MODEL on PORT with Prometheus and its rules, Alertmanager and Grafana, where they are installed
	@exec $(BIN)/sluice stack "$(MODEL)" --port "$(PORT)"

test: system-packages install ## lint and all tests, the fast ones first
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory unit
	@$(MAKE) --no-print-directory monitoring
	@$(MAKE) --no-print-directory engine
	@$(MAKE) --no-print-directory serving

lint: install ## ruff, mypy, and whether what is generated is up to date
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy plugin grafana/generate.py grafana/src $(wildcard bench/*.py)
	@$(BIN)/sluice metrics docs --check docs/metrics.md
	@$(BIN)/python grafana/generate.py --check
	@$(BIN)/python deploy/generate.py --check

unit: install ## tests that need no model
	@$(PYTEST) -q tests/unit $(wildcard tests/live)

monitoring: install ## tests of rules, alerts, dashboards and deployment files, with the programs that read them
	@deploy/tools.sh
	@$(PYTEST) -q tests/alerts tests/deploy tests/grafana

engine: install ## tests with vLLM in the same process
	@$(PYTEST) -q tests/engine

serving: install ## tests with a real server, Prometheus and browser
	@$(PYTEST) -q tests/serving

docs: install ## write what is generated: docs/metrics.md, the dashboards, the Kubernetes forms of the rules
	@$(BIN)/sluice metrics docs --output docs/metrics.md
	@$(BIN)/python grafana/generate.py
	@$(BIN)/python deploy/generate.py

pictures: install ## draw docs/dashboards/*.png with Grafana's components (needs nodejs, npm and chromium)
	@$(BIN)/python -m tests.grafana.pictures.take
	@$(BIN)/python -m tests.grafana.pictures.take sluice-overview sluice-patches sluice-quantization --recorded

bench: install ## measurements in bench/, if there are any
	@set -e; for file in $(wildcard bench/bench_*.py); do echo "$$file"; $(BIN)/python "$$file"; done

system-packages: # Debian's packages, where they may be installed; elsewhere the tests that need them say the command
	@if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		deploy/cpu/debian-packages.sh; fi

clean: ## remove caches and build leftovers; keeps the virtual environment and the models
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist plugin/*.egg-info
