//! Puts the floors together: opens what the configuration names, starts the server and its background work, stops both.
//!
//! Called by `cli/` and by tests. The only place besides `main` and `cli` that sees `Config`; holds no rule of its own.

mod allocator;
mod identity;
mod local;
mod telemetry;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, anyhow, bail, ensure};
use listenfd::ListenFd;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::api::pass_through::Upstream;
use crate::api::tls::Tls;
use crate::api::{self, Context, Operations};
use crate::clock::Clock;
use crate::config::Config;
use crate::db::Db;
use crate::papers::Papers;
use crate::service::{Services, Settings, fsck};
use crate::storage::{BlockStore, Durability};

pub use self::local::prepare_data_dir;

/// A running server.
pub struct App {
    pub services: Services,
    pub public: SocketAddr,
    pub internal: SocketAddr,
    draining: Arc<AtomicBool>,
    stop: CancellationToken,
    servers: JoinSet<()>,
    background: JoinSet<()>,
    /// Held as long as this process serves from the embedded database.
    _lock: Option<local::Lock>,
}

/// Opens everything that the configuration names, with the schema up to date, and checks that it belongs together.
///
/// # Errors
/// One sentence that says what to do.
pub async fn open(config: &Config, clock: Clock) -> anyhow::Result<Services> {
    if config.uses_data_dir() {
        prepare_data_dir(&config.data_dir)?;
    }
    let root_secret = local::root_secret(config)?;
    let papers = Papers::new(&config.issuers, &root_secret, &config.public_origin())
        .and_then(|papers| papers.fetching_key_sets(config.ca_file.as_deref()))
        .map_err(|error| anyhow!(error))?
        .untrusted_events_readonly(config.cache.untrusted_events_readonly);
    let db = connect(config).await?;
    let store = BlockStore::open(&config.storage, &config.data_dir, config.ca_file.as_deref())
        .await
        .map_err(|error| anyhow!(error))?;
    identity::check(&db, &store, &root_secret).await?;
    let settings = Settings {
        uploads: config.uploads.clone(),
        artifacts: config.artifacts.clone(),
        cache: config.cache.clone(),
        verification: config.verification.clone(),
        cleaner: config.cleaner.clone(),
        scrub: config.scrub.clone(),
        memory: config.memory.clone(),
    };
    let services = Services::new(db, store, papers, clock, settings);
    services.refresh_papers().await?;
    Ok(services)
}

/// The issuers and keys of an installation that is there already.
///
/// # Errors
/// One sentence that says what to do.
pub async fn papers(config: &Config) -> anyhow::Result<Papers> {
    let root_secret = local::existing_root_secret(config)?;
    let papers = Papers::new(&config.issuers, &root_secret, &config.public_origin()).map_err(|error| anyhow!(error))?;
    let db = connect(config).await?;
    let keys = db.signing_keys().await?;
    db.close().await;
    papers
        .use_keys(&keys, Clock::System.now_ms())
        .map_err(|error| anyhow!(error))?;
    Ok(papers)
}

/// Connects to the database and brings its schema up to date.
async fn connect(config: &Config) -> anyhow::Result<Db> {
    if config.database.is_embedded() {
        // SQLite gives its other files the mode of this one.
        local::open(&config.data_dir, "wharfinger.db")?;
    }
    let synced = config.storage.durability == Durability::Full;
    let db = Db::connect(&config.database, &config.data_dir, config.ca_file.as_deref(), synced)
        .await
        .map_err(|error| anyhow!(error))?;
    // Postgres has a lock of its own for this.
    let _lock = match db {
        Db::Sqlite(_) => Some(local::Lock::wait(&config.data_dir, "migrate.lock").await?),
        Db::Postgres(_) => None,
    };
    db.migrate().await.map_err(|error| anyhow!(error))?;
    Ok(db)
}

