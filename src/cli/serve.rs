//! `wharfinger serve`: runs the server until it is told to stop.

use crate::app;
use crate::config::Config;

pub async fn run(config: Config) -> anyhow::Result<()> {
    app::serve(config).await
}
