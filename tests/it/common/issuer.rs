//! Forges beside Wharfinger: issuers in the configuration, the tokens they sign, and where they publish their keys.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der, PublicKeyX509Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _, RsaKeyPair};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit, Mac};
use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, EncodingKey, crypto};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::task::AbortOnDropHandle;
use wharfinger::config::Config;
use wharfinger::papers::{IssuerKind, IssuerSettings};

pub const HEADER: &str = r#"{"alg":"HS256","typ":"JWT"}"#;

/// What the issuer of that name signs with.
pub fn secret(name: &str) -> String {
    format!("{name}'s own secret: 3q2+7wkY1xT5mZ0rVb8sQe")
}

/// An issuer `name` with the `iss` `https://<name>.example`, still without keys.
pub fn settings(name: &str, kind: IssuerKind) -> IssuerSettings {
    IssuerSettings {
        name: name.to_owned(),
        kind,
        iss: Some(format!("https://{name}.example")),
        default: false,
        secret_file: None,
        previous_secret_file: None,
        jwks_url: None,
        jwks_file: None,
        allowed_owner_ids: None,
        allowed_repository_ids: None,
        audience: None,
        repository: None,
        max_lifetime: std::time::Duration::from_secs(24 * 3600),
        write_implies_read: false,
    }
}

/// Adds an issuer that signs with a secret to a configuration.
pub fn add(config: &mut Config, name: &str, audience: Option<&str>) {
    let secret_file = config.data_dir.with_file_name(format!("{name}.secret"));
    std::fs::write(&secret_file, secret(name)).unwrap();
    std::fs::set_permissions(&secret_file, PermissionsExt::from_mode(0o600)).unwrap();
    config.issuers.push(IssuerSettings {
        secret_file: Some(secret_file),
        audience: audience.map(str::to_owned),
        ..settings(name, IssuerKind::Hs256)
    });
}

/// Adds an issuer that publishes its keys at a URL.
pub fn add_public(config: &mut Config, name: &str, jwks_url: &str) {
    config.issuers.push(IssuerSettings {
        jwks_url: Some(jwks_url.to_owned()),
        ..settings(name, IssuerKind::Jwks)
    });
}

/// A configuration file below `directory` with an issuer `name`, as [`add`] makes it.
pub fn config_file(directory: &Path, name: &str) -> PathBuf {
    let (secret_file, config) = (directory.join(format!("{name}.secret")), directory.join("issuers.toml"));
    std::fs::write(&secret_file, secret(name)).unwrap();
    std::fs::set_permissions(&secret_file, PermissionsExt::from_mode(0o600)).unwrap();
    let lines = [
        "[[issuers]]".to_owned(),
        format!("name = \"{name}\""),
        "kind = \"hs256\"".to_owned(),
        format!("iss = \"https://{name}.example\""),
        format!("secret_file = \"{}\"", secret_file.display()),
    ];
    std::fs::write(&config, lines.join("\n")).unwrap();
    config
}

/// Good claims of the issuer `name` for a job.
pub fn claims(name: &str, repository: &str, run: &str, job: &str, now_ms: i64) -> Value {
    json!({
        "iss": format!("https://{name}.example"),
        "scp": format!("Actions.Results:{run}:{job}"),
        "repository": repository,
        "exp": now_ms / 1000 + 3600,
    })
}

/// A token with this header and these claims, whatever they are.
pub fn sign(secret: &[u8], header: &str, claims: &str) -> String {
    let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
    let mac = Hmac::<sha2::Sha256>::new_from_slice(secret)
        .unwrap()
        .chain_update(&signed);
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes()))
}

/// A key that an issuer signs with, made for one test.
pub struct KeyPair {
    pub algorithm: Algorithm,
    pub kid: String,
    private: EncodingKey,
    /// The public half as a SubjectPublicKeyInfo.
    pub public_der: Vec<u8>,
}

impl KeyPair {
    pub fn generate(algorithm: Algorithm, kid: &str) -> Self {
        let random = SystemRandom::new();
        let der = |key: &dyn AsDer<PublicKeyX509Der<'static>>| key.as_der().unwrap().as_ref().to_vec();
        let (private, public_der) = match algorithm {
            Algorithm::RS256 => {
                let pair = RsaKeyPair::generate(KeySize::Rsa2048).unwrap();
                let private: Pkcs8V1Der = pair.as_der().unwrap();
                // The library wants the RSAPrivateKey (RFC 8017) that PKCS #8 puts 26 bytes around.
                let private = EncodingKey::from_rsa_der(&private.as_ref()[26..]);
                (private, der(pair.public_key()))
            }
            Algorithm::ES256 => {
                let scheme = &ECDSA_P256_SHA256_FIXED_SIGNING;
                let document = EcdsaKeyPair::generate_pkcs8(scheme, &random).unwrap();
                let pair = EcdsaKeyPair::from_pkcs8(scheme, document.as_ref()).unwrap();
                (EncodingKey::from_ec_der(document.as_ref()), der(pair.public_key()))
            }
            Algorithm::EdDSA => {
                let document = Ed25519KeyPair::generate_pkcs8v1(&random).unwrap();
                let pair = Ed25519KeyPair::from_pkcs8(document.as_ref()).unwrap();
                (EncodingKey::from_ed_der(document.as_ref()), der(pair.public_key()))
            }
            other => panic!("no issuer signs with {other:?}"),
        };
        Self {
            algorithm,
            kid: kid.to_owned(),
            private,
            public_der,
        }
    }

