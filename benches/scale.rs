//! Does it stay as quick with a million artifacts, and while ten thousand of them expire?
//!
//! The rows are copies, written straight into Wharfinger's SQLite: a million uploads would take longer than all the rest.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use sqlx::Connection as _;

use crate::load::{Client, Until, in_parallel};
use crate::peers::{RUNS, Server};
use crate::report::Cell;
use crate::scenarios::{Plan, calls, fill};

const EXPIRED: u32 = 10_000;
const CLEANER_PATIENCE: Duration = Duration::from_secs(120);

/// Copies of one artifact, its blob and its block under other names, a thousand for each run.
const COPIES: [&str; 3] = [
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)
     INSERT INTO blobs (id, kind, state, revision, size_bytes, content_type, sha256, verification,
         verify_lease_until_ms, created_at_ms, changed_at_ms, cleaned_at_ms, scrubbed_at_ms)
     SELECT unhex(printf('%032x', i)), kind, state, revision, size_bytes, content_type, sha256, verification,
         verify_lease_until_ms, created_at_ms, changed_at_ms, changed_at_ms, changed_at_ms
     FROM n, (SELECT * FROM blobs WHERE state = 'sealed' LIMIT 1)",
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)
     INSERT INTO blocks (blob_id, block_id, object_key, size_bytes, crc64, start_offset)
     SELECT unhex(printf('%032x', i)), 'QQ==', printf('blobs/%032x/0', i), 1, 0, 0 FROM n",
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)
     INSERT INTO artifacts (issuer, repository, run_backend_id, name, run_attempt, job_backend_id, repository_name,
         run_id, version, mime_type, state, blob_id, created_at_ms, finalized_at_ms, expires_at_ms)
     SELECT issuer, repository, printf('copy-%d', i / 1000), printf('artifact-%d', i), run_attempt, job_backend_id,
         repository_name, run_id, version, mime_type, state, unhex(printf('%032x', i)), created_at_ms,
         finalized_at_ms, expires_at_ms
     FROM n, (SELECT * FROM artifacts WHERE state = 'finalized' LIMIT 1)",
];
const EXPIRE: &str = "UPDATE artifacts SET expires_at_ms = created_at_ms
    WHERE run_backend_id LIKE 'copy-%' AND id IN (SELECT id FROM artifacts WHERE run_backend_id LIKE 'copy-%' LIMIT ?)";

pub fn run(server: &dyn Server, directory: &Path, plan: &Plan, cell: &mut Cell) -> Result<()> {
    fill(server, RUNS[2], 1000, &plan.tiny)?;
    both(server, plan, "1,000", cell)?;
    let database = directory.join("data/wharfinger.db");
    let rows = plan.rows;
    with_database(&database, &COPIES.map(|sql| (sql, rows)))?;
    both(server, plan, &format!("{rows}"), cell)?;

    let step = format!("Cleaner: {EXPIRED} expired of {rows}");
    let find =
        |client: &mut Client, number: usize| server.find(client, RUNS[2], &format!("artifact-{}", number % 1000));
    let quiet = in_parallel(&server.origin(), 2, Until::Passed(plan.calls_for), find)?;
    with_database(&database, &[(EXPIRE, EXPIRED)])?;
    let (begun, done) = (Instant::now(), AtomicBool::new(false));
    let (busy, wall) = std::thread::scope(|scope| -> Result<_> {
        let foreground = scope.spawn(|| in_parallel(&server.origin(), 2, Until::Told(&done), find));
        let cleaned = loop {
            match server.expired() {
                Ok(count) if count < u64::from(EXPIRED) && begun.elapsed() < CLEANER_PATIENCE => {
                    std::thread::sleep(Duration::from_millis(50));
                }
                other => break other,
            }
        };
        let wall = begun.elapsed();
        done.store(true, Ordering::Relaxed);
        ensure!(cleaned? >= u64::from(EXPIRED), "the cleaner did not come to an end");
        let foreground = foreground.join().ok().context("the foreground panicked")??;
        Ok((foreground, wall))
    })?;
    cell.add(&step, "s", wall.as_secs_f64());
    cell.add(&step, "list one p99 ms meanwhile", busy.quantile_ms(0.99));
    cell.add(&step, "list one p99 ms before", quiet.quantile_ms(0.99));
    Ok(())
}

fn both(server: &dyn Server, plan: &Plan, rows: &str, cell: &mut Cell) -> Result<()> {
    let name = |number: usize| format!("artifact-{}", number % 1000);
    calls(
        server,
        plan,
        &format!("List one name, {rows} in all"),
        cell,
        |client, number| server.find(client, RUNS[2], &name(number)),
    )?;
    calls(
        server,
        plan,
        &format!("Sign a link, {rows} in all"),
        cell,
        |client, number| server.links(client, RUNS[2], &name(number), 1),
    )?;
    Ok(())
}

/// Runs statements with one number each, in one transaction.
fn with_database(path: &Path, statements: &[(&'static str, u32)]) -> Result<()> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(async {
            let options = sqlx::sqlite::SqliteConnectOptions::new().filename(path);
            let mut connection = sqlx::SqliteConnection::connect_with(&options).await?;
            let mut transaction = connection.begin().await?;
            for (sql, number) in statements {
                sqlx::query(*sql).bind(number).execute(&mut *transaction).await?;
            }
            transaction.commit().await?;
            Ok(())
        })
}
