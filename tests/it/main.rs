//! Integration tests: one binary, one module per floor or API.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "tests may panic")]

mod bad_inputs;
mod clients;
mod common;
mod db_contract;
mod fsck;
mod layers;
mod model;
mod races;
mod replicas;
mod routes;
mod seaweedfs;
mod storage_contract;
