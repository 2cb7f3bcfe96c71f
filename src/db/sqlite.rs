//! SQLite's connections: some that read, and one that writes.
//!
//! Lent to `session.rs`. Statements run on the thread of whoever asks (`sql.rs` says why). What may wait for the disk or
//! for another process does not: opening a connection, committing what is synced, copying the log into the database.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::session::Lane;
use super::sql::SqlError;
use super::unavailable;
use crate::error::{Error, Result};

/// A writer queues behind the others, so it may wait longer than one on Postgres.
pub(super) const TIMEOUT: Duration = Duration::from_secs(30);
const READERS: u32 = 8;
/// Statements that a connection keeps prepared: more than there are, but for lists of many lengths.
const KEPT_STATEMENTS: usize = 256;
/// After so many changed rows, some 16 MiB of log, it is copied into the database. SQLite's own rule makes somebody's
/// COMMIT do it, and wait for the disk.
const ROWS_PER_CHECKPOINT: u64 = 1000;
/// Transactions that one COMMIT keeps, so that nobody waits for long behind a crowd.
const MAX_GROUP: usize = 64;

/// SQLite has one writer at a time. Writers wait for their turn in a fair queue: SQLite itself would let them poll the
/// file's lock, asleep between two looks. They share a connection, because one forgets its pages when another has
/// written; and as long as others wait they share a COMMIT, because that is much of what writing costs. Whoever is
/// last commits for all, and until then nobody is told that anything was done.
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
    /// Who waits for the turn to write.
    waiting: AtomicUsize,
    /// The next COMMIT may begin the log anew, and then syncs its head.
    log_restarts: AtomicBool,
}

/// A connection that is kept.
#[derive(Debug)]
struct Kept {
    /// Boxed, because it is handed from one to the next.
    connection: Box<Connection>,
    /// `synchronous=FULL`: its COMMIT waits for the disk. Otherwise `NORMAL`: what it commits survives the process.
    syncs: bool,
    /// Those who did their part of the transaction that is open.
    group: Option<Group>,
    /// Rows that it had changed when it last committed.
    committed_rows: u64,
    /// And when the log was last copied.
    copied_rows: u64,
}

/// Transactions that are done except for their COMMIT. Dropped without an outcome, all are lost.
#[derive(Debug)]
struct Group {
    members: usize,
    committed: watch::Sender<bool>,
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
                waiting: AtomicUsize::new(0),
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
            Lane::Durable => self.writer.turn().await?.begin(self.synced).await,
            Lane::Staging => self.writer.turn().await?.begin(false).await,
        }
    }

    pub(super) fn file(&self) -> &Path {
        &self.writer.file
    }

    /// Waits until all connections are back and closes them. Nobody is lent one afterwards.
    pub(super) async fn close(&self) {
        // A writer may have left its COMMIT to this one.
        if let Ok(turn) = self.writer.turn().await {
            let _turn = turn.settled().await;
            self.writer.places.close();
        }
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
    /// As [`Pool::lend`], for the one that writes.
    async fn turn(self: &Arc<Self>) -> Result<Lent> {
        let mut waiting = Waiting::for_turn(self);
        let lent = self.lend().await?;
        waiting.in_vain = false;
        Ok(lent)
    }

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
            part: if kept.group.is_some() {
                Part::Nothing
            } else {
                Part::Everything
            },
            kept: Some(kept),
            pool: Arc::clone(self),
            _place: place,
        })
    }

    /// Commits what a group did, if its next member went away.
    fn settle_soon(self: &Arc<Self>) {
        if let Ok(runtime) = Handle::try_current() {
            let pool = Arc::clone(self);
            // Members learn from their group what becomes of it.
            runtime.spawn(async move { pool.turn().await?.settled().await.map(drop) });
        }
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
            let lent = self.turn().await?.settled().await?;
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
            connection: connection.into(),
            syncs: false,
            group: None,
            committed_rows: 0,
            copied_rows: 0,
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

/// Somebody who waits for the turn to write, as long as it lives.
struct Waiting<'a> {
    pool: &'a Arc<Pool>,
    /// It goes away without.
    in_vain: bool,
}

impl<'a> Waiting<'a> {
    fn for_turn(pool: &'a Arc<Pool>) -> Self {
        pool.waiting.fetch_add(1, Ordering::SeqCst);
        Self { pool, in_vain: true }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let is_last = self.pool.waiting.fetch_sub(1, Ordering::SeqCst) == 1;
        // A group may have been left to this one. If it is not back yet, whoever brings it finds nobody waiting.
        let is_left = || self.pool.idle().iter().any(|kept| kept.group.is_some());
        if self.in_vain && is_last && !self.pool.places.is_closed() && is_left() {
            self.pool.settle_soon();
        }
    }
}

/// A connection in use. It goes back when this is dropped, and what was not done to its end is rolled back.
#[derive(Debug)]
pub struct Lent {
    /// There until it is dropped.
    kept: Option<Kept>,
    part: Part,
    pool: Arc<Pool>,
    _place: OwnedSemaphorePermit,
}

/// What of a transaction that may be open is to be rolled back, if nothing else becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// It is the group's.
    Nothing,
    /// What came after the savepoint that follows the rest of the group.
    Savepoint,
    Everything,
}

