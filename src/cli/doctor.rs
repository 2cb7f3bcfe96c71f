//! `wharfinger doctor`: do the artifacts and caches of a job with these variables go to Wharfinger, and if not, why not?
//!
//! Called by `cli` on runners and in jobs, without a server's configuration. Judges as the clients do: by their variables
//! and with Node's idea of trust. Never sends a token to what is not a Wharfinger; leaves nothing behind on the server.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use clap::Args;
use reqwest::header::DATE;
use reqwest::{Certificate, Client, Response, StatusCode, Url};
use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::runner::{self, PRELOAD};

/// As long as the preload waits.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const TIMEOUT: Duration = Duration::from_secs(60);
/// What tokens are given for clocks that differ.
const MOST_SKEW_S: u64 = 60;
/// What is sent there and back.
const PROBE_BYTES: usize = 64 * 1024;

#[derive(Args, Debug)]
pub struct Flags {
    /// Check this server, whatever the variables say
    #[arg(long, value_name = "URL", value_parser = runner::origin)]
    url: Option<String>,
    /// A file with the runtime token to try; without it, the job's
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// With the variables that the runner in this directory hands to its jobs
    #[arg(long, value_name = "DIRECTORY", conflicts_with = "url")]
    runner: Option<PathBuf>,
    /// For machines
    #[arg(long)]
    json: bool,
}

#[derive(Default, Serialize)]
struct Report {
    uses_wharfinger: bool,
    /// Where they go.
    url: Option<String>,
    checks: Vec<Check>,
}

#[derive(Serialize)]
struct Check {
    name: &'static str,
    status: Status,
    detail: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    Failed,
    Skipped,
}

pub async fn run(flags: Flags) -> anyhow::Result<ExitCode> {
    let mut environment: BTreeMap<String, String> = super::environment()?.into_iter().collect();
    if let Some(directory) = &flags.runner {
        let path = directory.join(".env");
        let lines = runner::read(&path)?.with_context(|| format!("{} is missing", path.display()))?;
        let lines = lines.lines().filter_map(|line| line.split_once('='));
        environment.extend(lines.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }
    let mut report = Report::default();
    report.examine(&flags, &environment).await;
    report.uses_wharfinger = report.checks.iter().all(|check| check.status != Status::Failed);
    let mut out = io::stdout().lock();
    if flags.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        write!(out, "{}", report.text())?;
    }
    Ok(ExitCode::from(u8::from(!report.uses_wharfinger)))
}

impl Report {
    fn add(&mut self, name: &'static str, status: Status, detail: impl Into<String>) {
        let detail = detail.into();
        self.checks.push(Check { name, status, detail });
    }

    /// Adds what came out, and says whether it was good.
    fn judge(&mut self, name: &'static str, outcome: anyhow::Result<String>) -> bool {
        match outcome {
            Ok(detail) => self.add(name, Status::Ok, detail),
            Err(error) => self.add(name, Status::Failed, format!("{error:#}")),
        }
        self.checks.last().is_some_and(|check| check.status == Status::Ok)
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for check in &self.checks {
            let status = match check.status {
                Status::Ok => "ok",
                Status::Failed => "FAILED",
                Status::Skipped => "skipped",
            };
            text.push_str(&format!("{status:<8}{:<10}{}\n", check.name, check.detail));
        }
        match &self.url {
            Some(url) if self.uses_wharfinger => {
                text.push_str(&format!("Artifacts and caches go to Wharfinger at {url}.\n"))
            }
            _ => text.push_str("Artifacts and caches do not go to Wharfinger.\n"),
        }
        text
    }

