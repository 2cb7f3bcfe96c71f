# cargo is all it takes to build and run; `make test` installs what else the tests need.
NODE = .tools/node/bin/node
CARGO_TOOLS = .tools/cargo/bin

.PHONY: run check test test-long bench fuzz lint-dependencies lint-containers

run:
	cargo run --release --locked

check:
	cargo fmt --check
	cargo fmt --check --manifest-path fuzz/Cargo.toml
	cargo clippy --release --locked --all-targets -- -D warnings
	cargo clippy --release --locked --all-targets --features failpoints,fuzzing -- -D warnings

test:
	tests/install.sh
	$(MAKE) check lint-dependencies lint-containers
	rm -f target/clients-table.txt
	tests/with-postgres.sh cargo test --release --locked
	tests/with-postgres.sh cargo test --release --locked --features failpoints --test it kill_matrix
	@cat target/clients-table.txt # written by the tests: client × case × backend
	@tests/advisories.sh
	@echo '`make test-long` was not run.'

# The same tests take the long way when they see this variable.
test-long:
	tests/install.sh seaweedfs
	WHARFINGER_TEST_LONG=1 tests/with-postgres.sh cargo test --release --locked --features failpoints -- long::
	tests/with-seaweedfs.sh tests/with-postgres.sh cargo test --release --locked # all tests, on a real S3

# Everything takes about an hour; `make bench BENCH="--rounds 1 --only ingest --servers wharfinger,nginx"` a minute.
# Built as the container image is, which takes some minutes.
bench:
	tests/install.sh bench
	cargo bench --profile dist --locked --bench bench -- $(BENCH)

# Every parser for FUZZ_SECONDS (60); `make fuzz FUZZ="range token"` some of them. Fails if one finds something.
fuzz:
	tests/install.sh fuzz
	fuzz/run.sh $(FUZZ)

# What others wrote: do we use it, and may we? See deny.toml. Neither asks the network.
lint-dependencies:
	$(CARGO_TOOLS)/cargo-machete
	$(CARGO_TOOLS)/cargo-deny --frozen check bans licenses sources

# Parsed and linted, not run.
lint-containers:
	$(NODE) tests/e2e/node_modules/.bin/dockerfile-utils lint Dockerfile
	for file in docker-compose.yml deploy/kubernetes/*.yaml; do \
		$(NODE) tests/e2e/node_modules/.bin/yaml valid < $$file || { echo "$$file is no YAML"; exit 1; }; \
	done
