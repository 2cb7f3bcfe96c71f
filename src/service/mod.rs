//! The rules: what may be uploaded, read and deleted, when it ends, and who cleans up.
//!
//! Called by `api/`, `app` and `cli/`. Knows no HTTP, no SQL and no object store; it puts `db`, `storage` and
//! `papers` together and never answers a client itself.

pub mod artifacts;
pub mod caches;
mod chunks;
pub mod cleaner;
pub mod credentials;
pub mod downloads;
pub mod files;
pub mod fsck;
pub mod memory;
pub mod scrub;
pub mod uploads;
pub mod verification;
mod zip;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde::Deserialize;
use tokio::sync::{Notify, Semaphore};

use crate::clock::Clock;
use crate::db::Db;
use crate::papers::Papers;
use crate::storage::BlockStore;

/// The sections of the configuration that hold rules.
#[derive(Clone, Debug, Deserialize)]
pub struct Settings {
    pub uploads: uploads::Settings,
    pub artifacts: artifacts::Settings,
    pub cache: caches::Settings,
    pub verification: verification::Settings,
    pub cleaner: cleaner::Settings,
    pub scrub: scrub::Settings,
    pub memory: memory::Settings,
}

/// Everything a handler or a background task works with. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Services(Arc<Parts>);

#[derive(Debug)]
pub struct Parts {
    pub db: Db,
    pub store: BlockStore,
    pub papers: Papers,
    pub clock: Clock,
    pub settings: Settings,
    /// What bytes on their way through may take of the memory.
    memory: memory::Memory,
    /// What the last look at the database's clock found.
    clock_was_off: AtomicBool,
    /// Places to hash at. More at once than there are cores only hold more memory.
    hashing: Semaphore,
    /// Wakes the verifier when there is something to verify, so that it need not poll often.
    verify: Notify,
}

impl Services {
    pub fn new(db: Db, store: BlockStore, papers: Papers, clock: Clock, settings: Settings) -> Self {
        Self(Arc::new(Parts {
            db,
            store,
            papers,
            clock,
            memory: memory::Memory::new(&settings.memory),
            settings,
            clock_was_off: AtomicBool::new(false),
            hashing: Semaphore::new(verification::hashes_at_once()),
            verify: Notify::new(),
        }))
    }
}

impl Services {
    /// Whether no bytes are under way.
    pub fn is_at_rest(&self) -> bool {
        self.memory.is_free()
    }
}

impl std::ops::Deref for Services {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.0
    }
}

/// A span of the configuration in the clock's milliseconds.
fn millis(span: std::time::Duration) -> i64 {
    i64::try_from(span.as_millis()).unwrap_or(i64::MAX)
}