    /// One thing after the other, until one makes the next ones pointless.
    async fn examine(&mut self, flags: &Flags, environment: &BTreeMap<String, String>) {
        let variables = Variables(environment);
        let is_preloaded = match &flags.url {
            Some(url) => {
                self.url = Some(url.clone());
                false
            }
            None => match self.find_server(&variables) {
                Some(is_preloaded) => is_preloaded,
                None => return,
            },
        };
        let Some(url) = self.url.clone() else { return };
        let Some(http) = self.reach(&url, &variables).await else {
            return;
        };
        let file = flags.token_file.clone();
        let file = file.or_else(|| is_preloaded.then(|| variables.get("WHARFINGER_TOKEN_FILE").map(Into::into))?);
        let token = match (file, variables.get("ACTIONS_RUNTIME_TOKEN")) {
            // It is written when a job starts.
            (Some(file), _) if flags.runner.is_some() && flags.token_file.is_none() && !file.exists() => None,
            (Some(file), _) => match fs::read_to_string(&file) {
                Ok(token) => Some(token.trim().to_owned()),
                Err(error) => {
                    self.add(
                        "token",
                        Status::Failed,
                        format!("can't read {}: {error}", file.display()),
                    );
                    return;
                }
            },
            (None, token) => token.map(str::to_owned),
        };
        let Some(token) = token else {
            let why = "no token here: the runner gives ACTIONS_RUNTIME_TOKEN to actions alone";
            for name in ["token", "upload", "download", "cache"] {
                self.add(name, Status::Skipped, why);
            }
            return;
        };
        self.try_token(Job {
            http,
            url,
            token,
            ids: None,
        })
        .await;
    }

    /// Where the variables lead, and whether the preload is what leads there.
    fn find_server(&mut self, variables: &Variables<'_>) -> Option<bool> {
        let preload = match variables.preload() {
            Err(error) => {
                self.add("preload", Status::Failed, format!("{error:#}"));
                return None;
            }
            Ok(preload) => preload,
        };
        let outcome = if let Some(path) = &preload {
            let is_this = fs::read_to_string(path).is_ok_and(|text| text == PRELOAD);
            let version = if is_this {
                ""
            } else {
                ", of another version than this program"
            };
            self.add("preload", Status::Ok, format!("NODE_OPTIONS loads {path}{version}"));
            variables.of_preload()
        } else {
            self.add("preload", Status::Skipped, "NODE_OPTIONS does not load it");
            variables.of_clients()
        };
        match outcome {
            Ok(url) => {
                self.add("variables", Status::Ok, format!("they lead to {url}"));
                self.url = Some(url);
                Some(preload.is_some())
            }
            Err(error) => {
                self.add("variables", Status::Failed, format!("{error:#}"));
                None
            }
        }
    }

    /// DNS, TLS, and whether what answers is a Wharfinger with the right time.
    async fn reach(&mut self, url: &str, variables: &Variables<'_>) -> Option<Client> {
        let parsed = Url::parse(url).ok()?;
        let host = parsed.host_str()?.trim_matches(['[', ']']).to_owned();
        let port = parsed.port_or_known_default()?;
        match tokio::net::lookup_host((host.as_str(), port)).await {
            Ok(addresses) => {
                let mut addresses: Vec<_> = addresses.map(|address| address.ip().to_string()).collect();
                addresses.dedup();
                self.add("dns", Status::Ok, format!("{host} is {}", addresses.join(", ")));
            }
            // The proxy looks it up.
            Err(error) if variables.has_proxy() => self.add("dns", Status::Skipped, error.to_string()),
            Err(error) => {
                self.add("dns", Status::Failed, format!("{host} has no address: {error}"));
                return None;
            }
        }
        let http = match variables.client() {
            Ok(http) => http,
            Err(error) => {
                self.add("tls", Status::Failed, format!("{error:#}"));
                return None;
            }
        };
        let is_tls = parsed.scheme() == "https";
        let reply = match http.get(format!("{url}/api/v1/version")).send().await {
            Ok(reply) => reply,
            Err(error) => {
                let text = format!("{:#}", anyhow::Error::new(error));
                if is_tls && text.to_lowercase().contains("certificate") {
                    let why = "Node does not accept the server's certificate; a private authority's PEM file belongs \
                               into NODE_EXTRA_CA_CERTS";
                    self.add("tls", Status::Failed, format!("{why}: {text}"));
                } else {
                    self.add("server", Status::Failed, text);
                }
                return None;
            }
        };
        if is_tls {
            self.add("tls", Status::Ok, "Node accepts the certificate");
        } else {
            self.add(
                "tls",
                Status::Skipped,
                "the URL is http:, so whoever is between can read tokens",
            );
        }
        let date = reply.headers().get(DATE).and_then(|date| date.to_str().ok());
        let skew = date.map(skew);
        if !self.judge("server", version(url, reply).await) {
            return None;
        }
        self.judge(
            "clock",
            skew.unwrap_or_else(|| bail!("the server's answer has no date")),
        );
        Some(http)
    }

