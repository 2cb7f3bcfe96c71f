//! TLS without a proxy: the real clients over it, `gh` among them, and what happens when certificates change or are
//! wrong.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use wharfinger::api::tls::{Settings, Tls};

use super::common::client::{Runner, Status, run_client, succeed};
use super::common::process::{Environment, PATIENCE, Process, ToItsEnd, free_port};
use super::common::raw::converse;

/// A name that `gh` takes for a GitHub Enterprise Server's. It stands in no DNS: a proxy knows where it is.
const HOST: &str = "wharfinger.test";

/// A certificate authority of the test's own, and where it puts what it signs.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    directory: TempDir,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, "An authority for this test");
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("ca.pem"), issuer.pem()).unwrap();
        Self { issuer, directory }
    }

    pub fn ca_file(&self) -> PathBuf {
        self.directory.path().join("ca.pem")
    }

    fn settings(&self) -> Settings {
        Settings {
            cert_file: self.directory.path().join("cert.pem"),
            key_file: self.directory.path().join("key.pem"),
        }
    }

    /// Puts a fresh certificate for `names` where the server looks.
    pub fn sign(&self, names: &[&str]) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(names)
            .unwrap()
            .signed_by(&key, &self.issuer)
            .unwrap();
        write_private(&self.settings().key_file, &key.serialize_pem());
        std::fs::write(self.settings().cert_file, certificate.pem()).unwrap();
    }

    pub fn environment(&self, public_url: &str) -> Environment {
        let mut environment = Environment::embedded(&self.directory.path().join("data")).listening();
        let Settings { cert_file, key_file } = self.settings();
        environment.set("WHARFINGER_TLS__CERT_FILE", cert_file.display());
        environment.set("WHARFINGER_TLS__KEY_FILE", key_file.display());
        environment.set("WHARFINGER_PUBLIC_URL", public_url);
        environment.set("WHARFINGER_SERVER__HEAD_TIMEOUT", "1s");
        environment
    }

    fn connector(&self) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_file(self.ca_file()).unwrap())
            .unwrap();
        let config = ClientConfig::builder()
            .with_root_certificates(roots)
            .with_no_client_auth();
        TlsConnector::from(Arc::new(config))
    }

    fn http(&self) -> reqwest::Client {
        let ca = reqwest::Certificate::from_pem(&std::fs::read(self.ca_file()).unwrap()).unwrap();
        // A connection for each request, so that each makes a handshake.
        let client = reqwest::Client::builder()
            .tls_certs_only([ca])
            .pool_max_idle_per_host(0);
        client.build().unwrap()
    }
}