impl Lent {
    /// The connection itself.
    pub fn connection(&self) -> std::result::Result<&Connection, SqlError> {
        self.kept
            .as_ref()
            .map(|kept| &*kept.connection)
            .ok_or(SqlError::Postgres(sqlx::Error::PoolClosed))
    }

    fn run(&self, statement: &str) -> std::result::Result<(), SqlError> {
        self.connection()?.prepare_cached(statement)?.raw_execute()?;
        Ok(())
    }

    /// Begins a transaction, or goes on with that of a group. Only another process, such as a command of the operator's,
    /// can make it wait.
    async fn begin(mut self, synced: bool) -> Result<Self> {
        const BEGIN: &str = "BEGIN IMMEDIATE";
        if self.joins(synced) {
            self.run("SAVEPOINT part")?;
            self.part = Part::Savepoint;
            return Ok(self);
        }
        self = self.settled().await?;
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

    /// Makes this a member of the group that there is, if its COMMIT is good enough.
    fn joins(&mut self, synced: bool) -> bool {
        let Some(kept) = &mut self.kept else { return false };
        match &mut kept.group {
            Some(group) if group.members < MAX_GROUP && (kept.syncs || !synced) => {
                group.members += 1;
                true
            }
            _ => false,
        }
    }

    fn is_in_group(&self) -> bool {
        self.kept.as_ref().is_some_and(|kept| kept.group.is_some())
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

    /// Keeps what was written, or takes it back. Whoever takes it back waits for its group as well: the reason may lie in
    /// what others wrote.
    pub(super) async fn end(mut self, keep: bool) -> Result<()> {
        if !self.pool.writes || !keep && (self.part == Part::Everything || self.connection()?.is_autocommit()) {
            return Ok(());
        }
        if self.part == Part::Savepoint {
            if !keep {
                self.run("ROLLBACK TO part")?;
            }
            self.run("RELEASE part")?;
            self.part = Part::Nothing;
        }
        let Some(mut committed) = self.left_to_next() else {
            return self.commit().await.map(drop);
        };
        drop(self);
        // The sender is gone if the group was lost.
        let outcome = committed.wait_for(|committed| *committed).await;
        outcome.map(drop).map_err(|_| unavailable())
    }

    /// Leaves the COMMIT to whoever waits next, if somebody does.
    fn left_to_next(&mut self) -> Option<watch::Receiver<bool>> {
        if self.pool.waiting.load(Ordering::SeqCst) == 0 {
            return None;
        }
        let group = self.kept.as_mut()?.group.get_or_insert_with(|| Group {
            members: 1,
            committed: watch::Sender::new(false),
        });
        self.part = Part::Nothing;
        Some(group.committed.subscribe())
    }

    /// Commits what a group did, so that no transaction is open.
    async fn settled(mut self) -> Result<Self> {
        while self.is_in_group() {
            let pool = Arc::clone(&self.pool);
            self = match self.commit().await {
                Ok(lent) => lent,
                Err(error) => {
                    tracing::warn!(%error, "what others wrote was not committed");
                    pool.turn().await?
                }
            };
        }
        Ok(self)
    }

    /// Commits all that was done, whoever did it.
    async fn commit(mut self) -> Result<Self> {
        self.part = Part::Everything;
        let waits = self.kept.as_ref().is_some_and(|kept| {
            let writes = kept.connection.total_changes() > kept.committed_rows;
            kept.syncs || writes && self.pool.log_restarts.swap(false, Ordering::Relaxed)
        });
        let committed = if waits {
            blocking(move || self.commit_here()).await?
        } else {
            self.commit_here()
        };
        Ok(committed?)
    }

    fn commit_here(mut self) -> std::result::Result<Self, SqlError> {
        self.run("COMMIT")?;
        if let Some(kept) = &mut self.kept {
            kept.committed_rows = kept.connection.total_changes();
            if let Some(group) = kept.group.take() {
                group.committed.send_replace(true);
            }
            if kept.committed_rows - kept.copied_rows >= ROWS_PER_CHECKPOINT {
                kept.copied_rows = kept.committed_rows;
                tokio::spawn(Arc::clone(&self.pool).checkpoint());
            }
        }
        Ok(self)
    }

    /// `false` if the connection is no longer fit for use.
    fn roll_back(&self, kept: &mut Kept) -> bool {
        // Also what SQLite itself rolled back, say because the disk is full.
        if kept.connection.is_autocommit() {
            kept.group = None;
            return true;
        }
        let undo = match self.part {
            Part::Nothing => return true,
            Part::Savepoint => "ROLLBACK TO part; RELEASE part",
            Part::Everything => {
                kept.group = None;
                "ROLLBACK"
            }
        };
        kept.connection.execute_batch(undo).is_ok()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let Some(mut kept) = self.kept.take() else {
            return;
        };
        if !self.roll_back(&mut kept) {
            return;
        }
        let is_open = kept.group.is_some();
        self.pool.idle().push(kept);
        if is_open && self.pool.waiting.load(Ordering::SeqCst) == 0 {
            self.pool.settle_soon();
        }
    }
}
