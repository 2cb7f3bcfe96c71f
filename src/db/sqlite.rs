//! SQLite's connections: some that read, and one that writes.
//!
//! Lent to `session.rs`. Statements run on the thread of whoever asks (`sql.rs` says why). What may wait for the disk or
//! for another process does not: opening a connection, committing what is synced, copying the log into the database.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::session::Lane;
use super::sql::SqlError;
use crate::error::{Error, Result};

/// A writer queues behind the others, so it may wait longer than one on Postgres.
pub(super) const TIMEOUT: Duration = Duration::from_secs(30);
const READERS: u32 = 8;
/// Statements that a connection keeps prepared: more than there are.
const KEPT_STATEMENTS: usize = 256;
/// After so many changed rows, some 16 MiB of log, it is copied into the database. SQLite's own rule makes somebody's
/// COMMIT do it, and wait for the disk.
const ROWS_PER_CHECKPOINT: u64 = 1000;

/// SQLite has one writer at a time. Writers wait for their turn in a fair queue: SQLite itself would let them poll the
/// file's lock, asleep between two looks. They share a connection, because one forgets its pages when another has
/// written.
#[derive(Clone, Debug)]
pub struct Sqlite {
    readers: Arc<Pool>,
    writer: Arc<Pool>,
    /// What `Durable` commits survives a power cut, and so does all that was committed before.
    synced: bool,
}

/// Connections of one kind.
#[derive(Debug)]
struct Pool {
    file: Arc<Path>,
    writes: bool,
    idle: Mutex<Vec<Kept>>,
    /// As many as may be lent at once.
    places: Arc<Semaphore>,
    /// Rows that were changed since the log was last copied.
    changed_rows: AtomicU64,
    /// The next COMMIT may begin the log anew, and then syncs its head.
    log_restarts: AtomicBool,
}

/// A connection that is kept.
#[derive(Debug)]
struct Kept {
    connection: Connection,
    /// `synchronous=FULL`: its COMMIT waits for the disk. Otherwise `NORMAL`: what it commits survives the process.
    syncs: bool,
}

impl Sqlite {
    /// Opens one connection of each kind. Without `synced`, what `Durable` commits survives the process only.
    pub(super) fn open(file: &Path, synced: bool) -> std::result::Result<Self, SqlError> {
        let file: Arc<Path> = file.into();
        let pool = |writes, places: u32| {
            let pool = Pool {
                file: Arc::clone(&file),
                writes,
                idle: Mutex::default(),
                places: Arc::new(Semaphore::new(places as usize)),
                changed_rows: AtomicU64::new(0),
                log_restarts: AtomicBool::new(true),
            };
            let first = pool.connect()?;
            pool.idle().push(first);
            Ok::<_, SqlError>(Arc::new(pool))
        };
        Ok(Self {
            writer: pool(true, 1)?,
            readers: pool(false, READERS)?,
            synced,
        })
    }

    /// Lends a connection; one that writes has begun a transaction. One that began by reading could find the write lock
    /// taken and could not wait for it.
    pub async fn lend(&self, lane: Lane) -> Result<Lent> {
        match lane {
            Lane::Reading => self.readers.lend().await,
            Lane::Durable => self.writer.lend().await?.begin(self.synced).await,
            Lane::Staging => self.writer.lend().await?.begin(false).await,
        }
    }

    pub(super) fn file(&self) -> &Path {
        &self.writer.file
    }

    /// Waits until all connections are back and closes them. Nobody is lent one afterwards.
    pub(super) async fn close(&self) {
        for (pool, places) in [(&self.writer, 1), (&self.readers, READERS)] {
            let all = pool.places.acquire_many(places).await;
            pool.places.close();
            let connections = std::mem::take(&mut *pool.idle());
            // The last one to go copies the log. Whatever it can't tidy up, the next start does.
            let _ = spawn_blocking(move || drop(connections)).await;
            drop(all);
        }
    }
}

impl Pool {
    async fn lend(self: &Arc<Self>) -> Result<Lent> {
        let place = timeout(TIMEOUT, Arc::clone(&self.places).acquire_owned())
            .await
            .map_err(|_| sqlx::Error::PoolTimedOut)?
            .map_err(|_| sqlx::Error::PoolClosed)?;
        let idle = self.idle().pop();
        let kept = match idle {
            Some(kept) => kept,
            None => {
                let pool = Arc::clone(self);
                blocking(move || pool.connect()).await??
            }
        };
        Ok(Lent {
            changed_rows: kept.connection.total_changes(),
            kept: Some(kept),
            pool: Arc::clone(self),
            _place: place,
        })
    }