impl App {
    /// Starts serving. `metrics` is what `/metrics` shows.
    ///
    /// # Errors
    /// One sentence that says what to do.
    pub async fn start(config: &Config, clock: Clock, metrics: Option<PrometheusHandle>) -> anyhow::Result<Self> {
        let mut config = config.clone();
        if config.uses_data_dir() {
            prepare_data_dir(&config.data_dir)?;
        }
        let lock = if config.database.is_embedded() {
            Some(local::Lock::try_take(&config.data_dir, "serve.lock")?)
        } else {
            None
        };
        let tls = Tls::open(&config.tls).map_err(|error| anyhow!(error))?;
        let upstream =
            Upstream::new(&config.pass_through, config.ca_file.as_deref()).map_err(|error| anyhow!(error))?;
        let (public, internal) = listeners(&config).await?;
        // Port 0 lets the system choose; links need to know.
        config.listen = public.local_addr()?;
        ensure!(
            config.links_lead_somewhere(),
            "the socket handed over listens on {}, which links can't carry: set public_url to the origin that clients reach the server by",
            config.listen
        );
        let services = open(&config, clock).await?;
        let connections = api::serve::connections_by_descriptors();
        if connections < config.server.max_connections {
            tracing::warn!(
                connections,
                "the limit on open files is low: so many connections at one time, not server.max_connections; raise it (LimitNOFILE=, ulimit -n)"
            );
            config.server.max_connections = connections;
        }

        let draining = Arc::new(AtomicBool::new(false));
        let stop = CancellationToken::new();
        let context = Context {
            services: services.clone(),
            upstream,
            patience: config.server.patience(),
        };
        let operations = Operations {
            services: services.clone(),
            draining: Arc::clone(&draining),
            metrics,
        };
        let mut app = Self {
            public: config.listen,
            internal: internal.local_addr()?,
            draining,
            stop: stop.clone(),
            servers: JoinSet::new(),
            background: JoinSet::new(),
            _lock: lock,
            services: services.clone(),
        };
        if let Some(tls) = &tls {
            app.background.spawn(Arc::clone(tls).reload_in_background());
        }
        for (listener, router, tls) in [
            (public, api::public(context).into_router(), tls),
            (internal, api::internal(operations), None),
        ] {
            let (settings, stop) = (config.server.clone(), stop.clone());
            app.servers
                .spawn(async move { api::serve::serve(listener, router, &settings, tls, stop).await });
        }
        let (verifier, scrubber) = (services.clone(), services.clone());
        let (papers, issuers) = (services.clone(), services.clone());
        allocator::keep_what_passes();
        app.background
            .spawn(allocator::give_back_in_background(services.clone()));
        app.background
            .spawn(async move { papers.refresh_papers_in_background().await });
        app.background
            .spawn(async move { verifier.verify_in_background().await });
        app.background
            .spawn(async move { scrubber.scrub_in_background().await });
        app.background.spawn(async move {
            issuers.papers.refresh_key_sets_in_background(&issuers.clock).await;
        });
        app.background
            .spawn(async move { services.clean_in_background().await });
        app.announce(&config);
        Ok(app)
    }

    fn announce(&self, config: &Config) {
        let public_url = self.services.papers.public_url();
        let database = if config.database.is_embedded() {
            "SQLite"
        } else {
            "Postgres"
        };
        let store = if config.storage.url.is_empty() {
            "disk"
        } else {
            &config.storage.url
        };
        tracing::info!(database, store, data_dir = %config.data_dir.display(), "metadata and bytes lie here");
        tracing::info!(listen = %self.public, internal_listen = %self.internal, public_url, "serving; links begin with the public URL");
        let program = std::env::args().next().unwrap_or_else(|| "wharfinger".to_owned());
        tracing::info!(
            "try it: eval \"$({program} env --repository octo/demo --run-id 1 --job-id build)\" and run a client"
        );
        if !self.public.ip().is_loopback() && public_url.starts_with("http://") {
            tracing::warn!(listen = %self.public, "tokens and bytes travel unencrypted: set [tls], or put a proxy with TLS in front and set public_url to its https:// address");
        }
    }

