//! Opening the database and bringing its schema up to date.
//!
//! Called by `app` at start. Every failure is one sentence that says what to do.

use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use sqlx::Connection as _;
use sqlx::migrate::{MigrateError, Migrator};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::sqlite::{SqliteConnectOptions, SqlitePoolOptions, SqliteSynchronous};

use super::{Db, Sqlite, sqlite};
use crate::failpoint;

static POSTGRES: Migrator = sqlx::migrate!("migrations/postgres");
static SQLITE: Migrator = sqlx::migrate!("migrations/sqlite");

/// How long a request waits for a free connection before it is told to come back later.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);
/// A connection that was used less than this ago is not asked whether it still is one: that is a trip to the server.
const KNOWN_GOOD_FOR: Duration = Duration::from_secs(1);

/// The `[database]` section of the configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// `postgres://…`, or empty for SQLite in the data directory.
    pub url: SecretString,
    /// Connections to Postgres per replica.
    pub max_connections: u32,
}

/// Migrates step by step, each of which is one transaction: first sqlx's own table, then one migration after the other.
macro_rules! in_steps {
    ($migrator:expr, $pool:expr) => {{
        let migrations = $migrator.iter().map(|migration| migration.version);
        let mut outcome = Ok(());
        for version in std::iter::once(0).chain(migrations) {
            outcome = $migrator.run_to(version, $pool).await;
            if outcome.is_err() {
                break;
            }
            failpoint::reach("migration_mid");
        }
        outcome
    }};
}

impl Settings {
    pub fn is_embedded(&self) -> bool {
        self.url.expose_secret().is_empty()
    }
}

impl Db {
    /// Connects, without touching the schema. Without `synced`, what SQLite commits survives the process only.
    pub async fn connect(
        settings: &Settings,
        data_dir: &Path,
        ca_file: Option<&Path>,
        synced: bool,
    ) -> Result<Self, String> {
        if settings.is_embedded() {
            let file = data_dir.join("wharfinger.db");
            Sqlite::open(&file, synced)
                .map(Self::Sqlite)
                .map_err(|error| format!("cannot open {} ({error}); is it writable?", file.display()))
        } else {
            Self::connect_postgres(settings, ca_file).await
        }
    }

    async fn connect_postgres(settings: &Settings, ca_file: Option<&Path>) -> Result<Self, String> {
        let mut options = PgConnectOptions::from_str(settings.url.expose_secret())
            .map_err(|error| format!("database.url is not a usable postgres:// URL ({error}); correct it"))?
            .application_name("wharfinger")
            // A replica that hangs in a transaction must not hold everybody's locks.
            .options([
                ("statement_timeout", "10s"),
                ("lock_timeout", "3s"),
                ("idle_in_transaction_session_timeout", "15s"),
                ("synchronous_commit", "on"),
                // What is written here relies on it; another may be the default of the server or of the role.
                ("default_transaction_isolation", "read committed"),
            ]);
        if let Some(ca_file) = ca_file {
            options = options.ssl_root_cert(ca_file);
        }
        let place = format!("{}:{}", options.get_host(), options.get_port());
        let pool = PgPoolOptions::new()
            .max_connections(settings.max_connections)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .test_before_acquire(false)
            .before_acquire(|connection, metadata| {
                Box::pin(async move { Ok(metadata.idle_for < KNOWN_GOOD_FOR || connection.ping().await.is_ok()) })
            })
            .connect_with(options)
            .await
            .map_err(|error| {
                format!("cannot connect to the database at {place} ({error}); start it or correct database.url")
            })?;
        Ok(Self::Postgres(pool))
    }

    /// Brings the schema up to date. Any number of replicas may call this at once; on SQLite the caller holds
    /// the data directory's lock.
    pub async fn migrate(&self) -> Result<(), String> {
        let outcome = match self {
            Db::Postgres(pool) => {
                // Waiting for another replica's migration, and a long one of our own, must not time out.
                let patient = [("statement_timeout", "0"), ("lock_timeout", "0")];
                let options = pool.connect_options().as_ref().clone().options(patient);
                match PgPoolOptions::new().max_connections(1).connect_with(options).await {
                    Ok(patient) => in_steps!(POSTGRES, &patient),
                    Err(error) => Err(MigrateError::Execute(error)),
                }
            }
            Db::Sqlite(sqlite) => {
                let options = SqliteConnectOptions::new()
                    .filename(sqlite.file())
                    .busy_timeout(sqlite::TIMEOUT)
                    .synchronous(SqliteSynchronous::Full);
                match SqlitePoolOptions::new().max_connections(1).connect_with(options).await {
                    Ok(pool) => {
                        let outcome = in_steps!(SQLITE, &pool);
                        pool.close().await;
                        outcome
                    }
                    Err(error) => Err(MigrateError::Execute(error)),
                }
            }
        };
        outcome.map_err(|error| match error {
            MigrateError::VersionMissing(version) => format!(
                "the database has schema version {version}, which is newer than this program knows; run the newer release"
            ),
            MigrateError::VersionMismatch(version) => format!(
                "migration {version} was applied to the database in another form; run the release that applied it"
            ),
            error => format!("cannot bring the database's schema up to date ({error}); nothing of the failed step was kept"),
        })
    }
}
