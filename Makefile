# The two commands of a fresh machine are `make demo` and `make test`; see README.md and TESTING.md.

.PHONY: demo test lint unit programs vm guest-image virtiofsd clients packages check test-long

demo: packages
	cargo build --locked --release
	$(MAKE) --jobs=2 --output-sync=target guest-image virtiofsd clients
	scripts/demo

# What waits for packages, for a linker or for a test's clock leaves processors to the others; cargo itself keeps them apart.
test: packages
	$(MAKE) --jobs=3 --output-sync=target guest-image lint unit virtiofsd clients programs
	$(MAKE) vm

lint:
	cargo fmt --all -- --check
	cargo clippy --locked --workspace --all-targets --features dormouse-vm-tests/long -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --document-private-items --quiet

unit:
	timeout --kill-after=60 1800 cargo test --locked --workspace --exclude dormouse-vm-tests

# Real VMs, two files of tests at a time: an emulated VM keeps one processor busy. While `cli` makes the template that all
# share, those go that need none; then the long ones, so that none of them runs alone at the end.
VM_TESTS = $(basename $(notdir $(wildcard vm-tests/tests/*.rs))) $(patsubst vm-tests/tests/%/main.rs,%,$(wildcard vm-tests/tests/*/main.rs))
VM_TESTS_FIRST = cli input service guest suspend docker lifecycle folders

vm:
	$(MAKE) --jobs=2 --output-sync=target guest-image virtiofsd clients programs
	rm -rf $(VM_LOGS)
	$(MAKE) --jobs=2 --output-sync=target --keep-going $(addprefix vm-,$(VM_TESTS_FIRST) $(filter-out $(VM_TESTS_FIRST),$(VM_TESTS))) \
		|| { scripts/failures $(VM_LOGS)/*; exit 1; }

# One that hangs is ended, so that what it printed is seen. What failed is told again at the end of all.
VM_LOGS = target/vm-tests
vm-%:
	@mkdir -p $(VM_LOGS)
	timeout --kill-after=60 1200 cargo test --locked --package dormouse-vm-tests --test $* -- --test-threads=1 > $(VM_LOGS)/$* 2>&1; \
		code=$$?; cat $(VM_LOGS)/$*; exit $$code

programs:
	cargo build --locked --workspace --exclude dormouse-vm-tests
	cargo test --locked --package dormouse-vm-tests --no-run

guest-image:
	cargo xtask guest-image
	cargo xtask busybox-image

virtiofsd:
	scripts/install-virtiofsd

clients:
	scripts/install-clients

packages:
	scripts/install-packages build run test

# What takes longer than `make test` may, see TESTING.md.
check: packages
	scripts/check

test-long: packages
	scripts/test-long
