//! Integration tests: one binary, one module per floor or API.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "tests may panic")]

mod cli;
mod common;
mod crash;
mod db_contract;
mod layers;
mod replicas;
mod storage_contract;