    /// Copies the log beside the writers, and in a turn of its own what they added meanwhile. Without that turn the log
    /// would never be empty while somebody writes, and would grow for ever.
    async fn checkpoint(self: Arc<Self>) {
        let copy = |connection: &Connection| {
            connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()))?;
            Ok::<_, SqlError>(())
        };
        let copied = async {
            let pool = Arc::clone(&self);
            blocking(move || copy(&pool.connect()?.connection)).await??;
            let lent = self.lend().await?;
            let _lent = blocking(move || copy(lent.connection()?).map(|()| lent)).await??;
            self.log_restarts.store(true, Ordering::Relaxed);
            Ok::<_, Error>(())
        };
        // Whoever closes the pool copies what is left.
        if let Err(error) = copied.await
            && !self.places.is_closed()
        {
            tracing::warn!(%error, "the database's log was not copied; it is tried again");
        }
    }

    fn connect(&self) -> std::result::Result<Kept, SqlError> {
        let connection = Connection::open(&self.file)?;
        connection.busy_timeout(TIMEOUT)?;
        connection.pragma_update(None, "journal_mode", "wal")?;
        connection.pragma_update(None, "synchronous", "normal")?;
        connection.pragma_update(None, "foreign_keys", true)?;
        connection.pragma_update(None, "wal_autocheckpoint", 0)?;
        connection.set_prepared_statement_cache_capacity(KEPT_STATEMENTS);
        if self.writes {
            // `Lent::begin` waits elsewhere.
            connection.busy_timeout(Duration::ZERO)?;
        }
        Ok(Kept {
            connection,
            syncs: false,
        })
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Kept>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Does what may wait for the disk, to its end even if nobody waits for it any more.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    spawn_blocking(work)
        .await
        .map_err(|error| Error::Internal(format!("the database's work was lost: {error}")))
}

/// A connection in use. It goes back when this is dropped, and what it did not commit is rolled back.
#[derive(Debug)]
pub struct Lent {
    /// There until it is dropped.
    kept: Option<Kept>,
    /// What the connection had changed before.
    changed_rows: u64,
    pool: Arc<Pool>,
    _place: OwnedSemaphorePermit,
}

impl Lent {
    /// The connection itself.
    pub fn connection(&self) -> std::result::Result<&Connection, SqlError> {
        self.kept
            .as_ref()
            .map(|kept| &kept.connection)
            .ok_or(SqlError::Postgres(sqlx::Error::PoolClosed))
    }

    fn run(&self, statement: &str) -> std::result::Result<(), SqlError> {
        self.connection()?.prepare_cached(statement)?.raw_execute()?;
        Ok(())
    }

    /// Begins a transaction. Only another process, such as a command of the operator's, can make it wait.
    async fn begin(mut self, synced: bool) -> Result<Self> {
        const BEGIN: &str = "BEGIN IMMEDIATE";
        self.set_syncs(synced)?;
        match self.run(BEGIN) {
            Ok(()) => Ok(self),
            Err(SqlError::Sqlite(error)) if error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) => {
                let begun = blocking(move || {
                    self.connection()?.busy_timeout(TIMEOUT)?;
                    let begun = self.run(BEGIN);
                    self.connection()?.busy_timeout(Duration::ZERO)?;
                    begun.map(|()| self)
                });
                Ok(begun.await??)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn set_syncs(&mut self, synced: bool) -> std::result::Result<(), SqlError> {
        if let Some(kept) = &mut self.kept
            && kept.syncs != synced
        {
            let level = if synced { "full" } else { "normal" };
            kept.connection.pragma_update(None, "synchronous", level)?;
            kept.syncs = synced;
        }
        Ok(())
    }

    /// Commits what was written, if this is a connection that writes.
    pub(super) async fn commit(self) -> Result<()> {
        const COMMIT: &str = "COMMIT";
        if !self.pool.writes {
            return Ok(());
        }
        let syncs = self.kept.as_ref().is_some_and(|kept| kept.syncs);
        let writes = self.connection()?.total_changes() > self.changed_rows;
        let lent = if syncs || writes && self.pool.log_restarts.swap(false, Ordering::Relaxed) {
            blocking(move || self.run(COMMIT).map(|()| self)).await??
        } else {
            self.run(COMMIT)?;
            self
        };
        lent.checkpoint_if_due()?;
        Ok(())
    }

    /// Gives the turn back, and has the log copied into the database once it is long.
    fn checkpoint_if_due(self) -> std::result::Result<(), SqlError> {
        let changed = self.connection()?.total_changes() - self.changed_rows;
        let changed_before = self.pool.changed_rows.fetch_add(changed, Ordering::Relaxed);
        if changed_before + changed >= ROWS_PER_CHECKPOINT {
            self.pool.changed_rows.store(0, Ordering::Relaxed);
            tokio::spawn(Arc::clone(&self.pool).checkpoint());
        }
        Ok(())
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let Some(kept) = self.kept.take() else {
            return;
        };
        // A transaction may be over without having been ended: SQLite rolls back itself when the disk is full.
        if kept.connection.is_autocommit() || kept.connection.execute_batch("ROLLBACK").is_ok() {
            self.pool.idle().push(kept);
        }
    }
}
