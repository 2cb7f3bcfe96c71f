//! The program: reads the command line and the configuration, starts logging, hands over to the command.

use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::anyhow;
use clap::Parser as _;
use tracing_subscriber::EnvFilter;
use wharfinger::cli::{self, Cli, Command};
use wharfinger::config::{Config, LogFormat, LogSettings};
use wharfinger::failpoint;

/// How long threads that nobody waits for any more may take to end: one may wait for a disk that does not answer.
const LAST_WORK: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    // Wrong usage ends here, with exit code 2.
    let cli = Cli::parse();
    let failure = cli.failure();
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            let sentence = format!("{error:#}").replace('\n', " ");
            // With standard error gone there is nobody left to tell.
            let _ = writeln!(io::stderr().lock(), "wharfinger: {sentence}");
            failure
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let settings = cli.overrides();
    match cli.into_command() {
        Command::OnRunner(command) => run_to_its_end(command.run()),
        Command::OnServer(command) => {
            let loaded = Config::load(&settings, cli::environment()?)?;
            start_tracing(&loaded.config.log)?;
            failpoint::arm();
            for warning in &loaded.warnings {
                tracing::warn!("{warning}");
            }
            run_to_its_end(command.run(loaded))
        }
    }
}

fn run_to_its_end(command: impl Future<Output = anyhow::Result<ExitCode>>) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(command);
    runtime.shutdown_timeout(LAST_WORK);
    outcome
}

/// To standard error: standard output belongs to what commands print.
fn start_tracing(log: &LogSettings) -> anyhow::Result<()> {
    let terminal = io::stderr().is_terminal();
    let pretty = match log.format {
        LogFormat::Auto => terminal,
        LogFormat::Pretty => true,
        LogFormat::Json => false,
    };
    let lines = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_new(&log.level)?)
        .with_writer(io::stderr);
    let started = if pretty {
        lines.with_ansi(terminal).try_init()
    } else {
        lines.json().flatten_event(true).try_init()
    };
    started.map_err(|error| anyhow!("can't start logging: {error}"))
}
