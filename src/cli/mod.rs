//! The command line: flags, and one file per command.
//!
//! Called by `main`. Commands print their result to standard output and nothing else there; none of them holds a rule
//! of the product, they call `app` and `papers`.

mod artifact;
mod check_config;
mod clean;
mod doctor;
mod env;
mod fsck;
mod health;
mod keys;
mod migrate;
mod run;
mod runner;
mod serve;
mod table;
mod token;
mod usage;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use clap::{Args, Parser, Subcommand};

use crate::config::{Loaded, Overrides};

/// Artifact storage for unmodified GitHub Actions clients.
#[derive(Debug, Parser)]
#[command(name = "wharfinger", version)]
pub struct Cli {
    #[command(flatten)]
    settings: SettingFlags,
    #[command(subcommand)]
    command: Option<Command>,
}

/// Settings that are worth a flag. Each wins over the environment, which wins over the file.
#[derive(Args, Debug)]
#[command(next_help_heading = "Settings")]
struct SettingFlags {
    /// Configuration file (TOML); `config/default.toml` explains every key
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where clients reach the server, such as 127.0.0.1:8080
    #[arg(long, global = true, value_name = "ADDRESS")]
    listen: Option<String>,
    /// Where health checks and metrics are
    #[arg(long, global = true, value_name = "ADDRESS")]
    internal_listen: Option<String>,
    /// The origin that links begin with, such as https://artifacts.example.com
    #[arg(long, global = true, value_name = "URL")]
    public_url: Option<String>,
    /// Where the embedded database and store lie
    #[arg(long, global = true, value_name = "DIRECTORY")]
    data_dir: Option<String>,
    /// postgres://…; everybody on the machine can read flags, so give passwords in a file:
    /// WHARFINGER_DATABASE__URL_FILE
    #[arg(long, global = true, value_name = "URL")]
    database_url: Option<String>,
    /// s3://bucket/prefix
    #[arg(long, global = true, value_name = "URL")]
    storage_url: Option<String>,
    /// The file of the root secret
    #[arg(long, global = true, value_name = "FILE")]
    secret_file: Option<String>,
    /// error, warn, info, debug, trace, or a filter
    #[arg(long, global = true, value_name = "LEVEL")]
    log_level: Option<String>,
    /// auto, pretty or json
    #[arg(long, global = true, value_name = "FORMAT")]
    log_format: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    #[command(flatten)]
    OnServer(ServerCommand),
    #[command(flatten)]
    OnRunner(RunnerCommand),
}

/// What runs beside jobs, where no server's configuration is.
#[derive(Debug, Subcommand)]
pub enum RunnerCommand {
    /// Point a GitHub Actions runner at a server
    #[command(subcommand)]
    Runner(runner::Command),
    /// Tell whether this job's artifacts and caches go to Wharfinger, and why not
    Doctor(doctor::Flags),
}

/// What needs the configuration.
#[derive(Debug, Subcommand)]
pub enum ServerCommand {
    /// Run the server (what happens without a command)
    Serve,
    /// Make tokens: runtime tokens for jobs, API tokens for people and automation
    #[command(subcommand)]
    Token(token::Command),
    /// Print the variables that let a client talk to this server, for `eval`
    Env(token::MintFlags),
    /// Rotate the keys that sign links and minted tokens
    #[command(subcommand)]
    Keys(keys::Command),
    /// Close workflow runs
    #[command(subcommand)]
    Run(run::Command),
    /// Show what each repository takes
    Usage,
    /// Delete artifacts
    #[command(subcommand)]
    Artifact(artifact::Command),
    /// Check the configuration and print it, secrets hidden
    CheckConfig,
    /// Remove what is expired, abandoned or left over, once
    Clean,
    /// Check that database and store agree
    Fsck(fsck::Flags),
    /// Bring the database up to date
    Migrate,
    /// Ask the server of this configuration whether it is ready
    Health,
}

impl Cli {
    /// What the flags say about the configuration.
    pub fn overrides(&self) -> Overrides {
        let flags = &self.settings;
        let values = [
            ("listen", &flags.listen),
            ("internal_listen", &flags.internal_listen),
            ("public_url", &flags.public_url),
            ("data_dir", &flags.data_dir),
            ("database.url", &flags.database_url),
            ("storage.url", &flags.storage_url),
            ("secret_file", &flags.secret_file),
            ("log.level", &flags.log_level),
            ("log.format", &flags.log_format),
        ];
        Overrides {
            file: flags.config.clone(),
            values: values
                .into_iter()
                .filter_map(|(key, value)| Some((key, value.clone()?)))
                .collect(),
        }
    }

    /// What is to be done.
    pub fn into_command(self) -> Command {
        self.command.unwrap_or(Command::OnServer(ServerCommand::Serve))
    }

    /// What a command that could not do its work exits with: for `fsck`, 1 says that something is wrong.
    pub fn failure(&self) -> ExitCode {
        let is_fsck = matches!(self.command, Some(Command::OnServer(ServerCommand::Fsck(_))));
        ExitCode::from(if is_fsck { 2 } else { 1 })
    }
}

