//! `wharfinger check-config`: prints the configuration that a server would start with, secrets hidden.
//!
//! Reads the secret files too, and makes none; talks to no database and no store.

use std::io::{self, Write as _};

use anyhow::anyhow;

use crate::config::{Loaded, RootSecretFile};
use crate::papers::{Papers, RootSecret};

pub fn run(loaded: &Loaded) -> anyhow::Result<()> {
    let config = &loaded.config;
    let root_secret = config.root_secret_file();
    // The embedded secret is made at first start.
    let missing = matches!(&root_secret, RootSecretFile::Embedded(path) if !path.try_exists()?);
    if !missing {
        let root_secret = RootSecret::load(root_secret.path()).map_err(|error| anyhow!(error))?;
        Papers::new(&config.issuers, &root_secret, &config.public_origin())
            .and_then(|papers| papers.fetching_key_sets(config.ca_file.as_deref()))
            .map_err(|error| anyhow!(error))?;
    }
    io::stdout().lock().write_all(loaded.effective_toml.as_bytes())?;
    Ok(())
}
