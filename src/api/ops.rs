//! Health, readiness and metrics, on the internal listener; and on the public one, who answers there.
//!
//! Served by `app`; only operators and orchestrators reach the internal address. Health never asks the database, so
//! that an outage of it does not restart every replica.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::{Value, json};

use crate::error::Result;
use crate::service::Services;

/// A part that does not answer within this is not ready.
const PATIENCE: Duration = Duration::from_secs(5);
/// Counting reads every blob's row, so not every look at the metrics does it.
const COUNT_EVERY_MS: i64 = 5 * 60 * 1000;

/// What the internal listener answers from.
#[derive(Clone)]
pub struct Operations {
    pub services: Services,
    /// Set once the server is told to stop: it still serves, but wants no new traffic.
    pub draining: Arc<AtomicBool>,
    /// Absent where a test runs several servers in one process.
    pub metrics: Option<PrometheusHandle>,
}

/// `GET /api/v1/version`: how `wharfinger doctor` and the runner's preload know that they reached a Wharfinger.
pub async fn version() -> Json<Value> {
    Json(json!({ "name": env!("CARGO_PKG_NAME"), "version": env!("CARGO_PKG_VERSION") }))
}

pub async fn healthz() -> &'static str {
    "ok\n"
}

pub async fn readyz(State(operations): State<Operations>) -> (StatusCode, Json<Value>) {
    let services = &operations.services;
    let database = async {
        services.db.ping().await?;
        services.clock_is_off_by().await
    };
    let (database, store) = tokio::join!(answer(database), answer(services.store.check()));
    let mut reasons = Vec::new();
    if operations.draining.load(Ordering::Relaxed) {
        reasons.push("the server is stopping".to_owned());
    }
    match database {
        Ok(None) => {}
        Ok(Some(skew_ms)) => {
            let (seconds, way) = (skew_ms.abs() / 1000, if skew_ms > 0 { "ahead of" } else { "behind" });
            reasons.push(format!("the clock is {seconds} s {way} the database's"));
        }
        Err(error) => reasons.push(format!("database: {error}")),
    }
    reasons.extend(store.err().map(|error| format!("store: {error}")));
    let status = if reasons.is_empty() {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, Json(json!({ "ready": reasons.is_empty(), "reasons": reasons })))
}

async fn answer<T>(asking: impl Future<Output = Result<T>>) -> std::result::Result<T, String> {
    match tokio::time::timeout(PATIENCE, asking).await {
        Ok(answer) => answer.map_err(|error| error.to_string()),
        Err(_) => Err("no answer".to_owned()),
    }
}

pub async fn metrics(State(operations): State<Operations>) -> (StatusCode, String) {
    let Some(handle) = &operations.metrics else {
        return (StatusCode::NOT_FOUND, "metrics are off\n".to_owned());
    };
    if let Err(error) = count_rows(&operations.services).await {
        // The other figures are still true, and this is when they are looked at.
        tracing::warn!(%error, "metrics without the database's figures");
    }
    (StatusCode::OK, handle.render())
}

/// Sets the gauges that the database knows.
async fn count_rows(services: &Services) -> Result<()> {
    /// Beside the recorder, of which a process has one too.
    static NEXT_COUNT_MS: AtomicI64 = AtomicI64::new(0);
    let pending = services.db.pending_verifications().await?;
    metrics::gauge!("wharfinger_verification_pending").set(pending as f64);
    let now_ms = services.clock.now_ms();
    if now_ms >= NEXT_COUNT_MS.load(Ordering::Relaxed) {
        let blobs = services.db.blob_counts().await?;
        for state in ["staging", "committed", "sealed", "deleting"] {
            let count = blobs
                .iter()
                .find(|(name, _)| name == state)
                .map_or(0, |(_, count)| *count);
            metrics::gauge!("wharfinger_blobs", "state" => state).set(count as f64);
        }
        NEXT_COUNT_MS.store(now_ms + COUNT_EVERY_MS, Ordering::Relaxed);
    }
    Ok(())
}
