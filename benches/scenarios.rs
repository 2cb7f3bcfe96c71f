//! What is done to a server, and which figures are taken while it is done.
//!
//! `main` calls [`Scenario::run`] with a fresh server each time. Checking that the right bytes come back is never
//! inside what is measured.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use sha2::{Digest as _, Sha256};

use crate::floors::BLOCK_BYTES;
use crate::load::{Client, Payload, Run, Take, Until, hex, in_parallel};
use crate::peers::{self, Kind, RUNS, Server};
use crate::process::{Meter, Used};
use crate::report::Cell;
use crate::scale;

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;
const BLOCK: usize = BLOCK_BYTES as usize;
/// Up to this size Wharfinger verifies before Finalize answers (`verification.inline_max_bytes`).
const INLINE: usize = 256 * MIB;
/// Connections for calls without bodies.
const CALLERS: usize = 16;
/// Artifacts under way at one time in a whole life.
const LIVES_AT_ONCE: usize = 8;
/// Uploads at one time in a crowd.
const CROWD: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Scenario {
    /// One large artifact, its blocks 1, 5 and 10 at once
    Ingest,
    /// A large artifact, once and eight times at once
    Download,
    /// Small artifacts: create, upload, list, finalize, find, sign, download
    Life,
    /// Calls without bodies
    Metadata,
    /// Block lists of 128 blocks, and Finalize with the hash verified before the answer
    Commit,
    /// 64 uploads at once
    Crowd,
    /// The same calls with a thousand and with a million artifacts, and the cleaner among them
    Scale,
    /// @actions/artifact 6.2.1 itself
    Client,
}

/// How much of everything.
pub struct Plan {
    pub large: Payload,
    pub small: Payload,
    /// Of 16 MiB, in two blocks.
    pub crowd: Payload,
    /// Of 40 MiB, in five blocks.
    pub wide_crowd: Payload,
    pub inline: Payload,
    /// 128 blocks of 1 KiB.
    pub listed: Payload,
    /// One byte.
    pub tiny: Payload,
    pub client: Payload,
    pub lives: usize,
    /// How long each kind of call is repeated.
    pub calls_for: Duration,
    pub rows: u32,
}

impl Plan {
    pub fn new(size_mib: usize, client_mib: usize, lives: usize, calls_for: Duration, rows: u32) -> Self {
        Self {
            large: Payload::new(size_mib * MIB, BLOCK),
            small: Payload::new(64 * KIB, BLOCK),
            crowd: Payload::new(2 * BLOCK, BLOCK),
            wide_crowd: Payload::new(5 * BLOCK, BLOCK),
            inline: Payload::new(INLINE, BLOCK),
            listed: Payload::new(128 * KIB, KIB),
            tiny: Payload::new(1, 1),
            client: Payload::new(client_mib * MIB, BLOCK),
            lives,
            calls_for,
            rows,
        }
    }
}

impl Scenario {
    /// Is there something to compare?
    pub fn suits(self, kind: Kind) -> bool {
        use Kind::{
            Act, Azurite, FloorDiscard, FloorWrite, Nginx, WharfingerFull, WharfingerProcess, WharfingerS3,
            WharfingerTls,
        };
        match self {
            Self::Ingest => true,
            Self::Download => !matches!(kind, FloorDiscard | FloorWrite | WharfingerFull),
            Self::Life => !matches!(kind, FloorDiscard | FloorWrite | WharfingerTls),
            Self::Metadata => matches!(
                kind,
                WharfingerProcess | WharfingerFull | WharfingerS3 | Act | FloorDiscard
            ),
            Self::Commit => matches!(kind, WharfingerProcess | WharfingerFull | WharfingerS3),
            Self::Crowd => matches!(kind, WharfingerProcess | WharfingerFull | Nginx | Act | Azurite),
            Self::Scale => kind == WharfingerProcess,
            Self::Client => matches!(
                kind,
                WharfingerProcess | WharfingerFull | WharfingerS3 | Act | FloorDiscard
            ),
        }
    }

    /// Runs the scenario on a server that was just started in `directory`.
    pub fn run(self, server: &dyn Server, directory: &Path, plan: &Plan, cell: &mut Cell) -> Result<()> {
        match self {
            Self::Ingest => ingest(server, plan, cell),
            Self::Download => download(server, plan, cell),
            Self::Life => life(server, plan, cell),
            Self::Metadata => metadata(server, plan, cell),
            Self::Commit => commit(server, plan, cell),
            Self::Crowd => crowd(server, plan, cell),
            Self::Scale => scale::run(server, directory, plan, cell),
            Self::Client => client(server, directory, plan, cell),
        }
    }
}

fn mib(bytes: f64) -> f64 {
    bytes / MIB as f64
}

