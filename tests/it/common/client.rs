//! The real clients: `tests/e2e/client.mjs` or `cache.mjs` in a Node process of its own, and what it says of each case.

use std::path::Path;
use std::time::Duration;

use serde::Deserialize;

use super::process::{ToItsEnd, node};

/// Each case has a limit of its own; this is for a process that does not keep it.
const PATIENCE: Duration = Duration::from_secs(30 * 60);

/// What became of one case of one client.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Outcome {
    pub client: String,
    pub case: String,
    pub status: Status,
    /// What was shown, why the client can't do it, or what went wrong.
    #[serde(default)]
    pub detail: String,
    pub ms: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Ok,
    /// The client has no such feature.
    Na,
    Fail,
}

/// What a runner tells its job's clients.
#[derive(Clone, Debug)]
pub struct Runner {
    /// The server's origin.
    pub url: String,
    /// `ACTIONS_RUNTIME_TOKEN`.
    pub token: String,
    /// Further variables, such as `WHARFINGER_TEST_BIG_BYTES`.
    pub variables: Vec<(&'static str, String)>,
}

/// Runs cases (`small,tree`, or `all`) of one client (`artifact-6.2.1`, `cache-6.3.0-v2`) and waits for the end of all.
/// The client's own log is shown only when a case fails.
///
/// # Panics
/// If the process ends before it has reported.
pub fn run_client(runner: &Runner, client: &str, cases: &str) -> Vec<Outcome> {
    let directory = tempfile::tempdir().unwrap();
    let script = if client.starts_with("cache-") {
        "tests/e2e/cache.mjs"
    } else if client.starts_with("artifact-1.") {
        "tests/e2e/files.mjs"
    } else {
        "tests/e2e/client.mjs"
    };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join(script);
    let mut command = node();
    command
        .arg(script)
        .args([client, cases])
        .env("ACTIONS_RESULTS_URL", format!("{}/", runner.url))
        .env("ACTIONS_CACHE_URL", format!("{}/", runner.url))
        .env("ACTIONS_RUNTIME_URL", format!("{}/", runner.url))
        .env("ACTIONS_RUNTIME_TOKEN", &runner.token)
        // Every runner's job is of this run.
        .env("GITHUB_RUN_ID", "1")
        .env("GITHUB_SERVER_URL", "https://github.com")
        .env("GITHUB_WORKSPACE", directory.path())
        .env("RUNNER_TEMP", directory.path())
        .envs(runner.variables.iter().map(|(name, value)| (name, value)));
    let output = command.to_its_end(PATIENCE);
    let said = String::from_utf8_lossy(&output.stdout);
    let outcomes: Vec<Outcome> = said
        .lines()
        .filter_map(|line| line.strip_prefix("@@"))
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let log = String::from_utf8_lossy(&output.stderr);
    let told = |what: String| format!("{what}\n{said}\n{log}");
    assert!(
        output.status.success() && !outcomes.is_empty(),
        "{}",
        told(format!("{client} {cases} ended with {}", output.status))
    );
    if outcomes.iter().any(|outcome| outcome.status == Status::Fail) {
        println!("{}", told(format!("{client} {cases} failed")));
    }
    outcomes
}

/// As [`run_client`], for cases that must all succeed.
pub async fn succeed(runner: &Runner, client: &'static str, cases: &'static str) {
    let runner = runner.clone();
    let running = tokio::task::spawn_blocking(move || run_client(&runner, client, cases));
    let outcomes = running.await.unwrap();
    let all_ok = outcomes.iter().all(|outcome| outcome.status == Status::Ok);
    assert!(all_ok, "{outcomes:#?}");
}
