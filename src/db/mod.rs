//! Everything that knows SQL: one text of each query for Postgres and SQLite.
//!
//! Called by `service/` and `app`. One transaction is one method named by its intent; no transaction leaves
//! this floor, and no method holds a connection while bytes stream. Times are given by the caller, except
//! in [`Db::clock_skew_ms`].

mod artifacts;
mod blobs;
mod caches;
mod checking;
mod cleaning;
mod connect;
mod credentials;
mod files;
mod publishing;
mod repositories;
mod session;
mod sql;
mod sqlite;

pub use artifacts::{Created, FinalizeCandidate, ListedArtifact, NewArtifact, NewestArtifact, Sealing};
pub use blobs::{Committed, ListEntry, ListSource, ReadableBlob, StagedBlock, Verification, WritableBlob};
pub use caches::{
    CacheCandidate, Evictable, FoundCacheEntry, LargeCache, ListedCacheEntry, NewCacheEntry, Reservation, Reserved,
    WantedKeys,
};
pub use checking::{Miscount, Overdue, SealedBlob, Standing};
pub use connect::Settings;
pub use files::{BrokenFile, ChunkSums, Container, Encoding, File, FileChunk, NewChunk, Staged};
pub use publishing::Publication;
pub use repositories::{Filter, Page, RepositoryArtifact, RepositoryRun, RunJob, Usage, View};
pub use session::Lane;
pub use sqlite::{Lent, Sqlite};

use std::borrow::Cow;
use std::time::Duration;

use sqlx::PgPool;
use sqlx::postgres::PgDatabaseError;
use tokio::time::timeout;
use uuid::Uuid;

use self::sql::{SqlError, query};
use crate::clock::Clock;
use crate::error::{Error, Result};
use crate::model::ObjectKey;

/// The database. Cloning shares the connections.
#[derive(Clone, Debug)]
pub enum Db {
    Postgres(PgPool),
    Sqlite(Sqlite),
}

/// Runs one statement, with `$session` bound to what it is asked of, and keeps what it did. `$lane` is a [`Lane`].
macro_rules! on {
    ($db:expr, $lane:ident, |$session:ident| $body:expr) => {{
        let mut session = $db.session($crate::db::Lane::$lane).await?;
        let $session = &mut session;
        let value = $body;
        session.end(Some(())).await?;
        value
    }};
}

/// Runs a block in one transaction and is a `Result<_, Failure>`. `?` inside rolls back; the block's value is returned
/// after the commit, and `None` from it rolls back too. What the database takes back because of others is run again,
/// so the block leaves nothing behind in variables that it does not set anew.
macro_rules! transaction {
    ($db:expr, $lane:ident, |$tx:ident| $body:block) => {{
        let mut attempts_left = $crate::db::ATTEMPTS;
        loop {
            attempts_left -= 1;
            let ended: std::result::Result<_, $crate::db::Failure> = async {
                let mut session = $db.begin($crate::db::Lane::$lane).await?;
                let $tx = &mut session;
                let done: std::result::Result<_, $crate::db::Failure> = async { Ok($body) }.await;
                match done {
                    Ok(value) => session.end(value).await,
                    Err(failure) => Err(session.fail(failure).await),
                }
            }
            .await;
            match ended {
                Err($crate::db::Failure::TakenBack(_)) if attempts_left > 0 => {}
                ended => break ended,
            }
        }
    }};
}

pub(in crate::db) use {on, transaction};

/// How often a transaction is run that deadlocks or cannot be serialized with others.
const ATTEMPTS: usize = 3;

/// Why a transaction is not known to have been done.
#[derive(Debug)]
enum Failure {
    /// The database took it back because of others that ran at the same time.
    TakenBack(Error),
    /// The answer to COMMIT was lost. Who knows what it would have changed can look for it.
    Unknown(Error),
    /// Nothing of it was done.
    Failed(Error),
}

impl From<sqlx::Error> for Failure {
    fn from(error: sqlx::Error) -> Self {
        // Postgres: serialization failure, deadlock. SQLite has neither: its writers wait for each other.
        let taken_back = matches!(postgres_code(&error).as_deref(), Some("40001" | "40P01"));
        if taken_back {
            Self::TakenBack(error.into())
        } else {
            Self::Failed(error.into())
        }
    }
}

impl From<SqlError> for Failure {
    fn from(error: SqlError) -> Self {
        match error {
            SqlError::Postgres(error) => error.into(),
            SqlError::Sqlite(error) => Self::Failed(error.into()),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::TakenBack(error) | Failure::Unknown(error) | Failure::Failed(error) => error,
        }
    }
}

/// How long connections in use may take to come back when all are closed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a transaction that lost a race is tried again before the caller is told to come back later.
const TRIES: usize = 8;

fn lost_every_race() -> Error {
    Error::Busy("too many writers at once, try again".to_owned())
}

impl Db {
    /// A value stored once for the whole installation, such as the store's id.
    pub async fn property(&self, name: &str) -> Result<Option<String>> {
        let value = on!(self, Reading, |conn| {
            query("SELECT value FROM properties WHERE name = $1")
                .bind(name)
                .fetch_optional(conn)
                .await?
        });
        Ok(value)
    }