fn per_gib(amount: f64, bytes: usize) -> f64 {
    amount / (bytes as f64 / (1024 * MIB) as f64)
}

fn add_memory(cell: &mut Cell, step: &str, used: &Used) {
    cell.add(step, "anon MiB", mib(used.anon_bytes));
    cell.add(step, "resident peak MiB", mib(used.resident_peak_bytes));
}

/// The SHA-256 of what the targets give, in their order.
fn fetch(client: &mut Client, targets: &[String]) -> Result<String> {
    let mut hasher = Sha256::new();
    for target in targets {
        client.get(target, &mut Take::Hash(&mut hasher))?;
    }
    Ok(hex(hasher))
}

/// Does the artifact come back as it was sent? A download that fails is as wrong as one with other bytes.
fn is_right(server: &dyn Server, name: &str, payload: &Payload) -> bool {
    let mut client = Client::new(server.origin());
    let links = server.links(&mut client, RUNS[0], name, payload.blocks());
    links
        .and_then(|links| fetch(&mut client, &links))
        .is_ok_and(|sha256| sha256 == payload.sha256)
}

fn ingest(server: &dyn Server, plan: &Plan, cell: &mut Cell) -> Result<()> {
    let payload = &plan.large;
    for at_once in [1, 5, 10] {
        let (step, name) = (format!("Ingest, {at_once} at once"), format!("ingest-{at_once}"));
        let mut client = Client::new(server.origin());
        let meter = Meter::start(server.pids());
        let begun = Instant::now();
        let target = server.begin(&mut client, RUNS[0], &name)?;
        let blocks = in_parallel(
            &server.origin(),
            at_once,
            Until::Count(payload.blocks()),
            |client, index| server.put_block(client, &target, index, payload.block(index)),
        )?;
        server.commit(&mut client, &target, &blocks.results)?;
        let stored_cpu_s = meter.cpu_s();
        server.finalize(&mut client, RUNS[0], &name, payload)?;
        let wall = begun.elapsed();
        server.settle()?;
        let used = meter.stop();
        cell.add(&step, "MiB/s", mib(payload.size_bytes as f64) / wall.as_secs_f64());
        cell.add(&step, "CPU-s/GiB", per_gib(used.cpu_s, payload.size_bytes));
        cell.add(&step, "unverified CPU-s/GiB", per_gib(stored_cpu_s, payload.size_bytes));
        cell.add(&step, "block p50 ms", blocks.quantile_ms(0.5));
        cell.add(&step, "block p99 ms", blocks.quantile_ms(0.99));
        cell.add(&step, "written/byte", used.written_bytes / payload.size_bytes as f64);
        add_memory(cell, &step, &used);
        // The floors keep nothing to give back.
        if !cell.server.starts_with("floor") && !is_right(server, &name, payload) {
            cell.corrupt(&step);
        }
    }
    Ok(())
}

fn download(server: &dyn Server, plan: &Plan, cell: &mut Cell) -> Result<()> {
    let payload = &plan.large;
    let links = server.seed("download", payload)?;
    server.settle()?;
    let right = fetch(&mut Client::new(server.origin()), &links)? == payload.sha256;
    for at_once in [1, 8] {
        let step = format!("Download, {at_once} at once");
        if !right {
            cell.corrupt(&step);
        }
        let meter = Meter::start(server.pids());
        let run = in_parallel(&server.origin(), at_once, Until::Count(at_once), |client, _| {
            let sizes = links.iter().map(|link| client.get(link, &mut Take::Drop));
            Ok(sizes.sum::<Result<u64>>()? as usize)
        })?;
        let used = meter.stop();
        let bytes = run.results.iter().sum::<usize>();
        cell.add(&step, "MiB/s", mib(bytes as f64) / run.wall.as_secs_f64());
        cell.add(&step, "CPU-s/GiB", per_gib(used.cpu_s, bytes));
        add_memory(cell, &step, &used);
    }
    Ok(())
}

fn live(server: &dyn Server, client: &mut Client, name: &str, payload: &Payload) -> Result<bool> {
    let target = server.begin(client, RUNS[0], name)?;
    let block = server.put_block(client, &target, 0, payload.block(0))?;
    server.commit(client, &target, &[block])?;
    server.finalize(client, RUNS[0], name, payload)?;
    server.find(client, RUNS[0], name)?;
    let links = server.links(client, RUNS[0], name, 1)?;
    Ok(fetch(client, &links)? == payload.sha256)
}

