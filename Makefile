# Farcopy: what a developer does often, one word each. `make help` explains.

SWIFT ?= swift
PREFIX ?= /usr/local
RELEASE := $(SWIFT) build -c release --quiet
# The engine with rules that can be left out: what shows that the simulator sees that.
FAULTY := FARCOPY_FAULTS=1 $(RELEASE) --scratch-path .build-faults
PYTHON := /usr/bin/python3
.DEFAULT_GOAL := help

.PHONY: help bootstrap build test test-long test-unit test-simulation test-simulation-long test-blackbox test-asan test-kernel test-fuzz fuzz mutants demo demo-hosts demo-postgres bench simulate format lint install clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

bootstrap: ## Install the Debian packages that building and testing need
	@scripts/bootstrap build test

build: ## Build .build/release/farcopy
	@scripts/bootstrap build
	$(RELEASE) --product farcopy

test: lint test-unit test-simulation test-fuzz test-blackbox test-asan test-kernel ## Run everything: lint, unit tests, simulation, real clients

test-long: test-simulation-long ## What takes longer: every suite on block devices, long repetitions of power loss, random sequences, contradictions
	@scripts/bootstrap build test
	$(RELEASE) --product farcopy
	cd Tests/blackbox && PYTHONDONTWRITEBYTECODE=1 $(PYTHON) run.py devices
	cd Tests/blackbox && PYTHONDONTWRITEBYTECODE=1 REPEAT=10 $(PYTHON) run.py test_power test_full test_order
	cd Tests/blackbox && PYTHONDONTWRITEBYTECODE=1 SEQUENCES=100 $(PYTHON) run.py test_sequences
	for rules in hold-image send-first; do (cd Tests/blackbox && PYTHONDONTWRITEBYTECODE=1 \
		GROUP_LINES="mode = \"global-mirror\"\ncollision = \"$$rules\"" $(PYTHON) run.py test_closed_cut test_replication test_roles \
		test_link test_points test_operations test_opposites test_half_done test_order test_power test_full) || exit 1; done
	cd Tests/blackbox && PYTHONDONTWRITEBYTECODE=1 GROUP_LINES='mode = "change-volume"' $(PYTHON) run.py test_closed_cut \
		test_roles test_link test_points test_operations test_opposites test_half_done test_order test_power test_full
	cd Tests/blackbox && PYTHONDONTWRITEBYTECODE=1 REPEAT=9 $(PYTHON) run.py test_change_volume
	cd Tests/blackbox && PYTHONDONTWRITEBYTECODE=1 SEVERAL_MODE=change-volume $(PYTHON) run.py test_several_hosts
	cd Tests/blackbox && PYTHONDONTWRITEBYTECODE=1 REPEAT=25 $(PYTHON) run.py test_several_hosts
	cd Tests/blackbox && PYTHONDONTWRITEBYTECODE=1 REPEAT=5 $(PYTHON) run.py test_several_faults
	cd Tests/blackbox && PYTHONDONTWRITEBYTECODE=1 LASTS=60 REPEAT=5 $(PYTHON) run.py test_contradiction
	cd Tests/blackbox && PYTHONDONTWRITEBYTECODE=1 SWEEP=all $(PYTHON) run.py split test_nth_call

test-unit: ## Unit tests of every target
	@scripts/bootstrap build
	$(RELEASE) --build-tests
	$(SWIFT) test -c release --skip-build

test-simulation: ## Ten thousand seeds of each scenario, and every deliberate fault must be caught
	@scripts/bootstrap build
	$(RELEASE) --product simulate
	.build/release/simulate SCENARIO=World COUNT=10000 STEPS=6500 & world=$$!; \
	.build/release/simulate SCENARIO=CopyWorld COUNT=10000 STEPS=4000 && \
	.build/release/simulate SCENARIO=Coordination COUNT=10000 STEPS=5000 && \
	.build/release/simulate SCENARIO=SeveralHosts COUNT=10000 STEPS=5000; others=$$?; wait $$world && exit $$others
	$(FAULTY) --product simulate
	.build-faults/release/simulate CATCH=all

