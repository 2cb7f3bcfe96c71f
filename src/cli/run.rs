//! `wharfinger run close`: ends the runtime tokens of a workflow run.

use clap::{Args, Subcommand};

use crate::app;
use crate::clock::Clock;
use crate::config::Config;
use crate::service::credentials::RunToClose;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// End the runtime tokens that a run was given until now
    Close(CloseFlags),
}

#[derive(Args, Debug)]
pub struct CloseFlags {
    /// owner/name, or the repository's number at the forge
    #[arg(long, value_name = "REPOSITORY")]
    repository: String,
    /// The run's number, or the id in its tokens
    #[arg(long, value_name = "ID")]
    run_id: String,
    /// Only this issuer's run, as the configuration names it
    #[arg(long, value_name = "NAME")]
    issuer: Option<String>,
}

pub async fn run(config: &Config, Command::Close(flags): Command) -> anyhow::Result<()> {
    let services = app::open(config, Clock::System).await?;
    let run = RunToClose {
        issuer: flags.issuer,
        repository: flags.repository,
        run: flags.run_id,
    };
    services.close_run(run).await?;
    services.db.close().await;
    Ok(())
}
