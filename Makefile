# The two commands of a fresh machine are `make demo` and `make test`; see README.md and TESTING.md.

.PHONY: demo test lint unit vm guest-image packages check test-long

demo: packages
	cargo build --locked --release
	$(MAKE) guest-image
	scripts/install-clients
	scripts/demo

test: packages lint unit vm

lint:
	cargo fmt --all -- --check
	cargo clippy --locked --workspace --all-targets --features dormouse-vm-tests/long -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --document-private-items --quiet

unit:
	cargo test --locked --workspace --exclude dormouse-vm-tests

# Real VMs, one test at a time: two at once take longer than one after the other under emulation.
vm: guest-image
	scripts/install-clients
	cargo build --locked --workspace
	cargo test --locked --no-fail-fast --package dormouse-vm-tests -- --test-threads=1

guest-image:
	cargo xtask guest-image
	cargo xtask busybox-image

packages:
	scripts/install-packages build run test

# What takes longer than `make test` may, see TESTING.md.
check: packages
	scripts/check

test-long: packages
	scripts/test-long