    /// What a job does with its token: list, upload, download, delete; and a look into the cache.
    async fn try_token(&mut self, mut job: Job) {
        if !self.judge("token", job.introduce().await) {
            return;
        }
        let name = format!("wharfinger-doctor-{}", Uuid::new_v4());
        let content = Uuid::new_v4().as_bytes().repeat(PROBE_BYTES / 16);
        let is_there = self.judge("upload", job.upload(&name, &content).await);
        if is_there {
            self.judge("download", job.download(&name, &content).await);
            if let Err(error) = job
                .call("ArtifactService/DeleteArtifact", json!({ "name": name }))
                .await
            {
                self.add("delete", Status::Failed, format!("{name} was left behind: {error:#}"));
            }
        }
        self.judge("cache", job.look_into_cache(&name).await);
    }
}

/// A job's variables.
struct Variables<'a>(&'a BTreeMap<String, String>);

impl Variables<'_> {
    /// One that is empty counts as none, as it does for the clients.
    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// The preload that NODE_OPTIONS names.
    fn preload(&self) -> anyhow::Result<Option<String>> {
        let mut found = None;
        for path in runner::preloads(self.get("NODE_OPTIONS").unwrap_or_default()) {
            match fs::read_to_string(&path) {
                Ok(text) if text.lines().next() == PRELOAD.lines().next() => found = Some(path),
                // A package's name, or somebody else's file.
                Ok(_) => {}
                Err(_) if !path.contains(['/', '\\']) => {}
                Err(error) => bail!(
                    "NODE_OPTIONS loads {path}, which can't be read here ({error}), so that every Node process fails: \
                     install it again, or mount it into the job's container"
                ),
            }
        }
        Ok(found)
    }

    /// Where the preload sends a job.
    fn of_preload(&self) -> anyhow::Result<String> {
        let url = self.get("WHARFINGER_URL");
        let url = url.context("WHARFINGER_URL is not set, so the preload does nothing: install it again with --url")?;
        if let Some(fallback) = self.get("WHARFINGER_FALLBACK") {
            ensure!(
                ["fail", "original"].contains(&fallback),
                "WHARFINGER_FALLBACK must be fail or original"
            );
        }
        runner::origin(url).context("WHARFINGER_URL")
    }

    /// Where clients go by themselves.
    fn of_clients(&self) -> anyhow::Result<String> {
        let Some(results) = self.get("ACTIONS_RESULTS_URL") else {
            ensure!(
                self.get("WHARFINGER_URL").is_none(),
                "WHARFINGER_URL is set, but NODE_OPTIONS does not load the preload that reads it: \
                 `wharfinger runner install` sets both, and a job's container needs both in its own environment"
            );
            bail!(
                "nothing here leads to a server: neither WHARFINGER_URL with the preload nor ACTIONS_RESULTS_URL; \
                 `wharfinger runner install` points a runner at one"
            );
        };
        // Of this one the clients take the origin alone.
        let url = Url::parse(results).ok().filter(Url::has_host);
        let url = url
            .context("ACTIONS_RESULTS_URL is no URL")?
            .origin()
            .ascii_serialization();
        let server = self.get("GITHUB_SERVER_URL").unwrap_or("https://github.com");
        let host = Url::parse(server)
            .ok()
            .and_then(|url| Some(url.host_str()?.to_lowercase()));
        ensure!(
            host.is_some_and(|host| host == "github.com" || host.ends_with(".ghe.com") || host.ends_with(".localhost")),
            "GITHUB_SERVER_URL is {server}, which the clients take for a GitHub Enterprise Server and refuse to work \
             for: set it to https://github.com in the step, or use the preload"
        );
        let uses_v2 = self.get("ACTIONS_CACHE_SERVICE_V2").is_some();
        for (name, is_used) in [("ACTIONS_CACHE_URL", !uses_v2), ("ACTIONS_RUNTIME_URL", false)] {
            match self.get(name) {
                Some(value) => ensure!(
                    value.strip_prefix(&url) == Some("/"),
                    "{name} must be {url}/, with the slash, for clients of the older protocol"
                ),
                None => ensure!(
                    !is_used,
                    "artifacts go to {url}, caches do not: neither {name} nor ACTIONS_CACHE_SERVICE_V2 is set"
                ),
            }
        }
        Ok(url)
    }

    fn has_proxy(&self) -> bool {
        let names = [
            "https_proxy",
            "HTTPS_PROXY",
            "http_proxy",
            "HTTP_PROXY",
            "all_proxy",
            "ALL_PROXY",
        ];
        names.iter().any(|name| self.get(name).is_some())
    }

    /// Trusts whom Node trusts: a list of its own and NODE_EXTRA_CA_CERTS; the system's only where it is told so.
    fn client(&self) -> anyhow::Result<Client> {
        let builder = Client::builder().connect_timeout(CONNECT_TIMEOUT).timeout(TIMEOUT);
        // The token goes to the server that was named, and to no other.
        let builder = builder.redirect(reqwest::redirect::Policy::none());
        let mut authorities = Vec::new();
        if let Some(path) = self.get("NODE_EXTRA_CA_CERTS") {
            let pem = fs::read(path).with_context(|| format!("can't read NODE_EXTRA_CA_CERTS ({path})"))?;
            let read = Certificate::from_pem_bundle(&pem);
            authorities = read.with_context(|| format!("NODE_EXTRA_CA_CERTS ({path}) has no PEM certificates"))?;
        }
        let options = self.get("NODE_OPTIONS").unwrap_or_default();
        let trusts_system = ["--use-system-ca", "--use-openssl-ca"]
            .iter()
            .any(|option| options.contains(option))
            || self.get("NODE_USE_SYSTEM_CA") == Some("1");
        let builder = if trusts_system {
            builder.tls_certs_merge(authorities)
        } else {
            for authority in webpki_root_certs::TLS_SERVER_ROOT_CERTS {
                authorities.push(Certificate::from_der(authority)?);
            }
            builder.tls_certs_only(authorities)
        };
        builder.build().context("can't set up HTTPS")
    }
}