    /// From now on not ready: load balancers send new traffic elsewhere. What comes is served all the same.
    pub fn begin_drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Accepts nothing more, lets requests under way end, and stops.
    pub async fn stop(mut self) {
        self.begin_drain();
        self.stop.cancel();
        while self.servers.join_next().await.is_some() {}
        // Background work may be cut anywhere: what it was doing is done again by the next to come.
        self.background.shutdown().await;
        self.services.db.close().await;
    }
}

/// The public and the internal listener: sockets handed over by systemd, in this order, or bound here.
async fn listeners(config: &Config) -> anyhow::Result<(TcpListener, TcpListener)> {
    let mut handed_over = ListenFd::from_env();
    let mut listener = async |index, key, address: SocketAddr| {
        if let Some(socket) = handed_over
            .take_tcp_listener(index)
            .with_context(|| format!("the socket handed over for {key} is unusable"))?
        {
            socket.set_nonblocking(true)?;
            return anyhow::Ok(TcpListener::from_std(socket)?);
        }
        TcpListener::bind(address).await.with_context(|| {
            format!("cannot listen on {address}: is another server running there? Set {key} to a free address")
        })
    };
    Ok((
        listener(0, "listen", config.listen).await?,
        listener(1, "internal_listen", config.internal_listen).await?,
    ))
}

/// `wharfinger serve`: until a signal says stop.
///
/// # Errors
/// One sentence that says what to do.
pub async fn serve(config: Config) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let metrics = telemetry::install()?;
    let app = App::start(&config, Clock::System, Some(metrics.clone())).await?;
    let upkeep = tokio::spawn(telemetry::upkeep(metrics));
    next_signal(&mut terminate, &mut interrupt).await;
    let settings = &config.server;
    tracing::info!(drain_delay = ?settings.drain_delay, drain_timeout = ?settings.drain_timeout, "stopping; a second signal stops at once");
    app.begin_drain();
    let outcome = tokio::select! {
        () = async { tokio::time::sleep(settings.drain_delay).await; app.stop().await } => Ok(()),
        () = next_signal(&mut terminate, &mut interrupt) => Err(anyhow!("stopped before requests under way had ended")),
    };
    upkeep.abort();
    tracing::info!("stopped");
    outcome
}

async fn next_signal(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// `wharfinger clean`: one pass of the cleaner.
///
/// # Errors
/// One sentence that says what to do.
pub async fn clean(config: Config) -> anyhow::Result<()> {
    let services = open(&config, Clock::System).await?;
    let report = services.clean().await?;
    services.db.close().await;
    match report {
        Some(report) => {
            tracing::info!(
                expired_artifacts = report.expired_artifacts,
                abandoned_uploads = report.abandoned_uploads,
                evicted_cache_entries = report.evicted_cache_entries,
                deleted_objects = report.deleted_objects,
                dropped_blobs = report.dropped_blobs,
                "cleaned"
            );
            if report.put_off > 0 {
                bail!("{} things could not be deleted: the log says why", report.put_off);
            }
            Ok(())
        }
        None => bail!("another process is cleaning, or the clocks disagree; try again later"),
    }
}

/// `wharfinger fsck`: checks that database and store agree, and tells each problem as it is found.
///
/// # Errors
/// One sentence that says what to do, if they can't be asked.
pub async fn fsck(
    config: Config,
    options: fsck::Options,
    tell: &mut (dyn FnMut(&fsck::Problem) + Send),
) -> anyhow::Result<fsck::Summary> {
    let services = open(&config, Clock::System).await?;
    let summary = services.fsck(options, tell).await;
    services.db.close().await;
    Ok(summary?)
}

/// `wharfinger migrate`: brings the schema up to date and ends.
///
/// # Errors
/// One sentence that says what to do.
pub async fn migrate(config: Config) -> anyhow::Result<()> {
    if config.uses_data_dir() {
        prepare_data_dir(&config.data_dir)?;
    }
    connect(&config).await?.close().await;
    tracing::info!("the schema is up to date");
    Ok(())
}