test-simulation-long: ## Fifty thousand seeds of each scenario at 8,000 steps (half an hour); FIRST=n takes others
	@scripts/bootstrap build
	$(RELEASE) --product simulate
	.build/release/simulate SCENARIO=World FIRST=$(or $(FIRST),1000000) COUNT=50000 STEPS=8000 & world=$$!; \
	.build/release/simulate SCENARIO=CopyWorld FIRST=$(or $(FIRST),1000000) COUNT=50000 STEPS=8000 && \
	.build/release/simulate SCENARIO=Coordination FIRST=$(or $(FIRST),1000000) COUNT=50000 STEPS=8000 && \
	.build/release/simulate SCENARIO=SeveralHosts FIRST=$(or $(FIRST),1000000) COUNT=50000 STEPS=8000; others=$$?; wait $$world && exit $$others

test-blackbox: ## The built program through other people's clients
	@scripts/bootstrap build test
	$(RELEASE) --product farcopy
	cd Tests/blackbox && PYTHONDONTWRITEBYTECODE=1 $(PYTHON) run.py

mutants: ## Change one line of a rule at a time; some test must notice: make mutants [MUTANT=name] [FOLDER=Volumes] [RULES=1] [CHECK=1]
	@scripts/bootstrap build test
	@SWIFT="$(SWIFT)" MUTANT="$(MUTANT)" FOLDER="$(FOLDER)" RULES="$(RULES)" CHECK="$(CHECK)" PYTHONDONTWRITEBYTECODE=1 $(PYTHON) Tests/mutants/mutants.py

test-fuzz: ## Both fuzz targets over their corpus and 20,000 inputs more, with the address sanitizer
	@scripts/bootstrap build
	scripts/fuzz

fuzz: ## Fuzz for longer: make fuzz [FUZZ_SECONDS=3600] each target
	@scripts/bootstrap build
	scripts/fuzz $(or $(FUZZ_SECONDS),3600)

test-asan: ## The suites about clients again, with the address sanitizer in the server
	@scripts/bootstrap build test
	FARCOPY_SANITIZE=address $(RELEASE) --product farcopy
	mv .build/release/farcopy .build/farcopy-asan
	cd Tests/blackbox && PYTHONDONTWRITEBYTECODE=1 ASAN_OPTIONS=detect_leaks=0 FARCOPY=$(CURDIR)/.build/farcopy-asan $(PYTHON) run.py \
		test_protocol test_structured test_hostile test_tls test_access test_direct test_flashcopy test_points

test-kernel: ## File systems on the kernel's /dev/nbdX, in a small machine under qemu
	@scripts/bootstrap build test kernel
	$(RELEASE) --product farcopy
	cd Tests/blackbox && PYTHONDONTWRITEBYTECODE=1 $(PYTHON) run.py kernel

demo: ## Two sites, a file system, a live writer, SIGKILL, failover; no root
	@scripts/bootstrap build test
	$(RELEASE) --product farcopy
	scripts/demo

demo-hosts: ## Three hosts, two remotes, a writer across all, the master killed, failover; no root
	@scripts/bootstrap build test
	$(RELEASE) --product farcopy
	scripts/demo-hosts

demo-postgres: ## The same with PostgreSQL under pgbench; needs root
	@scripts/bootstrap build test postgres
	$(RELEASE) --product farcopy
	scripts/demo-postgres

bench: ## Compare with nbdkit side by side; prints a table (BENCH_SECONDS, BENCH_ROUNDS)
	@scripts/bootstrap build test
	$(RELEASE) --product farcopy
	scripts/bench

simulate: ## Run seeds: make simulate [SEED=n | FIRST=n COUNT=n | HOURS=h] [STEPS=n] [SCENARIO=name] [FAULT=name | CATCH=all]
	@scripts/bootstrap build
	$(if $(FAULT)$(CATCH),$(FAULTY),$(RELEASE)) --product simulate
	$(if $(FAULT)$(CATCH),.build-faults,.build)/release/simulate $(foreach name,SEED FIRST COUNT HOURS STEPS SCENARIO FAULT CATCH WATCH,$(if $($(name)),$(name)=$($(name))))

format: ## Format the Swift sources
	@scripts/bootstrap swift
	$(SWIFT) format format --in-place --parallel --recursive Package.swift Sources Tests

lint: ## Check the format, the rules of the house, and that every mutant finds its line
	@scripts/bootstrap swift
	$(SWIFT) format lint --strict --parallel --recursive Package.swift Sources Tests
	@scripts/tidy
	@CHECK=1 PYTHONDONTWRITEBYTECODE=1 $(PYTHON) Tests/mutants/mutants.py

install: build ## Install farcopy to $(PREFIX)/bin
	install -D -m 0755 .build/release/farcopy $(DESTDIR)$(PREFIX)/bin/farcopy

clean: ## Remove what was built
	rm -rf .build
