//! `wharfinger token mint`: prints a runtime token. Needs only the configuration and the root secret, so it runs beside
//! a server.

use std::io::{self, Write as _};
use std::time::Duration;

use clap::{Args, Subcommand};

use crate::app;
use crate::clock::Clock;
use crate::config::Config;
use crate::papers::{MintRequest, Papers};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print a token for one job of one run
    Mint(MintFlags),
}

/// What the token says. `env` takes the same.
#[derive(Args, Debug)]
pub struct MintFlags {
    /// owner/name
    #[arg(long, value_name = "REPOSITORY")]
    pub repository: String,
    /// The workflow run, such as 1
    #[arg(long, value_name = "ID")]
    pub run_id: String,
    /// The job, such as build
    #[arg(long, value_name = "ID")]
    pub job_id: String,
    /// The repository's number at the forge; artifacts then survive its renaming
    #[arg(long, value_name = "N")]
    pub repository_id: Option<i64>,
    /// Which attempt of the run
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub attempt: i32,
    /// The ref that the run builds
    #[arg(long = "ref", value_name = "REF", default_value = "refs/heads/main")]
    pub git_ref: String,
    /// The default branch's ref
    #[arg(long, value_name = "REF", default_value = "refs/heads/main")]
    pub default_ref: String,
    /// How long the token works
    #[arg(long, value_name = "DURATION", default_value = "6h", value_parser = humantime::parse_duration)]
    pub ttl: Duration,
}

impl MintFlags {
    /// Makes the token.
    pub fn mint(&self, papers: &Papers) -> anyhow::Result<String> {
        let request = MintRequest {
            repository: self.repository.clone(),
            repository_id: self.repository_id,
            run_id: self.run_id.clone(),
            job_id: self.job_id.clone(),
            attempt: self.attempt,
            git_ref: self.git_ref.clone(),
            default_ref: self.default_ref.clone(),
            ttl: self.ttl,
        };
        Ok(papers.mint(&request, Clock::System.now_ms())?)
    }
}

pub fn run(config: &Config, Command::Mint(flags): Command) -> anyhow::Result<()> {
    let token = flags.mint(&app::papers(config)?)?;
    writeln!(io::stdout().lock(), "{token}")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::config::Overrides;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        flags: MintFlags,
    }

    fn mint(papers: &Papers, line: &str) -> anyhow::Result<String> {
        Line::try_parse_from(format!("mint {line}").split(' '))?
            .flags
            .mint(papers)
    }

    #[test]
    fn a_token_from_any_process_on_the_same_data_is_accepted() {
        let directory = tempfile::tempdir().unwrap();
        let data_dir = directory.path().join("data").to_str().unwrap().to_owned();
        let flags = Overrides {
            file: None,
            values: vec![("data_dir", data_dir)],
        };
        let config = Config::load(&flags, []).unwrap().config;
        let refused = app::papers(&config).unwrap_err().to_string();
        assert!(refused.contains("start the server"), "{refused}");
        app::prepare_data_dir(&config.data_dir).unwrap();
        crate::papers::RootSecret::load_or_create(config.root_secret_file().path()).unwrap();
        let (server, command) = (app::papers(&config).unwrap(), app::papers(&config).unwrap());

        let line = "--repository octo/demo --run-id 7 --job-id build --repository-id 42 --attempt 2 --ref refs/heads/x";
        let caller = server
            .verify_token(&mint(&command, line).unwrap(), Clock::System.now_ms())
            .unwrap();
        assert_eq!(
            (caller.run.issuer.as_str(), caller.run.run_backend_id.as_str()),
            ("wharfinger", "7")
        );
        assert_eq!(
            (caller.run.repository.as_str(), caller.job_backend_id.as_str()),
            ("id:42", "build")
        );
        assert_eq!((caller.run_id, caller.run_attempt), (Some(7), 2));
        let scopes: Vec<_> = caller
            .cache_scopes
            .iter()
            .map(|scope| (scope.scope.as_str(), scope.write))
            .collect();
        assert_eq!(scopes, [("refs/heads/x", true), ("refs/heads/main", false)]);

        let error = mint(&command, "--repository octo --run-id 7 --job-id build").unwrap_err();
        assert!(error.to_string().contains("owner/name"), "{error}");
    }
}
