# The two commands of a fresh machine are `make demo` and `make test`; see README.md and TESTING.md.

.PHONY: guest-image test lint unit

# What VMs boot from, in build/images; see guest/README.md.
guest-image:
	scripts/install-packages build
	cargo xtask guest-image

test: lint unit

lint:
	cargo fmt --all -- --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --document-private-items --quiet

unit:
	cargo test --locked --workspace
