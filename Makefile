# The same commands for people and CI. VENV=DIR puts the environment elsewhere.
VENV ?= .venv
export VENV
PYTHON := $(VENV)/bin/python

.PHONY: env check test sim demo bars clean

env: ## the environment: locked packages and kvshare, editable
	@scripts/env.sh

check: env ## lint, format, types, layers
	@scripts/check.sh

test: check ## check, then every test; ARGS="tests/unit -k name" narrows it
	@$(PYTHON) -m pytest $(ARGS)

sim: env ## seeded clusters in virtual time, for SECONDS of real time (0: one play) from SEED on; NODES=n in each
	@$(PYTHON) -m tests.sim --seed $(or $(SEED),1) --seconds $(or $(SECONDS),60) $(if $(NODES),--nodes $(NODES))

demo: env ## a worker arrives warm, another dies, all stops and comes back, outputs stay equal; ARGS="--model NAME" for a model of yours
	@$(PYTHON) -m kvshare.integrations.demo $(ARGS)

bars: env ## every figure measured afresh, one line each; ONLY=NAME[,NAME] or ISSUE=N narrows it
	@$(PYTHON) benchmarks/bars.py $(if $(ONLY),--only $(ONLY)) $(if $(ISSUE),--issue $(ISSUE))

clean: ## everything that was built
	rm -rf $(VENV) build dist *.egg-info kvshare/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
