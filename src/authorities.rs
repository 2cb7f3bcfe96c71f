//! The certificate authorities that the operator's `ca_file` adds to the public ones.
//!
//! Used by whatever asks other servers for something by HTTPS. Reads the file and nothing else.

use std::path::Path;

use reqwest::Certificate;

/// The certificates in a PEM file; none if there is no file.
///
/// # Errors
/// One sentence that names the file.
pub fn read(ca_file: Option<&Path>) -> Result<Vec<Certificate>, String> {
    let Some(path) = ca_file else {
        return Ok(Vec::new());
    };
    let name = path.display();
    let pem = std::fs::read(path).map_err(|error| format!("can't read the ca_file {name}: {error}"))?;
    Certificate::from_pem_bundle(&pem)
        .map_err(|error| format!("the ca_file {name} is not a bundle of PEM certificates: {error}"))
}
