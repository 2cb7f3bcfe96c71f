//! A connection for the statements of one method, and how what they did is kept.
//!
//! Made by the macros of `mod.rs` alone; `sql.rs` asks it. A session that is dropped before its end has done nothing, if
//! it is a transaction.

use sqlx::pool::PoolConnection;
use sqlx::{PgConnection, PgPool, Postgres};

use super::sql::SqlError;
use super::sqlite::Lent;
use super::{Db, Failure, postgres_code};
use crate::error::{Error, Result};

/// What a method does, which decides on the SQLite connection that it is lent and on what its COMMIT waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// Reads. Never waits for who writes.
    Reading,
    /// Writes what is acknowledged for good.
    Durable,
    /// Writes what a power cut may take: rows of blocks, and what the cleaner does again.
    Staging,
}

/// A connection in use.
#[derive(Debug)]
pub enum Session {
    Postgres(PoolConnection<Postgres>),
    PostgresTransaction(sqlx::Transaction<'static, Postgres>),
    /// In a transaction too, if it writes.
    Sqlite(Lent),
}

impl Db {
    /// For one statement.
    pub(super) async fn session(&self, lane: Lane) -> Result<Session> {
        match self {
            Self::Postgres(pool) => Ok(Session::Postgres(pool.acquire().await?)),
            Self::Sqlite(sqlite) => Ok(Session::Sqlite(sqlite.lend(lane).await?)),
        }
    }

    /// For a transaction.
    pub(super) async fn begin(&self, lane: Lane) -> Result<Session> {
        match self {
            Self::Postgres(pool) => begin(pool).await,
            Self::Sqlite(sqlite) => Ok(Session::Sqlite(sqlite.lend(lane).await?)),
        }
    }
}

/// Begins a transaction, also for a caller that goes away meanwhile. sqlx 0.9 gives a connection that is dropped in the
/// middle of `BEGIN` back to its pool as if nothing had begun; whoever wrote on it next would never be committed.
async fn begin(pool: &PgPool) -> Result<Session> {
    let pool = pool.clone();
    let begun = tokio::spawn(async move { pool.begin().await }).await;
    let transaction = begun.map_err(|error| Error::Internal(format!("a transaction did not begin: {error}")))??;
    Ok(Session::PostgresTransaction(transaction))
}

impl Session {
    /// The connection, which is one to Postgres.
    pub(super) fn postgres(&mut self) -> std::result::Result<&mut PgConnection, SqlError> {
        match self {
            Self::Postgres(connection) => Ok(connection),
            Self::PostgresTransaction(transaction) => Ok(transaction),
            Self::Sqlite(_) => Err(SqlError::Postgres(sqlx::Error::PoolClosed)),
        }
    }

    /// Rolls back because of a failure. It may be about what others in the same SQLite transaction wrote, and is not told
    /// if that is lost.
    pub(super) async fn fail(self, failure: Failure) -> Failure {
        match self {
            Self::Postgres(_) | Self::PostgresTransaction(_) => failure,
            Self::Sqlite(lent) => match lent.end(false).await {
                Ok(()) => failure,
                Err(lost) => Failure::Failed(lost),
            },
        }
    }

    /// Commits, or rolls back if there is nothing to keep. A single statement on Postgres commits itself.
    pub(super) async fn end<T>(self, value: Option<T>) -> std::result::Result<Option<T>, Failure> {
        match self {
            Self::Postgres(_) => {}
            Self::PostgresTransaction(transaction) if value.is_none() => transaction.rollback().await?,
            Self::PostgresTransaction(transaction) => {
                if let Err(error) = transaction.commit().await {
                    // A server that is shut down says so instead of telling what became of the COMMIT.
                    let refused = error.as_database_error().is_some()
                        && !postgres_code(&error).is_some_and(|code| code.starts_with("57P"));
                    return Err(match Failure::from(error) {
                        Failure::Failed(error) if !refused => Failure::Unknown(error),
                        failure => failure,
                    });
                }
            }
            Self::Sqlite(lent) => lent.end(value.is_some()).await?,
        }
        Ok(value)
    }
}