/// The server's name and version, if it is one of ours.
async fn version(url: &str, reply: Response) -> anyhow::Result<String> {
    let status = reply.status();
    let said: Value = serde_json::from_slice(&reply.bytes().await?).unwrap_or_default();
    ensure!(
        status == StatusCode::OK && said["name"] == "wharfinger",
        "what answers at {url} is no Wharfinger"
    );
    Ok(format!("Wharfinger {}", said["version"].as_str().unwrap_or_default()))
}

/// How far the clocks are from each other, if that can be borne.
fn skew(date: &str) -> anyhow::Result<String> {
    let theirs = httpdate::parse_http_date(date).context("the server's date can't be read")?;
    let skew = match SystemTime::now().duration_since(theirs) {
        Ok(skew) => skew,
        Err(error) => error.duration(),
    };
    let seconds = skew.as_secs();
    ensure!(
        seconds <= MOST_SKEW_S,
        "this machine's clock and the server's are {seconds} s apart: set them by NTP"
    );
    Ok(format!("{seconds} s apart"))
}

/// What a client does with a token.
struct Job {
    http: Client,
    url: String,
    token: String,
    /// Of run and job, as the token names them.
    ids: Option<(String, String)>,
}

impl Job {
    async fn call(&self, method: &str, mut fields: Value) -> anyhow::Result<Value> {
        if let Some((run, job)) = &self.ids {
            fields["workflow_run_backend_id"] = json!(run);
            fields["workflow_job_run_backend_id"] = json!(job);
        }
        let path = format!("/twirp/github.actions.results.api.v1.{method}");
        let reply = self
            .http
            .post(format!("{}{path}", self.url))
            .bearer_auth(&self.token)
            .header("content-type", "application/json")
            .body(fields.to_string())
            .send()
            .await?;
        let status = reply.status();
        let said: Value = serde_json::from_slice(&reply.bytes().await?).unwrap_or_default();
        let reason = said["msg"].as_str().unwrap_or("no reason was given");
        ensure!(status.is_success(), "{method} was answered with {status}: {reason}");
        Ok(said)
    }