fn life(server: &dyn Server, plan: &Plan, cell: &mut Cell) -> Result<()> {
    let step = "64 KiB artifacts, whole life";
    // SeaweedFS makes its volumes at the first writes, which takes it seconds.
    in_parallel(
        &server.origin(),
        LIVES_AT_ONCE,
        Until::Count(LIVES_AT_ONCE),
        |client, number| live(server, client, &format!("warm-up-{number}"), &plan.small),
    )?;
    server.settle()?;
    let meter = Meter::start(server.pids());
    let run = in_parallel(
        &server.origin(),
        LIVES_AT_ONCE,
        Until::Count(plan.lives),
        |client, number| live(server, client, &format!("life-{number}"), &plan.small),
    )?;
    server.settle()?;
    let used = meter.stop();
    let count = run.results.len() as f64;
    cell.add(step, "artifacts/s", count / run.wall.as_secs_f64());
    cell.add(step, "p50 ms", run.quantile_ms(0.5));
    cell.add(step, "p99 ms", run.quantile_ms(0.99));
    cell.add(step, "CPU ms each", used.cpu_s * 1e3 / count);
    cell.add(
        step,
        "written/byte",
        used.written_bytes / (count * plan.small.size_bytes as f64),
    );
    add_memory(cell, step, &used);
    if run.results.contains(&false) {
        cell.corrupt(step);
    }
    Ok(())
}

/// Fills a run with artifacts of one byte.
pub fn fill(server: &dyn Server, run: &str, count: usize, payload: &Payload) -> Result<()> {
    in_parallel(
        &server.origin(),
        LIVES_AT_ONCE,
        Until::Count(count),
        |client, number| {
            let name = format!("artifact-{number}");
            let target = server.begin(client, run, &name)?;
            let block = server.put_block(client, &target, 0, payload.block(0))?;
            server.commit(client, &target, &[block])?;
            server.finalize(client, run, &name, payload)
        },
    )?;
    server.settle()
}

/// Repeats a call for some time on 16 connections.
pub fn calls<T: Send>(
    server: &dyn Server,
    plan: &Plan,
    step: &str,
    cell: &mut Cell,
    call: impl Fn(&mut Client, usize) -> Result<T> + Sync,
) -> Result<Run<T>> {
    let meter = Meter::start(server.pids());
    let run = in_parallel(&server.origin(), CALLERS, Until::Passed(plan.calls_for), call)?;
    let used = meter.stop();
    let count = run.results.len() as f64;
    cell.add(step, "calls/s", count / run.wall.as_secs_f64());
    cell.add(step, "p50 ms", run.quantile_ms(0.5));
    cell.add(step, "p99 ms", run.quantile_ms(0.99));
    cell.add(step, "CPU µs each", used.cpu_s * 1e6 / count);
    Ok(run)
}

fn metadata(server: &dyn Server, plan: &Plan, cell: &mut Cell) -> Result<()> {
    fill(server, RUNS[1], 10, &plan.tiny)?;
    fill(server, RUNS[2], 1000, &plan.tiny)?;
    let name = |number: usize| format!("artifact-{}", number % 1000);
    calls(server, plan, "Sign a link", cell, |client, number| {
        server.links(client, RUNS[2], &name(number), 1)
    })?;
    calls(server, plan, "List one name of 1,000", cell, |client, number| {
        server.find(client, RUNS[2], &name(number))
    })?;
    for (run, step) in [(RUNS[1], "List a run of 10"), (RUNS[2], "List a run of 1,000")] {
        let listed = calls(server, plan, step, cell, |client, _| server.list(client, run))?;
        let is_floor = cell.server.starts_with("floor");
        ensure!(
            is_floor || listed.results.iter().all(|count| count.to_string() == run),
            "{step}: a list is short"
        );
    }
    calls(server, plan, "Create", cell, |client, number| {
        server.begin(client, RUNS[0], &format!("new-{number}"))
    })?;
    Ok(())
}

fn commit(server: &dyn Server, plan: &Plan, cell: &mut Cell) -> Result<()> {
    let (payload, step) = (&plan.listed, "Put Block List of 128 blocks");
    let mut client = Client::new(server.origin());
    let mut took = Vec::new();
    for number in 0..30 {
        let target = server.begin(&mut client, RUNS[0], &format!("listed-{number}"))?;
        let blocks = in_parallel(&server.origin(), 5, Until::Count(payload.blocks()), |client, index| {
            server.put_block(client, &target, index, payload.block(index))
        })?;
        let begun = Instant::now();
        server.commit(&mut client, &target, &blocks.results)?;
        took.push(begun.elapsed());
    }
    took.sort();
    let run = Run {
        wall: Duration::ZERO,
        latencies: took,
        results: Vec::<()>::new(),
    };
    cell.add(step, "p99 ms", run.quantile_ms(0.99));
    cell.add(step, "p50 ms", run.quantile_ms(0.5));

    let payload = &plan.inline;
    let target = server.begin(&mut client, RUNS[0], "inline")?;
    let blocks = in_parallel(&server.origin(), 5, Until::Count(payload.blocks()), |client, index| {
        server.put_block(client, &target, index, payload.block(index))
    })?;
    server.commit(&mut client, &target, &blocks.results)?;
    let begun = Instant::now();
    server.finalize(&mut client, RUNS[0], "inline", payload)?;
    cell.add("Finalize of 256 MiB, hash verified", "s", begun.elapsed().as_secs_f64());
    Ok(())
}

