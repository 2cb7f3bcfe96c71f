//! Integration tests: one binary, one module per floor or API.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "tests may panic")]

mod artifacts_api;
mod bad_inputs;
mod common;
mod routes;
mod storage_contract;
