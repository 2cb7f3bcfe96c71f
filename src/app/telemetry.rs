//! The metrics recorder, and what each metric means.
//!
//! Called by `app::serve`. The floors record by name wherever something happens; every name is described here, and
//! the counters of rare events begin at 0 so that an alert on them has something to look at.

use std::time::Duration;

use metrics::{describe_counter, describe_gauge, describe_histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

use crate::storage::KINDS_OF_DAMAGE;

/// Upper bounds of the request duration histogram, in seconds: from a list of names to an hour's upload.
const DURATION_BUCKETS: [f64; 12] = [0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 600.0, 3600.0];
/// How often the recorder folds what it has gathered.
const UPKEEP: Duration = Duration::from_secs(5);

const COUNTERS: [(&str, &str); 15] = [
    (
        "wharfinger_http_requests_total",
        "Requests that ended, by route and status; 499 is a client that went away",
    ),
    ("wharfinger_http_received_bytes_total", "Bytes of request bodies"),
    ("wharfinger_http_sent_bytes_total", "Bytes of reply bodies"),
    (
        "wharfinger_verification_failed_total",
        "Uploads whose content is not what their client hashed",
    ),
    (
        "wharfinger_storage_damage_total",
        "Reads that found stored bytes missing, short or changed",
    ),
    (
        "wharfinger_lost_artifacts_total",
        "Artifacts and cache entries that the scrub found damaged and took out",
    ),
    (
        "wharfinger_memory_refused_total",
        "Uploads and downloads put off because the memory for them was taken",
    ),
    ("wharfinger_cleaner_passes_total", "Passes of the cleaner that ended"),
    (
        "wharfinger_cleaner_expired_artifacts_total",
        "Artifacts whose time was up",
    ),
    (
        "wharfinger_cleaner_abandoned_uploads_total",
        "Uploads given up because nobody finalized them",
    ),
    (
        "wharfinger_cleaner_evicted_cache_entries_total",
        "Cache entries that nobody used, or that made room for others",
    ),
    (
        "wharfinger_cleaner_deleted_objects_total",
        "Objects taken out of the store",
    ),
    (
        "wharfinger_cleaner_dropped_blobs_total",
        "Tombstones that were forgotten",
    ),
    (
        "wharfinger_cleaner_failures_total",
        "Passes of the cleaner that an error ended, or that could not delete something",
    ),
    (
        "wharfinger_key_set_failures_total",
        "Times that an issuer's public keys could not be fetched or read; those from before stay for a day",
    ),
];
/// Those without labels, which can begin at 0.
const FROM_ZERO: [&str; 10] = [
    "wharfinger_lost_artifacts_total",
    "wharfinger_verification_failed_total",
    "wharfinger_cleaner_passes_total",
    "wharfinger_cleaner_expired_artifacts_total",
    "wharfinger_cleaner_abandoned_uploads_total",
    "wharfinger_cleaner_evicted_cache_entries_total",
    "wharfinger_cleaner_deleted_objects_total",
    "wharfinger_cleaner_dropped_blobs_total",
    "wharfinger_cleaner_failures_total",
    "wharfinger_key_set_failures_total",
];

/// Installs the process's recorder; `/metrics` renders the handle.
pub fn install() -> Result<PrometheusHandle, BuildError> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("duration_seconds".to_owned()), &DURATION_BUCKETS)?
        .install_recorder()?;
    for (name, meaning) in COUNTERS {
        describe_counter!(name, meaning);
    }
    describe_histogram!(
        "wharfinger_http_request_duration_seconds",
        "From a request's head to the end of its reply"
    );
    describe_gauge!("wharfinger_http_requests_in_flight", "Requests under way, by route");
    describe_gauge!(
        "wharfinger_uploads_in_flight",
        "Blocks, block lists and blobs that are coming in"
    );
    describe_gauge!("wharfinger_blobs", "Blobs in the database, by state");
    describe_gauge!(
        "wharfinger_verification_pending",
        "Finalized blobs whose content is still to be hashed"
    );
    for name in FROM_ZERO {
        metrics::counter!(name).absolute(0);
    }
    for kind in KINDS_OF_DAMAGE {
        metrics::counter!("wharfinger_storage_damage_total", "kind" => kind).absolute(0);
    }
    Ok(handle)
}

/// Keeps the recorder small, for ever.
pub async fn upkeep(handle: PrometheusHandle) {
    loop {
        tokio::time::sleep(UPKEEP).await;
        handle.run_upkeep();
    }
}
