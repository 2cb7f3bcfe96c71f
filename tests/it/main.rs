//! Integration tests: one binary, one module per floor or API.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "tests may panic")]

mod artifacts_api;
mod artifacts_v3;
mod authorization;
mod bad_inputs;
mod bounds;
mod cache_api;
mod cli;
mod clients;
mod common;
mod crash;
mod credentials;
mod db_contract;
mod deploy;
mod faults;
mod fsck;
mod ghac;
mod go_cache;
mod growth;
mod handover;
mod key_sets;
#[cfg(feature = "failpoints")]
mod kill_matrix;
mod layers;
mod log;
mod model;
mod pass_through;
mod races;
mod reach;
mod replicas;
mod rest;
mod restore;
mod routes;
mod seaweedfs;
mod secrets;
mod sqlite;
mod storage_contract;
mod tls;