    /// Stores a property unless somebody was first; returns the value that now holds.
    pub async fn set_property_once(&self, name: &str, value: &str) -> Result<String> {
        on!(self, Durable, |conn| {
            query("INSERT INTO properties (name, value) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING")
                .bind(name)
                .bind(value)
                .execute(conn)
                .await?;
        });
        Ok(self.property(name).await?.unwrap_or_else(|| value.to_owned()))
    }

    /// Takes or renews a lease for `holder`. `false` if another holder's has not run out at `now_ms`.
    pub async fn take_lease(&self, name: &str, holder: Uuid, now_ms: i64, until_ms: i64) -> Result<bool> {
        let taken: Option<String> = on!(self, Staging, |conn| {
            query(
                "INSERT INTO leases (name, holder, expires_at_ms) VALUES ($1, $2, $3)
                 ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, expires_at_ms = excluded.expires_at_ms
                 WHERE leases.holder = excluded.holder OR leases.expires_at_ms <= $4
                 RETURNING name",
            )
            .bind(name)
            .bind(holder)
            .bind(until_ms)
            .bind(now_ms)
            .fetch_optional(conn)
            .await?
        });
        Ok(taken.is_some())
    }

    /// Gives a lease back, so that the next holder need not wait for it to run out.
    pub async fn release_lease(&self, name: &str, holder: Uuid) -> Result<()> {
        on!(self, Staging, |conn| {
            query("DELETE FROM leases WHERE name = $1 AND holder = $2")
                .bind(name)
                .bind(holder)
                .execute(conn)
                .await?;
        });
        Ok(())
    }

    /// Answers if the database can be asked.
    pub async fn ping(&self) -> Result<()> {
        let _: i32 = on!(self, Reading, |conn| query("SELECT 1").fetch_one(conn).await?);
        Ok(())
    }

    /// How far a machine's clock is ahead of the database's, in milliseconds. SQLite has no clock of its own.
    pub async fn clock_skew_ms(&self, clock: &Clock) -> Result<i64> {
        let Db::Postgres(pool) = self else { return Ok(0) };
        // Whatever the pool does to hand out a connection is not part of the way there.
        let mut conn = pool.acquire().await?;
        let asked_ms = clock.machine_ms();
        let theirs: i64 = sqlx::query_scalar("SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT)")
            .fetch_one(&mut *conn)
            .await?;
        // It was read half-way between question and answer.
        Ok(asked_ms.midpoint(clock.machine_ms()) - theirs)
    }

    /// Closes each connection once it is not in use any more. A database that does not answer is not waited for for
    /// long: whoever hangs in it was promised nothing yet.
    pub async fn close(&self) {
        let closing = async {
            match self {
                Db::Postgres(pool) => pool.close().await,
                Db::Sqlite(sqlite) => sqlite.close().await,
            }
        };
        if timeout(CLOSE_TIMEOUT, closing).await.is_err() {
            tracing::warn!("not every connection to the database was closed: it does not answer");
        }
    }
}

impl From<SqlError> for Error {
    fn from(error: SqlError) -> Self {
        match error {
            SqlError::Postgres(error) => error.into(),
            SqlError::Sqlite(error) => error.into(),
        }
    }
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        // Connection trouble, resources, lock, statement and transaction timeouts, serialization failures, shutting down,
        // a standby, a disk that fails.
        const TRANSIENT: [&str; 10] = [
            "08", "53", "55P03", "57014", "25P03", "57P", "40001", "40P01", "25006", "58030",
        ];
        let transient = match &error {
            sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed => true,
            sqlx::Error::WorkerCrashed | sqlx::Error::Protocol(_) => true,
            sqlx::Error::Database(_) => {
                postgres_code(&error).is_some_and(|code| TRANSIENT.iter().any(|prefix| code.starts_with(prefix)))
            }
            _ => false,
        };
        from_database(&error, transient)
    }
}

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Self {
        use rusqlite::ErrorCode::{CannotOpen, DatabaseBusy, DatabaseLocked, DiskFull, ReadOnly, SystemIoFailure};
        let transient = matches!(
            error.sqlite_error_code(),
            Some(CannotOpen | DatabaseBusy | DatabaseLocked | DiskFull | ReadOnly | SystemIoFailure)
        );
        from_database(&error, transient)
    }
}

fn unavailable() -> Error {
    Error::Busy("the database is not available, try again".to_owned())
}

fn from_database(error: &dyn std::error::Error, transient: bool) -> Error {
    if transient {
        tracing::warn!(%error, "the database did not do what was asked");
        unavailable()
    } else {
        Error::Internal(format!("database: {error}"))
    }
}

/// The SQLSTATE, if Postgres said it.
fn postgres_code(error: &sqlx::Error) -> Option<Cow<'_, str>> {
    let said = error.as_database_error()?;
    said.try_downcast_ref::<PgDatabaseError>()?;
    said.code()
}

/// The database's signed 64 bits as a size or offset.
fn unsigned(value: i64) -> Result<u64> {
    u64::try_from(value).map_err(|_| Error::Internal(format!("a negative size in the database: {value}")))
}

/// A size or offset as the database's signed 64 bits.
fn signed(value: u64) -> Result<i64> {
    i64::try_from(value).map_err(|_| Error::TooLarge("a size above 2^63 bytes".to_owned()))
}

fn object_key(text: &str) -> Result<ObjectKey> {
    ObjectKey::parse(text).ok_or_else(|| Error::Internal(format!("not an object key: {text}")))
}
