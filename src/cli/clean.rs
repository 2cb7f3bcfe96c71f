//! `wharfinger clean`: does the cleaner's work once, also beside running servers.

use crate::app;
use crate::config::Config;

pub async fn run(config: Config) -> anyhow::Result<()> {
    app::clean(config).await
}
