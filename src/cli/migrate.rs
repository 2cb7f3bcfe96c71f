//! `wharfinger migrate`: brings the database up to date without serving, for those who do it before a roll-out.

use crate::app;
use crate::config::Config;

pub async fn run(config: Config) -> anyhow::Result<()> {
    app::migrate(config).await
}