    pub fn public_pem(&self) -> String {
        let text = STANDARD.encode(&self.public_der);
        let lines: String = text
            .as_bytes()
            .chunks(64)
            .map(|line| format!("{}\n", std::str::from_utf8(line).unwrap()))
            .collect();
        format!("-----BEGIN PUBLIC KEY-----\n{lines}-----END PUBLIC KEY-----\n")
    }

    pub fn jwk(&self) -> Value {
        let mut jwk = json!(Jwk::from_encoding_key(&self.private, self.algorithm).unwrap());
        jwk["kid"] = json!(self.kid);
        jwk["use"] = json!("sig");
        jwk
    }

    pub fn header(&self) -> Value {
        json!({ "alg": self.algorithm, "typ": "JWT", "kid": self.kid })
    }

    /// A token with this header, whatever it says, signed with this key.
    pub fn sign(&self, header: &Value, claims: &Value) -> String {
        let encode = |part: &Value| URL_SAFE_NO_PAD.encode(part.to_string());
        let signed = format!("{}.{}", encode(header), encode(claims));
        let signature = crypto::sign(signed.as_bytes(), &self.private, self.algorithm).unwrap();
        format!("{signed}.{signature}")
    }
}

/// The JWK set of these keys.
pub fn key_set(keys: &[&KeyPair]) -> String {
    let keys: Vec<Value> = keys.iter().map(|key| key.jwk()).collect();
    json!({ "keys": keys }).to_string()
}

/// How an issuer answers when it is asked for its keys.
#[derive(Clone, Debug)]
pub enum Answer {
    /// With this text.
    Text(String),
    /// With so many bytes.
    Large(usize),
    /// By pointing elsewhere.
    Redirect(String),
    Status(u16),
    /// Never, with the connection open.
    Silence,
    /// By closing the connection.
    Closed,
}

/// Where an issuer publishes its keys.
pub struct KeySetServer {
    pub url: String,
    answer: Arc<Mutex<Answer>>,
    requests: Arc<AtomicUsize>,
    _task: AbortOnDropHandle<()>,
}

impl KeySetServer {
    pub async fn start(answer: Answer) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/keys", listener.local_addr().unwrap());
        let (answer, requests) = (Arc::new(Mutex::new(answer)), Arc::new(AtomicUsize::new(0)));
        let (answers, counter) = (Arc::clone(&answer), Arc::clone(&requests));
        let serve = async move {
            loop {
                let (socket, _) = listener.accept().await.unwrap();
                counter.fetch_add(1, Ordering::Relaxed);
                let answer = answers.lock().unwrap().clone();
                tokio::spawn(reply(socket, answer));
            }
        };
        Self {
            url,
            answer,
            requests,
            _task: AbortOnDropHandle::new(tokio::spawn(serve)),
        }
    }

    pub fn answer(&self, answer: Answer) {
        *self.answer.lock().unwrap() = answer;
    }

    /// How often it was asked; every request is a connection of its own.
    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }
}

async fn reply(mut socket: TcpStream, answer: Answer) {
    let (status, header, body) = match answer {
        Answer::Text(text) => (200, String::new(), text),
        Answer::Large(bytes) => (200, String::new(), " ".repeat(bytes)),
        Answer::Redirect(url) => (302, format!("Location: {url}\r\n"), String::new()),
        Answer::Status(status) => (status, String::new(), String::new()),
        Answer::Silence => {
            // Until the client has had enough.
            let _ = tokio::io::copy(&mut socket, &mut tokio::io::sink()).await;
            return;
        }
        Answer::Closed => return,
    };
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match socket.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return,
        }
    }
    let length = body.len();
    let head = format!("HTTP/1.1 {status} X\r\n{header}Content-Length: {length}\r\nConnection: close\r\n\r\n");
    // A client that has read enough hangs up.
    let _ = socket.write_all(format!("{head}{body}").as_bytes()).await;
}
