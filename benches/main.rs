//! The benchmark of `make bench`: Wharfinger beside its peers and beside bare limits, in the same run.
//!
//! Servers take turns within each round, so that whatever else the machine does hits all of them. Each gets a fresh
//! process on fresh data for each scenario. docs/performance.md says what is measured and how to read it.

mod floors;
mod goals;
mod load;
mod machine;
mod peers;
mod process;
mod report;
mod scale;
mod scenarios;

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum as _};

use crate::peers::Kind;
use crate::report::{Cell, Report};
use crate::scenarios::{Plan, Scenario};

/// After so many failures of a server in a scenario it is not tried again.
const MAX_FAILURES: usize = 2;

/// Compares Wharfinger with its peers and prints Markdown.
#[derive(Parser)]
struct Arguments {
    /// How often everything is done; medians need five
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Only these scenarios
    #[arg(long, value_delimiter = ',')]
    only: Vec<Scenario>,
    /// Only these servers, by their names or the beginnings of them
    #[arg(long, value_delimiter = ',')]
    servers: Vec<String>,
    /// The large artifact, in MiB
    #[arg(long, default_value_t = 1024)]
    size_mib: usize,
    /// The real client's file, in MiB
    #[arg(long, default_value_t = 512)]
    client_mib: usize,
    /// Small artifacts
    #[arg(long, default_value_t = 1000)]
    artifacts: usize,
    /// Seconds for which each kind of call is repeated
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Artifacts in the database of the scenario `scale`
    #[arg(long, default_value_t = 1_000_000)]
    rows: u32,
    /// Where the servers keep their data
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    directory: PathBuf,
    /// Also write the report to this file
    #[arg(long)]
    out: Option<PathBuf>,
    /// What cargo says to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let words: Vec<_> = std::env::args().collect();
    if let [_, command, address, directory @ ..] = &words[..]
        && command == "floor"
    {
        return floors::serve(address.parse()?, directory.first().map(Path::new));
    }
    let arguments = Arguments::parse();
    let chosen = |kind: &Kind| {
        let names = &arguments.servers;
        names.is_empty() || names.iter().any(|name| kind.name().starts_with(name.as_str()))
    };
    let kinds: Vec<_> = Kind::ALL.into_iter().filter(chosen).collect();
    ensure!(
        !kinds.is_empty(),
        "no server has such a name: {:?}",
        Kind::ALL.map(Kind::name)
    );
    let only = |scenario: &&Scenario| arguments.only.is_empty() || arguments.only.contains(scenario);
    let scenarios: Vec<_> = Scenario::value_variants().iter().filter(only).copied().collect();

    let directory = tempfile::Builder::new()
        .prefix("wharfinger-bench.")
        .tempdir_in(&arguments.directory)?;
    // Postgres runs as somebody else and has to pass.
    fs::set_permissions(&directory, std::os::unix::fs::PermissionsExt::from_mode(0o711))?;
    end_on_signals(directory.path().to_owned())?;
    let mut facts = machine::describe(directory.path());
    for kind in &kinds {
        facts.push(format!("{}: {}", kind.name(), kind.describe()?));
    }
    let plan = Plan::new(
        arguments.size_mib,
        arguments.client_mib,
        arguments.artifacts,
        Duration::from_secs_f64(arguments.seconds),
        arguments.rows,
    );
    let names: Vec<_> = kinds.iter().map(|kind| kind.name()).collect();
    let mut last = String::new();
    measure(
        &kinds,
        &scenarios,
        arguments.rounds,
        directory.path(),
        &plan,
        |report, rounds| {
            last = markdown(&facts, &names, report, rounds, arguments.size_mib);
            // After every round, so that a run that is cut short was not for nothing.
            arguments.out.as_ref().map_or(Ok(()), |path| fs::write(path, &last))
        },
    )?;
    writeln!(io::stdout().lock(), "{last}")?;
    Ok(())
}

fn markdown(facts: &[String], names: &[&'static str], report: &Report, rounds: usize, size_mib: usize) -> String {
    let facts: String = facts.iter().map(|fact| format!("- {fact}\n")).collect();
    format!(
        "{facts}\nRounds: {rounds}; the large artifact has {size_mib} MiB. Medians with [least..most]; ratios are medians of the \
         rounds' own.\n\n### Goals\n\n{}{}{}",
        goals::table(report),
        report.tables(names),
        report.failures(),
    )
}

/// Does everything, and hands over what there is after each round.
fn measure(
    kinds: &[Kind],
    scenarios: &[Scenario],
    rounds: usize,
    directory: &Path,
    plan: &Plan,
    mut after_round: impl FnMut(&Report, usize) -> io::Result<()>,
) -> Result<()> {
    let mut report = Report::default();
    let mut started = 0;
    let mut failed: Vec<(Scenario, Kind)> = Vec::new();
    let begun = Instant::now();
    for round in 0..rounds {
        // Nobody always comes first.
        let mut kinds = kinds.to_vec();
        let turn = round % kinds.len();
        kinds.rotate_left(turn);
        for scenario in scenarios {
            for kind in kinds.iter().filter(|kind| scenario.suits(**kind)) {
                if failed.iter().filter(|pair| **pair == (*scenario, *kind)).count() >= MAX_FAILURES {
                    continue;
                }
                let at = format!("round {}, {scenario:?}, {}", round + 1, kind.name());
                writeln!(io::stderr().lock(), "{:5.0} s: {at}", begun.elapsed().as_secs_f64())?;
                let own = directory.join(format!("server-{started}"));
                started += 1;
                fs::create_dir(&own)?;
                let mut cell = Cell {
                    report: &mut report,
                    round,
                    server: kind.name(),
                };
                let ended = kind
                    .start(*scenario, &own)
                    .and_then(|server| scenario.run(&*server, &own, plan, &mut cell));
                if let Err(error) = ended {
                    let error = format!("{error:#}").replace('\n', " ");
                    let failure = format!("{at} failed: {}", error.chars().take(240).collect::<String>());
                    writeln!(io::stderr().lock(), "{failure}")?;
                    report.failures.push(failure);
                    failed.push((*scenario, *kind));
                }
                // The next one shall not pay for what this one left: neither for writing it back nor, on ext4 without a
                // journal, for passing over each inode that was deleted within the last minutes.
                empty_files(&own)?;
                rustix::fs::sync();
            }
        }
        after_round(&report, round + 1)?;
    }
    Ok(())
}

/// Gives back the space of all files, and keeps the files.
fn empty_files(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            empty_files(&entry.path())?;
        } else if kind.is_file()
            && let Err(error) = File::options().write(true).truncate(true).open(entry.path())
        {
            writeln!(io::stderr().lock(), "{} stays full: {error}", entry.path().display())?;
        }
    }
    Ok(())
}

/// On a signal to stop, the servers end too, and their data goes.
fn end_on_signals(directory: PathBuf) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::spawn(move || {
        let came = runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let mut terminate = signal(SignalKind::terminate())?;
            tokio::select! {
                interrupted = tokio::signal::ctrl_c() => interrupted,
                _ = terminate.recv() => Ok(()),
            }
        });
        if came.is_ok() {
            process::kill_all();
            let _ = fs::remove_dir_all(&directory);
            std::process::exit(130);
        }
    });
    Ok(())
}
