//! Wharfinger: artifact storage for unmodified GitHub Actions clients.
//!
//! Imports go down only: `main` → `cli` → `app` → `api` → `service` → {`db`, `storage`, `papers`} → `model`, `error`.
//! `ARCHITECTURE.md` explains the floors; `tests/it/layers.rs` fails when one reaches up.

pub mod api;
pub mod app;
pub mod authorities;
pub mod cli;
pub mod clock;
pub mod config;
pub mod db;
pub mod duration;
pub mod error;
pub mod failpoint;
pub mod model;
pub mod papers;
pub mod service;
pub mod storage;