fn crowd(server: &dyn Server, plan: &Plan, cell: &mut Cell) -> Result<()> {
    let idle = Meter::start(server.pids()).stop();
    add_memory(cell, "Idle", &idle);
    for (step, payload, at_once) in [
        ("64 uploads, 1 block at once each", &plan.crowd, 1),
        ("64 uploads, 5 blocks at once each", &plan.wide_crowd, 5),
    ] {
        let meter = Meter::start(server.pids());
        let run = in_parallel(&server.origin(), CROWD, Until::Count(CROWD), |_, number| {
            peers::upload(server, &format!("crowd-{at_once}-{number}"), payload, at_once)
        })?;
        server.settle()?;
        let used = meter.stop();
        let bytes = CROWD * payload.size_bytes;
        cell.add(step, "MiB/s", mib(bytes as f64) / run.wall.as_secs_f64());
        cell.add(step, "CPU-s/GiB", per_gib(used.cpu_s, bytes));
        add_memory(cell, step, &used);
        if !is_right(server, &format!("crowd-{at_once}-0"), payload) {
            cell.corrupt(step);
        }
    }
    Ok(())
}

/// What tests/e2e/transfer.mjs says of a transfer.
#[derive(serde::Deserialize)]
struct Transfer {
    wall_s: f64,
    cpu_s: f64,
}

fn client(server: &dyn Server, directory: &Path, plan: &Plan, cell: &mut Cell) -> Result<()> {
    let payload = &plan.client;
    let source = directory.join("image.tar");
    let mut file = File::create(&source)?;
    for index in 0..payload.blocks() {
        file.write_all(payload.block(index))?;
    }
    let token = server.token().context("has no token for clients")?;
    let transfer = |what: &str, path: &Path| -> Result<Transfer> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let output = Command::new(root.join(".tools/node/bin/node"))
            .arg(root.join("tests/e2e/transfer.mjs"))
            .args([what, "image"])
            .arg(path)
            .env("ACTIONS_RESULTS_URL", format!("{}/", server.origin()))
            .env("ACTIONS_RUNTIME_TOKEN", &token)
            .env("GITHUB_SERVER_URL", "https://github.com")
            .env("GITHUB_WORKSPACE", directory)
            .env("RUNNER_TEMP", directory)
            .stdin(Stdio::null())
            .output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        let result = said.lines().find_map(|line| line.strip_prefix("@@"));
        let result = result.with_context(|| {
            // The status is in the client's log alone, and Node quotes the line that threw before it says why.
            let mut log = said.lines().rev();
            let status = log.find_map(|line| line.strip_prefix("::debug::[Response] - "));
            let complaint = String::from_utf8_lossy(&output.stderr);
            let error = complaint.lines().find(|line| line.contains("Error: "));
            format!(
                "{what}: the last answer was {}; {}",
                status.unwrap_or("none"),
                error.unwrap_or(&complaint)
            )
        })?;
        Ok(serde_json::from_str(result)?)
    };
    for what in ["upload", "download"] {
        // The floor has nothing to give back.
        if what == "download" && cell.server.starts_with("floor") {
            break;
        }
        let step = format!("@actions/artifact 6.2.1, {what}");
        let path = if what == "upload" {
            source.clone()
        } else {
            directory.join("loaded")
        };
        let meter = Meter::start(server.pids());
        let transfer = transfer(what, &path)?;
        server.settle()?;
        let used = meter.stop();
        cell.add(&step, "s", transfer.wall_s);
        cell.add(&step, "MiB/s", mib(payload.size_bytes as f64) / transfer.wall_s);
        cell.add(&step, "client CPU-s", transfer.cpu_s);
        cell.add(&step, "server CPU-s", used.cpu_s);
        add_memory(cell, &step, &used);
        if what == "download" {
            let mut hasher = Sha256::new();
            std::io::copy(&mut File::open(path.join("image.tar"))?, &mut HashWriter(&mut hasher))?;
            if hex(hasher) != payload.sha256 {
                cell.corrupt(&step);
            }
            fs::remove_dir_all(path)?;
        }
    }
    Ok(())
}

/// A hash as something to write to.
struct HashWriter<'a>(&'a mut Sha256);

impl std::io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
