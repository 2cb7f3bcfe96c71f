//! `wharfinger token`: prints runtime tokens for jobs; makes, lists and revokes API tokens for people and automation.
//! Runs beside a server: minting needs the configuration and the root secret, the rest opens database and store.

use std::io::{self, Write as _};
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use secrecy::ExposeSecret as _;

use super::table::{Table, date};
use crate::app;
use crate::clock::Clock;
use crate::config::Config;
use crate::model::{Access, ApiToken, Repositories};
use crate::papers::{MintRequest, Papers};
use crate::service::credentials::{NewApiToken, key_of};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print a runtime token for one job of one run
    Mint(MintFlags),
    /// Make an API token and print it; it is shown this once
    Create(CreateFlags),
    /// List the API tokens
    List,
    /// End an API token
    Revoke {
        /// As `token list` shows it
        #[arg(value_name = "ID")]
        id: String,
    },
}

/// What an API token may do.
#[derive(Args, Debug)]
pub struct CreateFlags {
    /// What it is for, such as "release pipeline"
    #[arg(long, value_name = "TEXT")]
    name: String,
    /// owner/name, or the repository's number at the forge where its tokens carry one; may be given several times
    #[arg(
        long = "repository",
        value_name = "REPOSITORY",
        required_unless_present = "all_repositories"
    )]
    repositories: Vec<String>,
    /// For every repository, those to come too
    #[arg(long, conflicts_with = "repositories")]
    all_repositories: bool,
    /// Only for this issuer's repositories, as the configuration names it
    #[arg(long, value_name = "NAME")]
    issuer: Option<String>,
    /// read: list and download; write: and delete, and close runs; admin: and mint runtime tokens
    #[arg(long, value_enum, default_value_t = AccessFlag::Read)]
    access: AccessFlag,
    /// How long the token works
    #[arg(long, value_name = "DURATION", default_value = "90d", value_parser = humantime::parse_duration)]
    ttl: Duration,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum AccessFlag {
    Read,
    Write,
    Admin,
}

impl From<AccessFlag> for Access {
    fn from(flag: AccessFlag) -> Self {
        match flag {
            AccessFlag::Read => Self::Read,
            AccessFlag::Write => Self::Write,
            AccessFlag::Admin => Self::Admin,
        }
    }
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
    /// What set the run off, such as pull_request_target; those that outsiders can set off only read branches' caches
    #[arg(long, value_name = "EVENT")]
    pub event: Option<String>,
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
            event: self.event.clone(),
            ttl: self.ttl,
        };
        Ok(papers.mint(&request, Clock::System.now_ms())?)
    }
}

pub async fn run(config: &Config, command: Command) -> anyhow::Result<()> {
    if let Command::Mint(flags) = command {
        let token = flags.mint(&app::papers(config).await?)?;
        writeln!(io::stdout().lock(), "{token}")?;
        return Ok(());
    }
    let services = app::open(config, Clock::System).await?;
    match command {
        Command::Mint(_) => {}
        Command::Create(flags) => {
            let (token, text) = services.create_api_token(flags.read()?).await?;
            tracing::info!(id = token.id, "made an API token; it is shown this once");
            writeln!(io::stdout().lock(), "{}", text.expose_secret())?;
        }
        Command::List => {
            let now_ms = services.clock.now_ms();
            let tokens = services.api_tokens().await?;
            write!(io::stdout().lock(), "{}", list(&tokens, now_ms))?;
        }
        Command::Revoke { id } => services.revoke_api_token(&id).await?,
    }
    services.db.close().await;
    Ok(())
}

impl CreateFlags {
    fn read(self) -> anyhow::Result<NewApiToken> {
        let listed = self.repositories.iter().map(|repository| {
            let key = key_of(repository)?;
            Ok(key.strip_prefix("name:").map_or(key.clone(), str::to_owned))
        });
        let listed = listed.collect::<anyhow::Result<_>>()?;
        Ok(NewApiToken {
            name: self.name,
            issuer: self.issuer,
            repositories: if self.all_repositories {
                Repositories::All
            } else {
                Repositories::Some(listed)
            },
            access: self.access.into(),
            lives_for: self.ttl,
        })
    }
}

fn list(tokens: &[ApiToken], now_ms: i64) -> String {
    let mut table = Table::new(["ID", "NAME", "ACCESS", "REPOSITORIES", "STATE", "EXPIRES", "LAST USED"]);
    for token in tokens {
        let repositories = match &token.repositories {
            Repositories::All => "all".to_owned(),
            Repositories::Some(listed) => listed.join(","),
        };
        let of = token
            .issuer
            .as_ref()
            .map_or(String::new(), |issuer| format!(" of {issuer}"));
        let state = match token {
            ApiToken {
                revoked_at_ms: Some(_), ..
            } => "revoked",
            ApiToken { expires_at_ms, .. } if now_ms >= *expires_at_ms => "expired",
            _ => "good",
        };
        table.row([
            token.id.clone(),
            token.name.clone(),
            token.access.as_str().to_owned(),
            repositories + &of,
            state.to_owned(),
            date(Some(token.expires_at_ms)),
            date(token.last_used_at_ms),
        ]);
    }
    table.to_string()
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

    #[tokio::test]
    async fn a_token_from_any_process_on_the_same_data_is_accepted() {
        let directory = tempfile::tempdir().unwrap();
        let data_dir = directory.path().join("data").to_str().unwrap().to_owned();
        let flags = Overrides {
            file: None,
            values: vec![("data_dir", data_dir)],
        };
        let config = Config::load(&flags, []).unwrap().config;
        let refused = app::papers(&config).await.unwrap_err().to_string();
        assert!(refused.contains("start the server"), "{refused}");
        app::prepare_data_dir(&config.data_dir).unwrap();
        crate::papers::RootSecret::load_or_create(config.root_secret_file().path()).unwrap();
        let server = app::papers(&config).await.unwrap();
        let command = app::papers(&config).await.unwrap();

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
