//! `wharfinger artifact delete`: artifacts of a repository, of all runs or of one.

use std::io::{self, Write as _};

use clap::{Args, Subcommand};

use crate::app;
use crate::clock::Clock;
use crate::config::Config;
use crate::db::{Filter, View};
use crate::error::Error;
use crate::papers::is_repository;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Delete finalized artifacts; their links end at once
    Delete(DeleteFlags),
}

#[derive(Args, Debug)]
pub struct DeleteFlags {
    /// owner/name
    #[arg(long, value_name = "REPOSITORY")]
    repository: String,
    /// Only this issuer's repository, as the configuration names it
    #[arg(long, value_name = "NAME")]
    issuer: Option<String>,
    /// Only those of the run with this number
    #[arg(long, value_name = "N", required_unless_present = "all_runs")]
    run_id: Option<i64>,
    /// Those of every run
    #[arg(long, conflicts_with = "run_id")]
    all_runs: bool,
    /// Only those of this name
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
}

pub async fn run(config: &Config, Command::Delete(flags): Command) -> anyhow::Result<()> {
    if !is_repository(&flags.repository) {
        return Err(Error::Invalid("a repository is owner/name".to_owned()).into());
    }
    let services = app::open(config, Clock::System).await?;
    let view = View::of_operator(&flags.repository, flags.issuer);
    let filter = Filter {
        run_id: flags.run_id,
        name: flags.name.as_deref(),
        ..Filter::default()
    };
    let deleted = services.delete_repository_artifacts(&view, filter).await?;
    services.db.close().await;
    writeln!(io::stdout().lock(), "{deleted} deleted")?;
    Ok(())
}
