//! SQLite's connections: some that read, and two that write, one of them at a time.
//!
//! Lent to `session.rs`. Statements run on the thread of whoever asks: they take microseconds. What may wait for the disk
//! or for another process does not: opening a connection, committing what is synced, copying the log into the database.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
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
/// file's lock, asleep between two looks.
#[derive(Clone, Debug)]
pub struct Sqlite {
    readers: Arc<Pool>,
    /// `synchronous=FULL`: what it commits survives a power cut, and so does all that was committed before.
    durable: Arc<Pool>,
    /// `synchronous=NORMAL`: what it commits survives the process.
    staging: Arc<Pool>,
}

/// Connections of one kind.
#[derive(Debug)]
struct Pool {
    file: Arc<Path>,
    lane: Lane,
    /// Each COMMIT waits for the disk.
    synced: bool,
    idle: Mutex<Vec<Connection>>,
    /// As many as may be lent at once; the two writers share one.
    places: Arc<Semaphore>,
    /// Rows that writers changed since the log was last copied.
    changed_rows: Arc<AtomicU64>,
}

impl Sqlite {
    /// Opens one connection of each kind. Without `synced`, what `Durable` commits survives the process only.
    pub(super) fn open(file: &Path, synced: bool) -> std::result::Result<Self, SqlError> {
        let (file, changed_rows): (Arc<Path>, _) = (file.into(), Arc::default());
        let turn = Arc::new(Semaphore::new(1));
        let pool = |lane, synced, places: &Arc<Semaphore>| {
            Arc::new(Pool {
                file: Arc::clone(&file),
                lane,
                synced,
                idle: Mutex::default(),
                places: Arc::clone(places),
                changed_rows: Arc::clone(&changed_rows),
            })
        };
        let sqlite = Self {
            durable: pool(Lane::Durable, synced, &turn),
            staging: pool(Lane::Staging, false, &turn),
            readers: pool(Lane::Reading, false, &Arc::new(Semaphore::new(READERS as usize))),
        };
        for pool in [&sqlite.durable, &sqlite.staging, &sqlite.readers] {
            let connection = pool.connect()?;
            pool.idle().push(connection);
        }
        Ok(sqlite)
    }

    /// Lends a connection; one that writes has begun a transaction. One that began by reading could find the write lock
    /// taken and could not wait for it.
    pub async fn lend(&self, lane: Lane) -> Result<Lent> {
        match lane {
            Lane::Reading => self.readers.lend().await,
            Lane::Durable => self.durable.lend().await?.begin().await,
            Lane::Staging => self.staging.lend().await?.begin().await,
        }
    }

    pub(super) fn file(&self) -> &Path {
        &self.durable.file
    }

    /// Waits until all connections are back and closes them. Nobody is lent one afterwards.
    pub(super) async fn close(&self) {
        for (places, pools) in [(1, vec![&self.staging, &self.durable]), (READERS, vec![&self.readers])] {
            for pool in pools {
                let all = pool.places.acquire_many(places).await;
                let connections = std::mem::take(&mut *pool.idle());
                // The last one to go copies the log. Whatever it can't tidy up, the next start does.
                let _ = spawn_blocking(move || drop(connections)).await;
                drop(all);
            }
        }
        self.durable.places.close();
        self.readers.places.close();
    }
}

impl Pool {
    async fn lend(self: &Arc<Self>) -> Result<Lent> {
        let place = timeout(TIMEOUT, Arc::clone(&self.places).acquire_owned())
            .await
            .map_err(|_| sqlx::Error::PoolTimedOut)?
            .map_err(|_| sqlx::Error::PoolClosed)?;
        let idle = self.idle().pop();
        let connection = match idle {
            Some(connection) => connection,
            None => {
                let pool = Arc::clone(self);
                blocking(move || pool.connect()).await??
            }
        };
        Ok(Lent {
            changed_rows: connection.total_changes(),
            connection: Some(connection),
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
            blocking(move || copy(&pool.connect()?)).await??;
            let lent = self.lend().await?;
            Ok::<_, Error>(blocking(move || copy(lent.connection()?)).await??)
        };
        if let Err(error) = copied.await {
            tracing::warn!(%error, "the database's log was not copied; it is tried again");
        }
    }

    fn connect(&self) -> std::result::Result<Connection, SqlError> {
        let connection = Connection::open(&self.file)?;
        connection.busy_timeout(TIMEOUT)?;
        connection.pragma_update(None, "journal_mode", "wal")?;
        connection.pragma_update(None, "synchronous", if self.synced { "full" } else { "normal" })?;
        connection.pragma_update(None, "foreign_keys", true)?;
        connection.pragma_update(None, "wal_autocheckpoint", 0)?;
        connection.set_prepared_statement_cache_capacity(KEPT_STATEMENTS);
        if self.lane != Lane::Reading {
            // `Lent::begin` waits elsewhere.
            connection.busy_timeout(Duration::ZERO)?;
        }
        Ok(connection)
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Connection>> {
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
    connection: Option<Connection>,
    /// What the connection had changed before.
    changed_rows: u64,
    pool: Arc<Pool>,
    _place: OwnedSemaphorePermit,
}

impl Lent {
    /// The connection itself.
    pub fn connection(&self) -> std::result::Result<&Connection, SqlError> {
        self.connection
            .as_ref()
            .ok_or(SqlError::Postgres(sqlx::Error::PoolClosed))
    }

    fn run(&self, statement: &str) -> std::result::Result<(), SqlError> {
        self.connection()?.prepare_cached(statement)?.raw_execute()?;
        Ok(())
    }

    /// Begins a transaction. Only another process, such as a command of the operator's, can make it wait.
    async fn begin(self) -> Result<Self> {
        const BEGIN: &str = "BEGIN IMMEDIATE";
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

    /// Commits what was written, if this is a connection that writes.
    pub(super) async fn commit(self) -> Result<()> {
        const COMMIT: &str = "COMMIT";
        if self.pool.lane == Lane::Reading {
            return Ok(());
        }
        let lent = if self.pool.synced {
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
        let Some(connection) = self.connection.take() else {
            return;
        };
        // A transaction may be over without having been ended: SQLite rolls back itself when the disk is full.
        if connection.is_autocommit() || connection.execute_batch("ROLLBACK").is_ok() {
            self.pool.idle().push(connection);
        }
    }
}
