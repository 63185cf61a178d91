# `make demo` shows what this is; `make test` checks all of it. Both begin on a bare machine and say what is missing.

SHELL := /bin/sh
UNIARM := $(or $(CARGO_TARGET_DIR),target)/release/uniarm
# A failed download stops the recipe: in front of a command alone, it would be an empty variable.
WITH_MODEL := model=$$(scripts/fetch-demo-model.sh) && UNIARM_DEMO_MODEL="$$model"

.DEFAULT_GOAL := help
.PHONY: help prerequisites build demo up test simulate-long fuzz test-faults bench peers performance experiment-exact experiment-human clean

help: ## List what can be made
	@echo 'UniARM: a base model steered, token by token, toward the preference of each request.'
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST) | expand -t 26

prerequisites: ## Check for a C compiler, Rust and Python, and install what may be installed
	@scripts/prerequisites.sh

build: prerequisites ## Build the binary target/release/uniarm
	cargo build --release --locked --package uniarm

demo: build ## Fetch the demo model, start a cluster of three processes, answer one prompt under several preferences
	$(WITH_MODEL) $(UNIARM) demo

up: build ## Run the whole cluster in one process on port 7000, until it is interrupted
	$(WITH_MODEL) $(UNIARM) up

test: prerequisites ## Format, lints, tests, clients, chart and deployment files: everything that CI runs
	@scripts/test.sh

simulate-long: prerequisites ## Run 100,000 schedules of faults on a simulated cluster: ten minutes of one core
	UNIARM_SCHEDULES=$${UNIARM_SCHEDULES:-100000} cargo test --release --locked --workspace --test schedules -- --nocapture every_schedule

fuzz: prerequisites ## Alter the inputs of every parser for UNIARM_FUZZ_SECONDS each (60): none may end in a panic
	UNIARM_FUZZ_SECONDS=$${UNIARM_FUZZ_SECONDS:-60} cargo test --release --locked --workspace --no-fail-fast -- --nocapture --test-threads 1 of_strangers

test-faults: build ## Faults under load, for half an hour: kills, hangs, partitions, etcd away, overload, clients that vanish
	$(WITH_MODEL) cargo test --release --locked --package uniarm --test faults -- --ignored --nocapture --test-threads 1

bench: build ## Print tokens per second beside the machine's own limits
	$(WITH_MODEL) $(UNIARM) bench step

peers: build ## Compare with llama.cpp and the papers' loop on this machine: sets both up, gigabytes once
	benches/peers/run.sh

performance: build ## Measure everything and write docs/performance.md: twenty minutes, in which nothing else should run
	benches/performance.sh

experiment-exact: build ## Rebuild data, adapters and report of experiments/exact from nothing: hours; goes on where it stopped
	experiments/run.sh exact

experiment-human: build ## The same for experiments/human; UNIARM_HH names a folder with pairs of HH-RLHF
	experiments/run.sh human

clean: ## Remove what was built; models and tools stay in the cache folder
	cargo clean
