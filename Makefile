# SPDX-License-Identifier: MIT OR Apache-2.0
# What one does with this repository. Cargo does the building.

CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)
SCRIPTS := .ci/run $(wildcard tools/*.sh) tools/kernels/init tools/kernels/suite
KERNELS := $(TARGET)/kernels

# Demo and tests make network namespaces and load BPF programs: as root, or through sudo.
ifneq ($(shell id -u),0)
SUDO := $(shell command -v sudo)
# Cargo itself stays with the user; only the test programs run as root.
TEST_FLAGS = --config "target.'cfg(unix)'.runner = ['$(SUDO)', '-E', 'env', 'PATH=$(PATH)']"
endif

.PHONY: help build demo test soak kernels replay-corpus mutants lint schema docs vmlinux \
	install-deps root clean

help:
	@echo "make demo      see it work: builds, and runs a chain on real TCP in network namespaces"
	@echo "make test      run all tests"
	@echo "make soak N=5000000 [SEED=7]"
	@echo "               random packets through random chains, compared with a model of the policies"
	@echo "make replay-corpus DIR=FOLDER"
	@echo "               run a folder of captures through every action, and check what comes out"
	@echo "make kernels   run the programs on other kernels, in qemu (part of make test)"
	@echo "make mutants   break the checksum code in several ways, and see the tests fail"
	@echo "make build     build target/release/policy-chain"
	@echo "make lint      formatting, compiler and clippy warnings, scripts"
	@echo "make docs      make docs/policies.md, the tables of docs/packets.md and the JSON Schema again"
	@echo "make vmlinux   make src/bpf/vmlinux.h again, from the running kernel"
	@echo "make clean     remove what was built"

build: install-deps
	$(CARGO) build --release

demo: install-deps root
	$(CARGO) build --release --bins --example transfer
	$(SUDO) tools/demo.sh $(TARGET)/release/policy-chain $(TARGET)/release/examples/transfer

# Tests in network namespaces wait more than they compute.
test: export RUST_TEST_THREADS ?= $(shell echo $$(($$(nproc) * 3 / 2)))
test: install-deps root
	$(CARGO) test $(TEST_FLAGS)
	@$(MAKE) --no-print-directory kernels KERNELS_FLAGS=--optional

# ROWS=all: every table of packets (docs/kernels.md).
kernels: install-deps
	$(CARGO) build --release --bins --example transfer --example objects
	@mkdir -p $(KERNELS)
	cp "$$($(CARGO) test --release --test packets --no-run --message-format=json | \
		sed -n 's|.*"executable":"\([^"]*/packets-[^"]*\)".*|\1|p')" $(KERNELS)/packets
	ROWS=$(ROWS) tools/kernels.sh $(KERNELS_FLAGS) $(KERNELS) $(TARGET)/release/policy-chain \
		$(addprefix $(TARGET)/release/examples/,transfer objects) $(KERNELS)/packets

# Of pcap and pcapng files; ends 0 if every packet came out as sound as it went in.
replay-corpus: install-deps root
	@test -n "$(DIR)" || { echo "Which folder of captures? make replay-corpus DIR=FOLDER" >&2; exit 2; }
	$(CARGO) build --release --example replay-corpus
	$(SUDO) $(TARGET)/release/examples/replay-corpus "$(DIR)"

mutants: install-deps root
	tools/mutants.sh

# As in `make test`, but as many packets as wanted, and others for another SEED.
N ?= 1000000
SEED ?= 1
soak: export MODEL_PACKETS = $(N)
soak: export MODEL_SEED = $(SEED)
soak: install-deps root
	$(CARGO) test $(TEST_FLAGS) --release --test model -- --show-output

lint: install-deps
	@$(CARGO) fmt --version >/dev/null 2>&1 && $(CARGO) clippy --version >/dev/null 2>&1 || \
		{ echo "rustfmt or clippy is missing: rustup component add rustfmt clippy" >&2; exit 1; }
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets -- -D warnings
	@for script in $(SCRIPTS); do \
		case $$(head -n 1 $$script) in *bash*) shell=bash ;; *) shell=sh ;; esac; \
		echo "$$shell -n $$script"; $$shell -n $$script || exit 1; \
	done

# Tests compare what these make with the code.
docs: schema root
	WRITE_DOCS=1 $(CARGO) test --test docs policies_are_current
	WRITE_DOCS=1 $(CARGO) test $(TEST_FLAGS) --test packets tables_are_current

schema: install-deps
	$(CARGO) run -- schema >schema/chain-file.schema.json.new
	mv schema/chain-file.schema.json.new schema/chain-file.schema.json

vmlinux: install-deps
	$(CARGO) run --example vmlinux >src/bpf/vmlinux.h.new
	mv src/bpf/vmlinux.h.new src/bpf/vmlinux.h

install-deps:
	@tools/install-deps.sh

# Says what is the matter before anything is built, and mounts the bpffs that tests pin things in.
root:
ifneq ($(shell id -u),0)
	@test -n "$(SUDO)" || { echo "This needs root, and there is no sudo: run it as root." >&2; exit 1; }
	@echo "Network namespaces and BPF need root: going through $(SUDO)."
endif
	@mountpoint -q /sys/fs/bpf || $(SUDO) mount -t bpf -o mode=0700 bpf /sys/fs/bpf

# Tests that ran as root left files of root's there.
clean:
	$(SUDO) rm -rf $(TARGET)/tmp
	$(CARGO) clean
