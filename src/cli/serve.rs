//! `wharfinger serve`: runs the server until it is told to stop.

use crate::app;
use crate::config::Config;

pub async fn run(config: Config) -> anyhow::Result<()> {
    if !config.listen.ip().is_loopback() {
        tracing::warn!(
            "{} speaks plain HTTP to other machines: tokens and links travel readable unless a proxy with TLS is in front",
            config.listen
        );
    }
    app::serve(config).await
}