impl RunnerCommand {
    /// Does what the command says.
    ///
    /// # Errors
    /// One sentence for whoever typed it, maybe with its cause behind a colon.
    pub async fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::Runner(command) => runner::run(command).map(|()| ExitCode::SUCCESS),
            Self::Doctor(flags) => doctor::run(flags).await,
        }
    }
}

impl ServerCommand {
    /// Does what the command says.
    ///
    /// # Errors
    /// One sentence for whoever typed it, maybe with its cause behind a colon.
    pub async fn run(self, loaded: Loaded) -> anyhow::Result<ExitCode> {
        match self {
            Self::Serve => serve::run(loaded.config).await?,
            Self::Token(command) => token::run(&loaded.config, command).await?,
            Self::Env(flags) => env::run(&loaded.config, flags).await?,
            Self::Keys(command) => keys::run(&loaded.config, command).await?,
            Self::Run(command) => run::run(&loaded.config, command).await?,
            Self::Usage => usage::run(&loaded.config).await?,
            Self::Artifact(command) => artifact::run(&loaded.config, command).await?,
            Self::CheckConfig => check_config::run(&loaded)?,
            Self::Clean => clean::run(loaded.config).await?,
            Self::Fsck(flags) => return fsck::run(loaded.config, flags).await,
            Self::Migrate => migrate::run(loaded.config).await?,
            Self::Health => health::run(&loaded.config).await?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The process's environment, for [`Config::load`](crate::config::Config::load).
///
/// # Errors
/// If a variable of ours is not UTF-8.
pub fn environment() -> anyhow::Result<Vec<(String, String)>> {
    readable(std::env::vars_os())
}

fn readable(variables: impl Iterator<Item = (OsString, OsString)>) -> anyhow::Result<Vec<(String, String)>> {
    let mut read = Vec::new();
    for (name, value) in variables {
        match (name.into_string(), value.into_string()) {
            (Ok(name), Ok(value)) => read.push((name, value)),
            (Ok(name), Err(_)) if name.starts_with("WHARFINGER_") => {
                bail!("the environment variable {name} is not UTF-8: set it anew")
            }
            _ => {}
        }
    }
    Ok(read)
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt as _;

    use clap::CommandFactory as _;
    use clap::error::ErrorKind;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split(' '))
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn serve_is_the_default() {
        assert!(parse("wharfinger").unwrap().command.is_none());
        assert!(matches!(
            parse("wharfinger serve").unwrap().command,
            Some(Command::OnServer(ServerCommand::Serve))
        ));
    }

    #[test]
    fn settings_stand_before_or_behind_the_command() {
        let all = "--config w.toml --listen a --internal-listen b --public-url c --data-dir d --database-url e \
                   --storage-url f --secret-file g --log-level h --log-format i";
        for line in [
            format!("wharfinger {all}"),
            format!("wharfinger {all} serve"),
            format!("wharfinger serve {all}"),
        ] {
            let overrides = parse(&line).unwrap().overrides();
            assert_eq!(overrides.file, Some("w.toml".into()));
            let values: Vec<_> = overrides
                .values
                .iter()
                .map(|(key, value)| (*key, value.as_str()))
                .collect();
            assert_eq!(
                values,
                [
                    ("listen", "a"),
                    ("internal_listen", "b"),
                    ("public_url", "c"),
                    ("data_dir", "d"),
                    ("database.url", "e"),
                    ("storage.url", "f"),
                    ("secret_file", "g"),
                    ("log.level", "h"),
                    ("log.format", "i"),
                ]
            );
        }
        assert!(parse("wharfinger token mint --repository a/b --run-id 1 --job-id b --data-dir d").is_ok());
    }

    #[test]
    fn wrong_usage_is_refused() {
        for (line, kind) in [
            ("wharfinger --colour red", ErrorKind::UnknownArgument),
            ("wharfinger sink", ErrorKind::InvalidSubcommand),
            (
                "wharfinger env --run-id 1 --job-id b",
                ErrorKind::MissingRequiredArgument,
            ),
            ("wharfinger token", ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand),
            ("wharfinger runner install /r", ErrorKind::MissingRequiredArgument),
            (
                "wharfinger runner install --url https://a.example",
                ErrorKind::MissingRequiredArgument,
            ),
            (
                "wharfinger runner install /r --url a.example",
                ErrorKind::ValueValidation,
            ),
            (
                "wharfinger runner install /r --url https://a.example --uninstall",
                ErrorKind::ArgumentConflict,
            ),
            (
                "wharfinger env --repository a/b --run-id 1 --job-id b --ttl 6",
                ErrorKind::ValueValidation,
            ),
        ] {
            let error = parse(line).unwrap_err();
            assert_eq!((error.kind(), error.exit_code()), (kind, 2), "{line}");
        }
    }

    #[test]
    fn only_variables_of_ours_must_be_utf8() {
        let binary = || OsString::from_vec(vec![0xff]);
        let other = vec![("A".into(), binary()), (binary(), "b".into()), ("C".into(), "c".into())];
        assert_eq!(readable(other.into_iter()).unwrap(), [("C".to_owned(), "c".to_owned())]);
        let ours = vec![("WHARFINGER_LISTEN".into(), binary())];
        assert!(
            readable(ours.into_iter())
                .unwrap_err()
                .to_string()
                .contains("WHARFINGER_LISTEN is not UTF-8")
        );
    }
}
