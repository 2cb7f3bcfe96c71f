//! Integration tests: one binary, one module per floor or API.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "tests may panic")]

mod clients;
mod common;
mod storage_contract;
