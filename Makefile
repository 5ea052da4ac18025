# Needs Python 3.11 or later with venv, and make. Everything else is installed into .venv, nothing outside it but
# caches (~/.cache/uv, ~/.cache/stream-adapt).
PYTHON ?= python3
BIN := .venv/bin
# Given to what is run, say: make test ARGS='-k topics'
ARGS ?=
# The broker tier runs in so many processes, a file in one of them, each with a Kafka of its own: it mostly waits.
WORKERS ?= 3
# A process computes in one thread: together they have more than there are cores.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder
# Of make chaos.
MINUTES ?= 8
SEED ?= 0

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-quick test-broker test-slow chaos observe observe-check lint format docs dashboard constraints clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: .venv/.installed ## install into .venv what constraints.txt pins; does nothing when nothing changed

.venv/.installed: pyproject.toml constraints.txt
	@echo "Setting up .venv (PyTorch is large: a minute or more the first time)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup ## see it work: a real Kafka, real ratings, a report; with ARGS=--drift also a drift, and what mends it
	$(BIN)/stream-adapt demo $(ARGS)

test: test-quick test-broker ## all tests but the slow ones

# Apart from each other: brokers that get no processor for seconds are not what is tested. 5: ARGS chose none of these.
test-quick: setup ## the tests that need no broker
	$(PYTEST) -m 'not broker and not slow' -n 2 $(ARGS) || [ $$? -eq 5 ]

test-broker: setup ## those of the broker tier, on real Kafkas
	$(PYTEST) -m 'broker and not slow' -n $(WORKERS) $(ARGS) || [ $$? -eq 5 ]

test-slow: setup ## the tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

chaos: setup ## kill, stop and cut off members and broker at random for MINUTES=8 with SEED=0, and count
	$(BIN)/stream-adapt chaos --minutes $(MINUTES) --seed $(SEED) $(ARGS)

observe: setup ## Kafka, a member, a load, and a Prometheus with the rules, on loopback until Ctrl-C; needs prometheus
	$(BIN)/python deploy/observe $(ARGS)

observe-check: setup ## the same, driven: brings about what each alert is for, asks every expression; one JSON object
	$(BIN)/python deploy/observe --check $(ARGS)

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy deploy/observe

format: setup ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup ## write the generated parts of README.md and tests/README.md anew from the code
	$(BIN)/python tests/docs/generate.py
	PYTHONPATH=tests $(BIN)/python tests/docs/tables.py

dashboard: setup ## write Grafana's dashboard anew from deploy/grafana/build.py
	$(BIN)/python deploy/grafana/build.py

# Keeps what constraints.txt pins already, as far as pyproject.toml allows; newer versions: ARGS=--upgrade
constraints: setup ## write constraints.txt anew from pyproject.toml
	$(BIN)/uv pip compile pyproject.toml --quiet --all-extras --universal --python-version 3.11 --no-annotate \
	  --custom-compile-command 'make constraints' --output-file constraints.txt $(ARGS)
	@! grep -n '://' constraints.txt

clean: ## back to a fresh checkout: removes .venv and caches
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
