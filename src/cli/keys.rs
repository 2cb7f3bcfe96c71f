//! `wharfinger keys`: the signing keys, rotated beside a running server.

use std::io::{self, Write as _};
use std::time::Duration;

use clap::Subcommand;

use super::table::{Table, date};
use crate::app;
use crate::clock::Clock;
use crate::config::Config;
use crate::model::SigningKey;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Add a key, which signs from a while later on; what the older ones signed stays good
    Rotate {
        /// How long until it signs: every replica has to know it by then, and clocks may be a minute apart
        #[arg(long, value_name = "DURATION", default_value = "2m", value_parser = humantime::parse_duration)]
        after: Duration,
    },
    /// List the keys
    List,
    /// Refuse what a key signed; only when nothing of that can be in use any more
    Retire {
        /// As `keys list` shows it
        #[arg(value_name = "ID")]
        id: String,
        /// Also if it may be in use: after a leak. Links and minted tokens that it signed stop working
        #[arg(long)]
        at_once: bool,
    },
}

pub async fn run(config: &Config, command: Command) -> anyhow::Result<()> {
    let services = app::open(config, Clock::System).await?;
    match command {
        Command::Rotate { after } => {
            let key = services.rotate_keys(after).await?;
            writeln!(io::stdout().lock(), "{}", key.id)?;
        }
        Command::List => {
            let keys = services.signing_keys().await?;
            write!(io::stdout().lock(), "{}", list(&keys, services.clock.now_ms()))?;
        }
        Command::Retire { id, at_once } => services.retire_key(&id, at_once).await?,
    }
    services.db.close().await;
    Ok(())
}

fn list(keys: &[SigningKey], now_ms: i64) -> String {
    let is_retired = |key: &&SigningKey| key.retired_at_ms.is_some_and(|retired_at_ms| retired_at_ms <= now_ms);
    let signs = |key: &&SigningKey| !is_retired(key) && key.signs_from_ms <= now_ms;
    let active = keys.iter().rfind(signs).map(|key| &key.id);
    let mut table = Table::new(["ID", "STATE", "SIGNS FROM", "RETIRED"]);
    for key in keys {
        let state = match key {
            key if is_retired(&key) => "retired",
            key if key.signs_from_ms > now_ms => "waits",
            key if Some(&key.id) == active => "signs",
            _ => "verifies",
        };
        table.row([
            key.id.clone(),
            state.to_owned(),
            date(Some(key.signs_from_ms).filter(|from_ms| *from_ms > 0)),
            date(key.retired_at_ms),
        ]);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_says_what_each_key_does() {
        let key = |id: &str, signs_from_ms, retired_at_ms| SigningKey {
            id: id.to_owned(),
            created_at_ms: 0,
            signs_from_ms,
            retired_at_ms,
        };
        let keys = [
            key("1", 0, Some(500)),
            key("2", 100, None),
            key("3", 200, None),
            key("4", 2000, None),
        ];
        let states: Vec<String> = list(&keys, 1000)
            .lines()
            .skip(1)
            .map(|line| line.split_whitespace().nth(1).unwrap().to_owned())
            .collect();
        assert_eq!(states, ["retired", "verifies", "signs", "waits"]);
    }
}
