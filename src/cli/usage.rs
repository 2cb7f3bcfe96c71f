//! `wharfinger usage`: what each repository takes, the largest first.

use std::io::{self, Write as _};

use super::table::Table;
use crate::app;
use crate::clock::Clock;
use crate::config::Config;
use crate::db::Usage;

pub async fn run(config: &Config) -> anyhow::Result<()> {
    let services = app::open(config, Clock::System).await?;
    let usage = services.usage().await?;
    write!(io::stdout().lock(), "{}", list(&usage))?;
    services.db.close().await;
    Ok(())
}

fn list(usage: &[Usage]) -> String {
    let mut table = Table::new(["REPOSITORY", "NAME", "ISSUER", "ARTIFACTS", "BYTES", "CACHES", "BYTES"]);
    for Usage {
        issuer,
        repository,
        name,
        artifacts,
        artifact_bytes,
        cache_entries,
        cache_bytes,
    } in usage
    {
        // As `--repository` takes it.
        let repository = repository.split_once(':').map_or(repository.as_str(), |(_, rest)| rest);
        table.row([
            if repository.is_empty() { "-" } else { repository }.to_owned(),
            name.as_deref().unwrap_or("-").to_owned(),
            issuer.clone(),
            artifacts.to_string(),
            artifact_bytes.to_string(),
            cache_entries.to_string(),
            cache_bytes.to_string(),
        ]);
    }
    table.to_string()
}