    /// Finds out the token's run and lists its artifacts.
    async fn introduce(&mut self) -> anyhow::Result<String> {
        let payload = self.token.split('.').nth(1).unwrap_or_default();
        let payload = URL_SAFE_NO_PAD
            .decode(payload.trim_end_matches('='))
            .unwrap_or_default();
        let claims: Value = serde_json::from_slice(&payload).unwrap_or_default();
        let scopes = claims["scp"].as_str().unwrap_or_default();
        let ids = scopes
            .split(' ')
            .find_map(|scope| scope.strip_prefix("Actions.Results:")?.split_once(':'));
        let (run, job) = ids.context("the token names no run: it is no runtime token")?;
        self.ids = Some((run.to_owned(), job.to_owned()));
        let listed = self.call("ArtifactService/ListArtifacts", json!({})).await;
        listed.context("the server does not take this token; its log says why")?;
        Ok(format!("accepted for run {run}"))
    }

    async fn upload(&self, name: &str, content: &[u8]) -> anyhow::Result<String> {
        let created = self
            .call("ArtifactService/CreateArtifact", json!({ "name": name, "version": 4 }))
            .await?;
        let link = created["signed_upload_url"]
            .as_str()
            .context("the server gave no link")?;
        let reply = self
            .http
            .put(link)
            .header("x-ms-blob-type", "BlockBlob")
            .body(content.to_vec())
            .send()
            .await
            .map_err(reqwest::Error::without_url)
            .with_context(|| {
                format!(
                    "can't upload to {}: is that public_url reachable from here?",
                    origin_of(link)
                )
            })?;
        ensure!(
            reply.status().is_success(),
            "the upload was answered with {}",
            reply.status()
        );
        let hash: String = Sha256::digest(content)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let fields = json!({ "name": name, "size": content.len().to_string(), "hash": format!("sha256:{hash}") });
        self.call("ArtifactService/FinalizeArtifact", fields).await?;
        Ok(format!("{} bytes to {}", content.len(), origin_of(link)))
    }

    async fn download(&self, name: &str, content: &[u8]) -> anyhow::Result<String> {
        let given = self
            .call("ArtifactService/GetSignedArtifactURL", json!({ "name": name }))
            .await?;
        let link = given["signed_url"].as_str().context("the server gave no link")?;
        let reply = self.http.get(link).send().await.map_err(reqwest::Error::without_url)?;
        ensure!(
            reply.status() == StatusCode::OK,
            "the download was answered with {}",
            reply.status()
        );
        let received = reply.bytes().await.map_err(reqwest::Error::without_url)?;
        ensure!(received == content, "the download is not what was uploaded");
        Ok("the same bytes came back".to_owned())
    }

    async fn look_into_cache(&self, key: &str) -> anyhow::Result<String> {
        let fields = json!({ "key": key, "restore_keys": [], "version": "0".repeat(64) });
        self.call("CacheService/GetCacheEntryDownloadURL", fields).await?;
        Ok("a look-up was answered".to_owned())
    }
}

/// Of a link, what may be shown.
fn origin_of(link: &str) -> String {
    Url::parse(link).map_or_else(|_| "no URL".to_owned(), |url| url.origin().ascii_serialization())
}
