//! TLS for those without a proxy: a certificate and its key from files, read again when they change.
//!
//! Opened by `app`, which also runs the task that looks at the files; `serve.rs` asks for a handshake on each connection.
//! A change that can't be used changes nothing: the certificate of before stays.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::server::TlsStream;

/// How often the files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Far above any chain of certificates.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// The `[tls]` section of the configuration. Without files the server speaks plain HTTP.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// PEM: the server's certificate, then those that lead to its authority. Empty for none.
    pub cert_file: PathBuf,
    /// PEM: the certificate's private key. Empty for none.
    pub key_file: PathBuf,
}

impl Settings {
    pub fn is_on(&self) -> bool {
        !self.cert_file.as_os_str().is_empty()
    }
}

/// What handshakes are made with.
#[derive(Debug)]
pub struct Tls {
    settings: Settings,
    current: RwLock<Current>,
}

#[derive(Debug)]
struct Current {
    config: Arc<ServerConfig>,
    /// Of what was last found in the files, used or not.
    seen: [u8; 32],
}

impl Tls {
    /// Reads the files. `None` if there are none to read.
    ///
    /// # Errors
    /// One sentence that says what to do about a file.
    pub fn open(settings: &Settings) -> Result<Option<Arc<Self>>, String> {
        if !settings.is_on() {
            return Ok(None);
        }
        let files = Files::read(settings)?;
        let current = Current {
            config: files.config()?,
            seen: files.digest(),
        };
        Ok(Some(Arc::new(Self {
            settings: settings.clone(),
            current: RwLock::new(current),
        })))
    }

    /// Takes what is in the files now, if it is new and can be used.
    pub fn reload(&self) {
        let seen = self.current.read().unwrap_or_else(PoisonError::into_inner).seen;
        let files = match Files::read(&self.settings) {
            Ok(files) if files.digest() == seen => return,
            Ok(files) => files,
            Err(error) => {
                tracing::warn!(%error, "the certificate of before stays in use");
                return;
            }
        };
        let config = files.config();
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        // What is wrong is told once.
        current.seen = files.digest();
        match config {
            Ok(config) => {
                current.config = config;
                tracing::info!(cert_file = %self.settings.cert_file.display(), "a new certificate is in use");
            }
            Err(error) => tracing::warn!(%error, "the certificate of before stays in use"),
        }
    }

    /// Does so whenever they change, for ever.
    pub async fn reload_in_background(self: Arc<Self>) {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let tls = Arc::clone(&self);
            // Files may lie on a disk that does not answer.
            let _ = tokio::task::spawn_blocking(move || tls.reload()).await;
        }
    }

    /// A handshake on a connection.
    pub(super) async fn accept(&self, stream: TcpStream) -> std::io::Result<TlsStream<TcpStream>> {
        let config = {
            let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(&current.config)
        };
        TlsAcceptor::from(config).accept(stream).await
    }
}

/// What lies in the two files.
struct Files<'a> {
    settings: &'a Settings,
    cert: Vec<u8>,
    key: Vec<u8>,
}

impl<'a> Files<'a> {
    fn read(settings: &'a Settings) -> Result<Self, String> {
        let key = read(&settings.key_file, |mode| mode & 0o006 == 0)?;
        let cert = read(&settings.cert_file, |_| true)?;
        Ok(Self { settings, cert, key })
    }

    fn digest(&self) -> [u8; 32] {
        let lengths = [self.cert.len(), self.key.len()].map(usize::to_be_bytes).concat();
        let digest = Sha256::new().chain_update(lengths).chain_update(&self.cert);
        digest.chain_update(&self.key).finalize().into()
    }

    fn config(&self) -> Result<Arc<ServerConfig>, String> {
        let cert_file = self.settings.cert_file.display();
        let key_file = self.settings.key_file.display();
        let certificates: Vec<_> = CertificateDer::pem_slice_iter(&self.cert)
            .collect::<Result<_, _>>()
            .map_err(|error| format!("tls.cert_file {cert_file} is not PEM: {error}"))?;
        if certificates.is_empty() {
            return Err(format!(
                "tls.cert_file {cert_file} has no certificate in it: it must be PEM"
            ));
        }
        let key = PrivateKeyDer::from_pem_slice(&self.key)
            .map_err(|error| format!("tls.key_file {key_file} has no private key in PEM: {error}"))?;
        let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("TLS can't be set up: {error}"))?
            .with_no_client_auth()
            .with_single_cert(certificates, key)
            .map_err(|error| format!("{cert_file} and {key_file} do not belong together or can't be used: {error}"))?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

fn read(path: &Path, is_private: impl Fn(u32) -> bool) -> Result<Vec<u8>, String> {
    let name = path.display();
    let unreadable = |error| format!("can't read {name}: {error}");
    let file = File::open(path).map_err(unreadable)?;
    if !is_private(file.metadata().map_err(unreadable)?.mode()) {
        return Err(format!("{name} is open to everybody on this machine: chmod 600 {name}"));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).map_err(unreadable)?;
    Ok(bytes)
}
