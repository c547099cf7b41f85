# The commands of this project; `make help` lists them. Everything is built by CMake presets into build/<preset>/.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PRESET ?= cpu-release
JOBS ?= $(shell nproc)
FUZZ_SECONDS ?= 60
# Arguments of `make run`, as ARGS="--http-port 9000".
ARGS ?=
# DEPS=skip when the packages were installed in another way.
DEPS ?= install

SOURCES = $(shell git ls-files '*.h' '*.cc' '*.cu' '*.cuh')

define build_preset
cmake --preset $(1) $(2)
cmake --build --preset $(1) -j $(JOBS)
endef

.PHONY: help deps deps-fuzz build run test asan tsan fuzz format lint clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

deps: ## install the Debian packages that are missing (with sudo when not root)
	@[ "$(DEPS)" = skip ] || scripts/install_deps.sh

deps-fuzz:
	@[ "$(DEPS)" = skip ] || scripts/install_deps.sh --fuzz

build: deps ## build everything; PRESET=cpu-release, cpu-debug, cuda-release, ...
	@$(call build_preset,$(PRESET),)

run: deps ## build and serve models/default on CPU; ARGS="--http-port 9000" for flags
	@cmake --preset cpu-release
	@cmake --build --preset cpu-release -j $(JOBS) --target atp
	@exec build/cpu-release/atp serve --model models/default $(ARGS)

test: deps ## build and run all tests
	@$(call build_preset,cpu-release,)
	@ctest --preset cpu-release -j $(JOBS)

asan: deps ## build and run all tests under AddressSanitizer and UBSan
	@$(call build_preset,cpu-asan-ubsan,)
	@ctest --preset cpu-asan-ubsan -j $(JOBS)

tsan: deps ## build and run the C++ tests under ThreadSanitizer
	@$(call build_preset,cpu-tsan,)
	@ctest --preset cpu-tsan -j $(JOBS)

fuzz: deps-fuzz ## build the fuzzers and run each for FUZZ_SECONDS=60
	@cmake --preset cpu-fuzz
	@cmake --build --preset cpu-fuzz -j $(JOBS) --target tests/fuzz/all
	@found=0; for fuzzer in $$(find build/cpu-fuzz/tests/fuzz -maxdepth 1 -type f -name 'fuzz_*' -executable | sort); do \
	  echo "== $$fuzzer, $(FUZZ_SECONDS) s"; found=1; mkdir -p "$$fuzzer.corpus"; \
	  "$$fuzzer" -max_total_time=$(FUZZ_SECONDS) -timeout=10 -rss_limit_mb=2048 -print_final_stats=0 \
	    -artifact_prefix="$$fuzzer." "$$fuzzer.corpus"; \
	done; [ $$found = 1 ] || { echo "no fuzzer was built" >&2; exit 1; }

format: deps ## clang-format all sources
	@clang-format-14 -i $(SOURCES)

lint: deps ## formatting and include directions; changes nothing
	@clang-format-14 --dry-run -Werror $(SOURCES)
	@python3 tests/layering_test.py

clean: ## remove build/
	@rm -rf build
