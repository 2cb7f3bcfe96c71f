//! SQLite's connections: some that read, and two that write, one of them at a time.
//!
//! Only this floor's macros and `connect.rs` take one. It is no sqlx pool, because that asks each connection for a sign
//! of life before and after each use, and on SQLite that costs as much as a query. Here only a connection whose last
//! use did not end well is asked.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqliteSynchronous};
use sqlx::{ConnectOptions as _, Connection as _, SqliteConnection, Transaction};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

/// A writer queues behind the others, so it may wait longer than one on Postgres.
pub(super) const TIMEOUT: Duration = Duration::from_secs(30);
const READERS: u32 = 8;

/// SQLite has one writer at a time. Writers wait for their turn in a fair queue: SQLite itself would let them poll the
/// file's lock, asleep between two looks.
#[derive(Clone, Debug)]
pub struct Sqlite {
    readers: Lane,
    /// `synchronous=FULL`: what it commits survives a power cut, and so does all that was committed before.
    durable: Lane,
    /// `synchronous=NORMAL`: what it commits survives the process. Block rows go here, and what the cleaner repeats.
    staging: Lane,
}

impl Sqlite {
    /// Opens one connection of each kind. What `durable` commits is synced as that says.
    pub(super) async fn open(options: &SqliteConnectOptions, durable: SqliteSynchronous) -> Result<Self, sqlx::Error> {
        let turn = Arc::new(Semaphore::new(1));
        let lane = |places: &Arc<Semaphore>, synchronous| Lane {
            options: Arc::new(options.clone().synchronous(synchronous)),
            idle: Arc::default(),
            places: Arc::clone(places),
        };
        let sqlite = Self {
            durable: lane(&turn, durable),
            staging: lane(&turn, SqliteSynchronous::Normal),
            readers: lane(&Arc::new(Semaphore::new(READERS as usize)), SqliteSynchronous::Normal),
        };
        for lane in [&sqlite.durable, &sqlite.staging, &sqlite.readers] {
            lane.take().await?.done();
        }
        Ok(sqlite)
    }

    pub async fn readers(&self) -> Result<Lent, sqlx::Error> {
        self.readers.take().await
    }

    pub async fn durable(&self) -> Result<Lent, sqlx::Error> {
        self.durable.take().await
    }

    pub async fn staging(&self) -> Result<Lent, sqlx::Error> {
        self.staging.take().await
    }

    /// How to open what `durable` would lend.
    pub(super) fn durable_options(&self) -> SqliteConnectOptions {
        self.durable.options.as_ref().clone()
    }

    /// Waits until all connections are back and closes them. Nobody is lent one afterwards.
    pub(super) async fn close(&self) {
        for (places, lanes) in [(1, vec![&self.staging, &self.durable]), (READERS, vec![&self.readers])] {
            for lane in lanes {
                let all = lane.places.acquire_many(places).await;
                let connections = std::mem::take(&mut *lane.idle());
                for Idle { connection, .. } in connections {
                    // Whatever it could not tidy up, the next start does.
                    let _ = connection.close().await;
                }
                drop(all);
            }
        }
        self.durable.places.close();
        self.readers.places.close();
    }
}

/// Connections of one kind.
#[derive(Clone, Debug)]
struct Lane {
    options: Arc<SqliteConnectOptions>,
    idle: Arc<Mutex<Vec<Idle>>>,
    /// As many as may be lent at once; the two writers share one.
    places: Arc<Semaphore>,
}

#[derive(Debug)]
struct Idle {
    connection: SqliteConnection,
    /// Its last use ended well.
    sound: bool,
}

impl Lane {
    async fn take(&self) -> Result<Lent, sqlx::Error> {
        let place = timeout(TIMEOUT, Arc::clone(&self.places).acquire_owned())
            .await
            .map_err(|_| sqlx::Error::PoolTimedOut)?
            .map_err(|_| sqlx::Error::PoolClosed)?;
        let idle = self.idle().pop();
        let connection = match idle {
            Some(Idle {
                connection,
                sound: true,
            }) => connection,
            Some(Idle { connection, .. }) => match revived(connection).await {
                Some(connection) => connection,
                None => self.options.connect().await?,
            },
            None => self.options.connect().await?,
        };
        Ok(Lent {
            connection: Some(connection),
            sound: false,
            lane: self.clone(),
            _place: place,
        })
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection whose user failed or went away, if it can be used again. A rollback that is still queued on it comes
/// before the answer. SQLite itself ends a transaction that the disk has no room for, which sqlx does not notice: on
/// such a connection no other could ever begin.
async fn revived(mut connection: SqliteConnection) -> Option<SqliteConnection> {
    let answers = connection.ping().await.is_ok();
    (answers && !connection.is_in_transaction()).then_some(connection)
}

/// A connection in use. It goes back when this is dropped.
#[derive(Debug)]
pub struct Lent {
    /// There until it is dropped.
    connection: Option<SqliteConnection>,
    sound: bool,
    lane: Lane,
    _place: OwnedSemaphorePermit,
}

impl Lent {
    pub fn connection(&mut self) -> Result<&mut SqliteConnection, sqlx::Error> {
        self.connection.as_mut().ok_or(sqlx::Error::PoolClosed)
    }

    /// Begins a transaction. One that began by reading could find the write lock taken and could not wait for it.
    pub(super) async fn begin(&mut self) -> Result<Transaction<'_, sqlx::Sqlite>, sqlx::Error> {
        self.connection()?.begin_with("BEGIN IMMEDIATE").await
    }

    /// Says that the use of it ended well.
    pub fn done(mut self) {
        self.sound = true;
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let sound = self.sound;
        if let Some(connection) = self.connection.take() {
            self.lane.idle().push(Idle { connection, sound });
        }
    }
}
