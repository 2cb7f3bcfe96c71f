//! Integration tests: one binary, one module per floor or API.

#![expect(clippy::unwrap_used, reason = "tests may panic")]

mod common;
mod db_contract;
mod layers;
mod replicas;
mod storage_contract;
