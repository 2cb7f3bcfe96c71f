//! `wharfinger fsck`: checks that database and store agree. Exit code 0 if they do, 1 if something is wrong, 2 if that
//! could not be found out.

use std::io::{self, Write as _};
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use crate::app;
use crate::config::Config;
use crate::service::fsck::{Options, Problem};

#[derive(Args, Clone, Copy, Debug)]
pub struct Flags {
    /// Read every byte and compare it with its checksums
    #[arg(long)]
    deep: bool,
    /// Delete what nobody knows, mark as lost what can't be read
    #[arg(long)]
    repair: bool,
    /// One JSON object per line
    #[arg(long)]
    json: bool,
}

pub async fn run(config: Config, flags: Flags) -> anyhow::Result<ExitCode> {
    let options = Options {
        deep: flags.deep,
        repair: flags.repair,
    };
    let mut tell = |problem: &Problem| {
        let line = if flags.json {
            json!({ "problem": problem }).to_string()
        } else {
            let end = if problem.repaired { " (repaired)" } else { "" };
            format!("{:?}: {}: {}{end}", problem.kind, problem.subject, problem.detail)
        };
        // With standard output gone the exit code still says it.
        let _ = writeln!(io::stdout().lock(), "{line}");
    };
    let summary = app::fsck(config, options, &mut tell).await?;
    let line = if flags.json {
        json!({ "summary": summary }).to_string()
    } else {
        format!(
            "{} blobs and {} objects checked: {} problems, {} repaired",
            summary.blobs, summary.objects, summary.problems, summary.repaired
        )
    };
    writeln!(io::stdout().lock(), "{line}")?;
    Ok(if summary.problems == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(1)
    })
}