fn write_private(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_speak_it_and_certificates_change_under_them() {
    let authority = Authority::new();
    authority.sign(&["127.0.0.1"]);
    let port = free_port();
    let mut environment = authority.environment(&format!("https://127.0.0.1:{port}"));
    environment.set("WHARFINGER_LISTEN", format!("127.0.0.1:{port}"));
    let server = Process::start(&environment);
    let url = format!("https://127.0.0.1:{port}");

    let runner = Runner {
        url: url.clone(),
        token: server.token("octo/demo", "1", "build"),
        variables: vec![("NODE_EXTRA_CA_CERTS", authority.ca_file().display().to_string())],
    };
    for (client, cases) in [("artifact-6.2.1", "small,tree"), ("cache-6.3.0-v2", "exact")] {
        succeed(&runner, client, cases).await;
    }

    // Who does not speak it, or not to the end, is cut off, and nobody else notices.
    let origin = format!("http://127.0.0.1:{port}");
    let plain = converse(&origin, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
    assert!(!plain.starts_with(b"HTTP/"), "{plain:?}");
    let mut stalled = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    // The beginning of a ClientHello.
    stalled.write_all(&[0x16, 0x03, 0x01, 0x02, 0x00, 0x01]).await.unwrap();
    let mut rest = Vec::new();
    let cut = tokio::time::timeout(Duration::from_secs(20), stalled.read_to_end(&mut rest)).await;
    assert!(cut.is_ok(), "a handshake may stall for ever");

    // Nonsense changes nothing; a good certificate, and only that, takes its place.
    let http = authority.http();
    let status = async || http.get(&url).send().await.map(|reply| reply.status().as_u16());
    assert_eq!(status().await.unwrap(), 404);
    authority.sign(&["elsewhere.test"]);
    let limit = tokio::time::Instant::now() + Duration::from_secs(60);
    while status().await.is_ok() {
        assert!(tokio::time::Instant::now() < limit, "the new certificate is not used");
    }
    authority.sign(&["127.0.0.1"]);
    while status().await.is_err() {
        assert!(
            tokio::time::Instant::now() < limit,
            "the newest certificate is not used"
        );
    }
    assert_eq!(server.terminate(), Some(0));
}

/// Replies pile up in TLS before they do in the socket.
#[tokio::test(flavor = "multi_thread")]
async fn who_takes_no_replies_loses_its_place() {
    let authority = Authority::new();
    authority.sign(&["127.0.0.1"]);
    let port = free_port();
    let mut environment = authority.environment(&format!("https://127.0.0.1:{port}"));
    environment.set("WHARFINGER_LISTEN", format!("127.0.0.1:{port}"));
    environment.set("WHARFINGER_SERVER__BODY_IDLE_TIMEOUT", "300ms");
    let server = Process::start(&environment);

    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let socket = socket.connect(([127, 0, 0, 1], port).into()).await.unwrap();
    let mut deaf = authority
        .connector()
        .connect("127.0.0.1".try_into().unwrap(), socket)
        .await
        .unwrap();
    let requests = b"GET /nowhere HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".repeat(100);
    let asking = async { while deaf.write_all(&requests).await.is_ok() {} };
    let cut = tokio::time::timeout(Duration::from_secs(60), asking).await;
    assert!(cut.is_ok(), "a client that takes nothing holds its connection");
    assert_eq!(server.terminate(), Some(0));
}

#[test]
fn files_that_cannot_be_used_are_explained() {
    let authority = Authority::new();
    authority.sign(&["127.0.0.1"]);
    let settings = authority.settings();
    let tls = Tls::open(&settings).unwrap().unwrap();
    assert!(Tls::open(&Settings::default()).unwrap().is_none());

    let good_key = std::fs::read_to_string(&settings.key_file).unwrap();
    let open = |key: &str, mode, cert: Option<&str>| {
        write_private(&settings.key_file, key);
        std::fs::set_permissions(&settings.key_file, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
        if let Some(cert) = cert {
            std::fs::write(&settings.cert_file, cert).unwrap();
        }
        Tls::open(&settings).map(drop).unwrap_err()
    };
    let other_key = KeyPair::generate().unwrap().serialize_pem();
    for (why, error) in [
        ("open to everybody", open(&good_key, 0o644, None)),
        ("do not belong together", open(&other_key, 0o600, None)),
        ("no private key", open("nonsense", 0o600, None)),
        ("no certificate in it", open(&good_key, 0o600, Some("nonsense"))),
        (
            "not PEM",
            open(
                &good_key,
                0o600,
                Some("-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n"),
            ),
        ),
    ] {
        assert!(error.contains(why), "{error}");
        assert!(!error.contains("PRIVATE"), "{error}");
    }
    std::fs::remove_file(&settings.cert_file).unwrap();
    assert!(Tls::open(&settings).unwrap_err().contains("can't read"));
    // A server that runs goes on with what it has.
    tls.reload();

    let mut environment = authority.environment("https://127.0.0.1");
    environment.0.remove("WHARFINGER_TLS__KEY_FILE");
    let output = environment.run(&["check-config"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("both, or neither"), "{said}");
}

/// Answers CONNECT to whatever host with a way to the server.
async fn proxy(to: String) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let to = to.clone();
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(client.read_u8().await.unwrap());
                }
                assert!(head.starts_with(format!("CONNECT {HOST}:443 ").as_bytes()), "{head:?}");
                let mut server = TcpStream::connect(to).await.unwrap();
                client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
                let _ = copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    url
}

/// The unmodified `gh`, which takes no port in a host name and speaks HTTPS only.
#[tokio::test(flavor = "multi_thread")]
async fn gh_lists_and_downloads() {
    let authority = Authority::new();
    authority.sign(&[HOST]);
    let server = Process::start(&authority.environment(&format!("https://{HOST}")));
    let listen = server.environment.0["WHARFINGER_LISTEN"].clone();
    let proxy = proxy(listen.clone()).await;

    // Two runs' artifacts, by the real client.
    let uploads = [("7", "tree"), ("8", "small")].map(|(run, cases)| {
        let runner = Runner {
            url: format!("https://{HOST}"),
            token: server.token("octo/demo", run, "build"),
            variables: vec![
                ("NODE_EXTRA_CA_CERTS", authority.ca_file().display().to_string()),
                ("HTTPS_PROXY", proxy.clone()),
                ("https_proxy", proxy.clone()),
                ("NODE_USE_ENV_PROXY", "1".to_owned()),
            ],
        };
        tokio::task::spawn_blocking(move || run_client(&runner, "artifact-6.2.1", cases))
    });
    for upload in uploads {
        for outcome in upload.await.unwrap() {
            assert_eq!(outcome.status, Status::Ok, "{outcome:#?}");
        }
    }

    let home = tempfile::tempdir().unwrap();
    let token = server.api_token("octo/demo");
    let gh = async |arguments: &[&str]| {
        let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join(".tools/gh/bin/gh"));
        command
            .args(arguments)
            .env_clear()
            .env("HOME", home.path())
            .env("GH_HOST", HOST)
            .env("GH_ENTERPRISE_TOKEN", &token)
            .env("HTTPS_PROXY", &proxy)
            .env("SSL_CERT_FILE", authority.ca_file())
            .env("GH_NO_UPDATE_NOTIFIER", "1")
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .current_dir(home.path());
        tokio::task::spawn_blocking(move || command.to_its_end(PATIENCE))
            .await
            .unwrap()
    };
    let succeeds = async |arguments: &[&str]| {
        let output = gh(arguments).await;
        assert!(output.status.success(), "gh {arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let list = succeeds(&["api", "repos/octo/demo/actions/runs/7/artifacts"]).await;
    let list: Value = serde_json::from_str(&list).unwrap();
    assert_eq!(list["total_count"], 1);
    let artifact = &list["artifacts"][0];
    let name = artifact["name"].as_str().unwrap();

    succeeds(&[
        "run",
        "download",
        "7",
        "-R",
        &format!("{HOST}/octo/demo"),
        "-n",
        name,
        "-D",
        "by-run",
    ])
    .await;
    let files = || std::fs::read_dir(home.path().join("by-run")).unwrap().count();
    assert!(files() > 0);
    // Without a run: the newest of that name, of any run.
    succeeds(&[
        "run",
        "download",
        "-R",
        &format!("{HOST}/octo/demo"),
        "-n",
        name,
        "-D",
        "by-name",
    ])
    .await;
    let pages = succeeds(&[
        "api",
        "--paginate",
        "repos/octo/demo/actions/artifacts?per_page=1",
        "--jq",
        ".artifacts[].name",
    ]);
    assert_eq!(pages.await.lines().count(), 2);

    let gone = gh(&["run", "download", "9", "-R", &format!("{HOST}/octo/demo")]).await;
    assert!(!gone.status.success(), "{gone:?}");
    let other = gh(&["api", "repos/octo/other/actions/artifacts"]).await;
    let said: Value = serde_json::from_slice(&other.stdout).unwrap();
    assert_eq!(
        (other.status.success(), said),
        (false, json!({ "message": "Not Found" }))
    );
    let id = artifact["id"].to_string();
    succeeds(&[
        "api",
        "-X",
        "DELETE",
        &format!("repos/octo/demo/actions/artifacts/{id}"),
    ])
    .await;
    let left = succeeds(&["api", "repos/octo/demo/actions/artifacts", "--jq", ".total_count"]).await;
    assert_eq!(left.trim(), "1");
    assert_eq!(server.terminate(), Some(0));
}
