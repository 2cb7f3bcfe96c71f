//! The cache by hand-made requests: version 2 in JSON and protobuf, version 1, who may read and write what, and what the
//! cleaner takes away.

use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::StreamExt;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use prost::Message;
use serde_json::{Value, json};
use uuid::Uuid;
use wharfinger::db::{NewCacheEntry, Reservation, Reserved};
use wharfinger::model::{CacheScope, Principal, RunKey};
use wharfinger::service::cleaner::Report;
use wharfinger::service::fsck::{self, Kind};

use crate::common::{Backend, TestServer, block_link, block_list, issuer};

pub const VERSION: &str = "4982f7847d41153f1825e05c5c05916bb69e860b48ee5c408d68e1b87abf48e4";
const MAIN: &str = "refs/heads/main";
const HOUR: Duration = Duration::from_secs(3600);

/// One job as a cache client acts for it.
pub struct CacheJob<'a> {
    pub server: &'a TestServer,
    pub token: String,
}

/// A token of the issuer `forge` for a job of run `run` of `octo/demo` with the claim `ac`, and `more` claims over it,
/// where `null` takes one away.
fn token(server: &TestServer, run: &str, scopes: &[(&str, u8)], more: Value) -> String {
    let now_ms = server.clock.load(Ordering::Relaxed);
    let mut claims = issuer::claims("forge", "octo/demo", run, "build", now_ms);
    // Longer than reservations.
    claims["exp"] = json!(now_ms / 1000 + 6 * 3600);
    let ac: Vec<_> = scopes
        .iter()
        .map(|(scope, permission)| json!({ "Scope": scope, "Permission": permission }))
        .collect();
    claims["ac"] = json!(json!(ac).to_string());
    for (name, value) in more.as_object().unwrap() {
        match value {
            Value::Null => drop(claims.as_object_mut().unwrap().remove(name)),
            value => claims[name] = value.clone(),
        }
    }
    issuer::sign(issuer::secret("forge").as_bytes(), issuer::HEADER, &claims.to_string())
}

async fn start(backend: Backend) -> TestServer {
    TestServer::start_with(backend, |config| issuer::add(config, "forge", None)).await
}

/// A job of run 1 that may read and write `scopes`.
fn job<'a>(server: &'a TestServer, scopes: &[(&str, u8)]) -> CacheJob<'a> {
    CacheJob {
        server,
        token: token(server, "1", scopes, json!({})),
    }
}

impl CacheJob<'_> {
    /// Calls a method of the CacheService.
    pub async fn call(&self, method: &str, fields: Value) -> (u16, Value) {
        let reply = self
            .post(method, "application/json", fields.to_string().into_bytes())
            .await;
        let status = reply.status().as_u16();
        (
            status,
            serde_json::from_slice(&reply.bytes().await.unwrap()).expect("a Twirp reply is always JSON"),
        )
    }

    async fn post(&self, method: &str, content_type: &str, body: Vec<u8>) -> reqwest::Response {
        let url = format!(
            "{}/twirp/github.actions.results.api.v1.CacheService/{method}",
            self.server.url
        );
        self.server
            .http
            .post(url)
            .header("content-type", content_type)
            .bearer_auth(&self.token)
            .body(body)
            .send()
            .await
            .unwrap()
    }

    pub async fn create(&self, key: &str) -> String {
        let (status, reply) = self
            .call("CreateCacheEntry", json!({ "key": key, "version": VERSION }))
            .await;
        assert_eq!((status, &reply["ok"]), (200, &json!(true)), "{reply}");
        reply["signed_upload_url"].as_str().unwrap().to_owned()
    }

    pub async fn put(&self, link: &str, body: impl Into<Vec<u8>>) -> u16 {
        let body = body.into();
        let put = self
            .server
            .http
            .put(link)
            .header("x-ms-blob-type", "BlockBlob")
            .header("content-length", body.len());
        put.body(body).send().await.unwrap().status().as_u16()
    }

    pub async fn finalize(&self, key: &str, size_bytes: usize) -> (u16, Value) {
        let fields = json!({ "key": key, "version": VERSION, "size_bytes": size_bytes.to_string() });
        self.call("FinalizeCacheEntryUpload", fields).await
    }

    /// Saves an entry and returns its id.
    pub async fn save(&self, key: &str, bytes: &[u8]) -> String {
        let link = self.create(key).await;
        assert_eq!(self.put(&link, bytes).await, 201);
        let (status, reply) = self.finalize(key, bytes.len()).await;
        assert_eq!((status, &reply["ok"]), (200, &json!(true)), "{reply}");
        reply["entry_id"].as_str().unwrap().to_owned()
    }

    /// The matched key and the link, or `None` for a miss.
    pub async fn look_up(&self, key: &str, restore_keys: &[&str]) -> Option<(String, String)> {
        let fields = json!({ "key": key, "restore_keys": restore_keys, "version": VERSION });
        let (status, reply) = self.call("GetCacheEntryDownloadURL", fields).await;
        assert_eq!(status, 200, "{reply}");
        if reply == json!({ "ok": false }) {
            return None;
        }
        assert_eq!(reply["ok"], json!(true), "{reply}");
        let text = |field: &str| reply[field].as_str().unwrap().to_owned();
        Some((text("matched_key"), text("signed_download_url")))
    }

    pub async fn matched(&self, key: &str, restore_keys: &[&str]) -> Option<String> {
        self.look_up(key, restore_keys).await.map(|(key, _)| key)
    }

    pub async fn restore(&self, key: &str) -> Option<Vec<u8>> {
        let (_, link) = self.look_up(key, &[]).await?;
        let reply = self.server.http.get(link).send().await.unwrap();
        assert_eq!(reply.status(), 200);
        Some(reply.bytes().await.unwrap().to_vec())
    }

    // Version 1.

    async fn v1(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let url = format!("{}/_apis/artifactcache/{path}", self.server.url);
        let mut request = self
            .server
            .http
            .request(method.parse().unwrap(), url)
            .bearer_auth(&self.token);
        if let Some(body) = body {
            request = request
                .header("content-type", "application/json")
                .body(serde_json::to_vec_pretty(&body).unwrap());
        }
        let reply = request.send().await.unwrap();
        let status = reply.status().as_u16();
        let body = reply.bytes().await.unwrap();
        let json = if body.is_empty() {
            Value::Null
        } else {
            serde_json::from_slice(&body).unwrap()
        };
        (status, json)
    }

    pub async fn v1_reserve(&self, key: &str) -> i64 {
        let body = json!({ "key": key, "version": VERSION, "cacheSize": 10 });
        let (status, reply) = self.v1("POST", "caches", Some(body)).await;
        assert_eq!(status, 201, "{reply}");
        reply["cacheId"].as_i64().filter(|id| *id > 0).unwrap()
    }

    /// Sends a chunk without saying its length. Returns the status and what was said.
    pub async fn v1_chunk(&self, id: i64, range: &str, bytes: &'static [u8]) -> (u16, Value) {
        let frames = futures_util::stream::iter(bytes.chunks(3).map(Ok::<_, std::io::Error>));
        let reply = self
            .server
            .http
            .patch(format!("{}/_apis/artifactcache/caches/{id}", self.server.url))
            .bearer_auth(&self.token)
            .header("content-type", "application/octet-stream")
            .header("content-range", range)
            .body(reqwest::Body::wrap_stream(frames))
            .send()
            .await
            .unwrap();
        let status = reply.status().as_u16();
        let body = reply.bytes().await.unwrap();
        (status, serde_json::from_slice(&body).unwrap_or_default())
    }

    pub async fn v1_commit(&self, id: i64, size: u64) -> (u16, Value) {
        self.v1("POST", &format!("caches/{id}"), Some(json!({ "size": size })))
            .await
    }
}

/// Each of these tests runs on both backends.
macro_rules! on_both {
    ($($test:ident,)*) => {
        mod sqlite_disk {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                super::$test(super::Backend::SqliteDisk).await;
            })*
        }
        mod postgres_s3 {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                super::$test(super::Backend::PostgresS3).await;
            })*
        }
    };
}

on_both! {
    an_entry_is_saved_and_restored,
    blocks_make_an_entry,
    version_1_saves_and_restores,
    version_1_chunks_fit_together_or_not_at_all,
    protobuf_is_as_good_as_json,
    a_key_is_reserved_once,
    keys_match_as_documented,
    look_ups_agree_with_a_plain_model,
    scopes_and_repositories_are_apart,
    denials_are_in_the_clients_words,
    what_is_no_key_is_refused,
    only_its_run_finalizes_a_reservation,
    sizes_have_limits,
    the_least_recently_used_goes_first,
    what_nobody_uses_goes,
    reservations_that_nobody_finishes_go,
    an_evicted_entry_is_read_to_its_end,
    a_lost_entry_makes_room,
}

async fn an_entry_is_saved_and_restored(backend: Backend) {
    let server = start(backend).await;
    let job = job(&server, &[(MAIN, 3)]);
    assert_eq!(job.look_up("k-1", &["k-"]).await, None);
    let link = job.create("k-1").await;
    assert!(link.contains("/blob/cache/"), "{link}");
    // Nothing is seen before the end.
    assert_eq!(job.put(&link, *b"bytes").await, 201);
    assert_eq!(job.look_up("k-1", &["k-"]).await, None);
    assert_eq!(job.finalize("k-1", 4).await.0, 400);
    let (status, reply) = job.finalize("k-1", 5).await;
    assert_eq!(status, 200, "{reply}");
    assert!(reply["entry_id"].as_str().unwrap().parse::<i64>().unwrap() > 0);
    // Asked again, as after a lost answer.
    assert_eq!(job.finalize("k-1", 5).await, (200, reply));
    assert_eq!(job.finalize("k-1", 6).await.0, 400);
    assert_eq!(job.restore("k-1").await.unwrap(), b"bytes");
    assert_eq!(job.matched("k-", &[]).await.as_deref(), Some("k-1"));
    assert_eq!(job.matched("other", &["x", "k"]).await.as_deref(), Some("k-1"));
    // The content is final.
    assert_eq!(job.put(&link, *b"other").await, 409);

    let empty = job.save("empty", b"").await;
    assert!(!empty.is_empty());
    assert_eq!(job.restore("empty").await.unwrap(), b"");
    server.stop().await;
}

async fn blocks_make_an_entry(backend: Backend) {
    let server = start(backend).await;
    let job = job(&server, &[(MAIN, 3)]);
    let link = job.create("blocks").await;
    for (id, bytes) in [("QkJC", "second"), ("QUFB", "first, "), ("Q0ND", "nobody's")] {
        assert_eq!(job.put(&block_link(&link, id), bytes).await, 201);
    }
    assert_eq!(job.finalize("blocks", 13).await.0, 412);
    let list = block_list(&["QUFB", "QkJC"]);
    assert_eq!(job.put(&format!("{link}&comp=blocklist"), list).await, 201);
    assert_eq!(job.finalize("blocks", 13).await.0, 200);
    assert_eq!(job.restore("blocks").await.unwrap(), b"first, second");
    // Parts, as Go's client asks for the rest and the Azure client for pieces.
    let (_, link) = job.look_up("blocks", &[]).await.unwrap();
    for (range, expected) in [("bytes=7-", "second"), ("bytes=0-3", "firs")] {
        let reply = server.http.get(&link).header("x-ms-range", range).send().await.unwrap();
        assert_eq!(reply.status(), 206);
        assert_eq!(reply.text().await.unwrap(), expected);
    }
    server.stop().await;
}

async fn version_1_saves_and_restores(backend: Backend) {
    let server = start(backend).await;
    let job = job(&server, &[(MAIN, 3)]);
    let look_up = format!("cache?keys=k%20%2B-1%2Ck&version={VERSION}");
    assert_eq!(job.v1("GET", &look_up, None).await, (204, Value::Null));
    assert_eq!(
        job.v1("GET", "caches?key=k", None).await,
        (200, json!({ "totalCount": 0, "artifactCaches": [] }))
    );
    let id = job.v1_reserve("k +-1").await;
    let again = json!({ "key": "k +-1", "version": VERSION });
    let (status, reply) = job.v1("POST", "caches", Some(again)).await;
    assert_eq!(
        (status, &reply["typeKey"]),
        (409, &json!("ArtifactCacheItemAlreadyExistsException"))
    );
    // The last chunk first, and one twice.
    assert_eq!(job.v1_chunk(id, "bytes 6-9/*", b"6789").await.0, 204);
    assert_eq!(job.v1_chunk(id, "bytes 0-5/*", b"xxxxxx").await.0, 204);
    assert_eq!(job.v1_chunk(id, "bytes 0-5/*", b"012345").await.0, 204);
    assert_eq!(job.v1("GET", &look_up, None).await.0, 204);
    assert_eq!(job.v1_commit(id, 10).await, (204, Value::Null));
    assert_eq!(job.v1_commit(id, 10).await, (204, Value::Null));
    let (status, hit) = job.v1("GET", &look_up, None).await;
    assert_eq!(status, 200);
    assert_eq!(
        (&hit["cacheKey"], &hit["scope"], &hit["cacheVersion"]),
        (&json!("k +-1"), &json!(MAIN), &json!(VERSION))
    );
    assert!(hit["creationTime"].as_str().unwrap().ends_with('Z'));
    let bytes = server
        .http
        .get(hit["archiveLocation"].as_str().unwrap())
        .send()
        .await
        .unwrap();
    assert_eq!(
        (bytes.status().as_u16(), bytes.bytes().await.unwrap()),
        (200, "0123456789".into())
    );
    // Both versions see one cache.
    assert_eq!(job.restore("k +-1").await.unwrap(), b"0123456789");
    let saved = job.save("k-v2", b"2").await;
    let (_, hit) = job.v1("GET", &format!("cache?keys=k-v2&version={VERSION}"), None).await;
    assert_eq!(hit["cacheKey"], json!("k-v2"), "{saved}");
    let (_, near) = job.v1("GET", "caches?key=k", None).await;
    assert_eq!(near["totalCount"], json!(2), "{near}");
    let keys: Vec<_> = near["artifactCaches"]
        .as_array()
        .unwrap()
        .iter()
        .map(|near| &near["cacheKey"])
        .collect();
    assert_eq!(keys, ["k-v2", "k +-1"]);
    let stranger = self::job(&server, &[("refs/heads/other", 3)]);
    assert_eq!(stranger.v1("GET", "caches?key=k", None).await.1["totalCount"], json!(0));
    server.stop().await;
}

async fn version_1_chunks_fit_together_or_not_at_all(backend: Backend) {
    let server = start(backend).await;
    let job = job(&server, &[(MAIN, 3)]);
    let id = job.v1_reserve("k").await;
    for (range, bytes) in [
        ("bytes 0-5/*", b"01234".as_slice()),
        ("bytes 0-5/*", b"0123456"),
        ("bytes 0-/*", b"0"),
        ("0-0", b"0"),
    ] {
        let (status, reply) = job.v1_chunk(id, range, bytes).await;
        assert_eq!(status, 400, "{range} {reply}");
        assert!(reply["message"].is_string(), "{reply}");
    }
    assert_eq!(job.v1_chunk(id, "bytes 0-4/*", b"01234").await.0, 204);
    assert_eq!(job.v1_chunk(id, "bytes 6-9/*", b"6789").await.0, 204);
    let (status, reply) = job.v1_commit(id, 10).await;
    assert_eq!(status, 400);
    assert!(reply["message"].as_str().unwrap().contains("gap at byte 5"), "{reply}");
    assert_eq!(job.v1_chunk(id, "bytes 5-5/*", b"5").await.0, 204);
    assert_eq!(job.v1_commit(id, 11).await.0, 400);
    assert_eq!(job.v1_commit(id, 10).await.0, 204);
    assert_eq!(job.restore("k").await.unwrap(), b"0123456789");
    // Afterwards it is final.
    assert_eq!(job.v1_chunk(id, "bytes 0-0/*", b"x").await.0, 400);
    assert_eq!(job.v1_commit(id, 9).await.0, 400);
    for path in ["caches/-1", "caches/0", "caches/x"] {
        assert_eq!(job.v1("POST", path, Some(json!({ "size": 1 }))).await.0, 400, "{path}");
    }
    assert_eq!(job.v1_commit(id + 1000, 1).await.0, 404);
    // Another run's is nobody's business.
    let other = CacheJob {
        server: &server,
        token: token(&server, "2", &[(MAIN, 3)], json!({})),
    };
    let id = job.v1_reserve("mine").await;
    assert_eq!(other.v1_chunk(id, "bytes 0-0/*", b"x").await.0, 404);
    assert_eq!(other.v1_commit(id, 0).await.0, 404);
    server.stop().await;
}

#[derive(Clone, PartialEq, Message)]
struct Scope {
    #[prost(string, tag = "1")]
    scope: String,
    #[prost(int64, tag = "2")]
    permission: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Metadata {
    #[prost(int64, tag = "1")]
    repository_id: i64,
    #[prost(message, repeated, tag = "2")]
    scope: Vec<Scope>,
}

#[derive(Clone, PartialEq, Message)]
struct Create {
    #[prost(message, optional, tag = "1")]
    metadata: Option<Metadata>,
    #[prost(string, tag = "2")]
    key: String,
    #[prost(string, tag = "3")]
    version: String,
}

#[derive(Clone, PartialEq, Message)]
struct Finalize {
    #[prost(string, tag = "2")]
    key: String,
    #[prost(int64, tag = "3")]
    size_bytes: i64,
    #[prost(string, tag = "4")]
    version: String,
}

#[derive(Clone, PartialEq, Message)]
struct Get {
    #[prost(string, tag = "2")]
    key: String,
    #[prost(string, repeated, tag = "3")]
    restore_keys: Vec<String>,
    #[prost(string, tag = "4")]
    version: String,
}

/// `ok` and the two texts that creating and looking up answer with.
#[derive(Clone, PartialEq, Message)]
struct Texts {
    #[prost(bool, tag = "1")]
    ok: bool,
    #[prost(string, tag = "2")]
    second: String,
    #[prost(string, tag = "3")]
    third: String,
}

#[derive(Clone, PartialEq, Message)]
struct Finalized {
    #[prost(bool, tag = "1")]
    ok: bool,
    #[prost(int64, tag = "2")]
    entry_id: i64,
}

async fn binary<T: Message + Default>(job: &CacheJob<'_>, method: &str, message: &impl Message) -> T {
    let reply = job.post(method, "application/protobuf", message.encode_to_vec()).await;
    assert_eq!(reply.status(), 200);
    assert_eq!(reply.headers()["content-type"], "application/protobuf");
    T::decode(reply.bytes().await.unwrap()).unwrap()
}

async fn protobuf_is_as_good_as_json(backend: Backend) {
    let server = start(backend).await;
    let job = job(&server, &[(MAIN, 3)]);
    let create = Create {
        // Not ours to say.
        metadata: Some(Metadata {
            repository_id: 7,
            scope: vec![Scope {
                scope: "refs/heads/other".to_owned(),
                permission: 3,
            }],
        }),
        key: "k".to_owned(),
        version: VERSION.to_owned(),
    };
    let created: Texts = binary(&job, "CreateCacheEntry", &create).await;
    assert!(created.ok && created.third.is_empty());
    assert_eq!(job.put(&created.second, *b"bytes").await, 201);
    let finalize = Finalize {
        key: "k".to_owned(),
        size_bytes: 5,
        version: VERSION.to_owned(),
    };
    let finalized: Finalized = binary(&job, "FinalizeCacheEntryUpload", &finalize).await;
    assert!(finalized.ok && finalized.entry_id > 0);
    let mut get = Get {
        key: "x".to_owned(),
        restore_keys: vec!["k".to_owned()],
        version: VERSION.to_owned(),
    };
    let found: Texts = binary(&job, "GetCacheEntryDownloadURL", &get).await;
    assert_eq!((found.ok, found.third.as_str()), (true, "k"));
    assert_eq!(
        server
            .http
            .get(&found.second)
            .send()
            .await
            .unwrap()
            .text()
            .await
            .unwrap(),
        "bytes"
    );
    get.restore_keys.clear();
    let missed: Texts = binary(&job, "GetCacheEntryDownloadURL", &get).await;
    assert_eq!(missed, Texts::default());
    // Written where the token says.
    assert_eq!(job.restore("k").await.unwrap(), b"bytes");
    // Errors are JSON.
    let reply = job
        .post("CreateCacheEntry", "application/protobuf", create.encode_to_vec())
        .await;
    assert_eq!(reply.status(), 409);
    assert_eq!(reply.headers()["content-type"], "application/json");
    assert_eq!(
        serde_json::from_slice::<Value>(&reply.bytes().await.unwrap()).unwrap()["code"],
        json!("already_exists")
    );
    let reply = job
        .post("CreateCacheEntry", "application/protobuf", b"\x12\xff".to_vec())
        .await;
    assert_eq!(reply.status(), 400);
    server.stop().await;
}

async fn a_key_is_reserved_once(backend: Backend) {
    let server = start(backend).await;
    let job = job(&server, &[(MAIN, 3)]);
    let fields = json!({ "key": "k", "version": VERSION });
    let all = (0..8).map(|_| job.call("CreateCacheEntry", fields.clone()));
    let replies = futures_util::future::join_all(all).await;
    let won: Vec<_> = replies.iter().filter(|(status, _)| *status == 200).collect();
    assert_eq!(won.len(), 1, "{replies:?}");
    for (status, reply) in replies.iter().filter(|(status, _)| *status != 200) {
        assert_eq!((*status, &reply["code"]), (409, &json!("already_exists")));
    }
    let link = won[0].1["signed_upload_url"].as_str().unwrap();
    assert_eq!(job.put(link, *b"bytes").await, 201);
    assert_eq!(job.finalize("k", 5).await.0, 200);
    assert_eq!(job.call("CreateCacheEntry", fields).await.0, 409);
    // Another version is another entry.
    let other = json!({ "key": "k", "version": "2" });
    assert_eq!(job.call("CreateCacheEntry", other).await.0, 200);
    // A reservation that nobody finishes frees its key, whether or not the cleaner has come by.
    let dead = job.create("dead").await;
    server.advance(2 * HOUR);
    let heir = CacheJob {
        server: &server,
        token: token(&server, "2", &[(MAIN, 3)], json!({})),
    };
    heir.save("dead", b"heir").await;
    assert_eq!(heir.put(&dead, *b"late").await, 403);
    assert_eq!(heir.restore("dead").await.unwrap(), b"heir");
    server.stop().await;
}

async fn keys_match_as_documented(backend: Backend) {
    let server = start(backend).await;
    let job = job(&server, &[("refs/heads/feature", 3), (MAIN, 1)]);
    let main = self::job(&server, &[(MAIN, 3)]);
    for key in ["npm-a", "npm-b", "npm", "x_1", "xa1", "50%", "500", "b\\c"] {
        main.save(key, key.as_bytes()).await;
        server.advance(Duration::from_millis(5));
    }
    // Exact, then by prefix the newest, then by the restore keys in their order.
    assert_eq!(job.matched("npm", &[]).await.as_deref(), Some("npm"));
    assert_eq!(job.matched("npm-", &[]).await.as_deref(), Some("npm-b"));
    assert_eq!(job.matched("nope", &["npm-a", "npm"]).await.as_deref(), Some("npm-a"));
    assert_eq!(job.matched("nope", &["npm"]).await.as_deref(), Some("npm"));
    // What databases take for patterns are characters.
    assert_eq!(job.matched("x_", &[]).await.as_deref(), Some("x_1"));
    assert_eq!(job.matched("50%", &[]).await.as_deref(), Some("50%"));
    assert_eq!(job.matched("%", &["_"]).await, None);
    assert_eq!(job.matched("b\\", &[]).await.as_deref(), Some("b\\c"));
    assert_eq!(job.matched("NPM", &[]).await, None);
    // All of the first scope comes before the next.
    job.save("npm-old", b"feature").await;
    assert_eq!(job.matched("npm-a", &["npm-"]).await.as_deref(), Some("npm-old"));
    assert_eq!(main.matched("npm-old", &[]).await, None);
    // Another version never matches.
    let other = json!({ "key": "npm-a", "version": "2" });
    assert_eq!(
        job.call("GetCacheEntryDownloadURL", other).await,
        (200, json!({ "ok": false }))
    );
    // Go's client repeats the key, and more than fit are refused.
    assert_eq!(job.matched("x_", &["x_"]).await.as_deref(), Some("x_1"));
    let many = json!({ "key": "k", "version": VERSION, "restore_keys": vec!["k"; 11] });
    assert_eq!(job.call("GetCacheEntryDownloadURL", many).await.0, 400);
    server.stop().await;
}

/// Finalized entries as a list, and what the documents say of looking them up.
#[derive(Default)]
struct Model(Vec<Entry>);

struct Entry {
    scope: String,
    version: &'static str,
    key: String,
    /// When it was finalized, and its id.
    age: (i64, i64),
}

impl Model {
    fn look_up(&self, scopes: &[&str], key: &str, restore_keys: &[String], version: &str) -> Option<(String, String)> {
        let newest = |scope: &str, fits: &dyn Fn(&str) -> bool| {
            let fitting = self
                .0
                .iter()
                .filter(|entry| entry.scope == scope && entry.version == version && fits(&entry.key));
            fitting
                .max_by_key(|entry| entry.age)
                .map(|entry| (entry.scope.clone(), entry.key.clone()))
        };
        scopes.iter().find_map(|scope| {
            newest(scope, &|there| there == key)
                .or_else(|| newest(scope, &|there| there.starts_with(key)))
                .or_else(|| {
                    restore_keys
                        .iter()
                        .find_map(|prefix| newest(scope, &|there| there.starts_with(prefix.as_str())))
                })
        })
    }
}

async fn look_ups_agree_with_a_plain_model(backend: Backend) {
    const SCOPES: [&str; 3] = ["refs/heads/a", "refs/heads/A", ""];
    const VERSIONS: [&str; 2] = ["1", "%"];
    let server = start(backend).await;
    let services = &server.app.services;
    let principal = |scopes: &[&str]| Principal {
        run: RunKey {
            issuer: "forge".to_owned(),
            repository: "name:octo/demo".to_owned(),
            run_backend_id: "1".to_owned(),
        },
        repository_name: None,
        run_id: None,
        run_attempt: 1,
        job_backend_id: "build".to_owned(),
        cache_scopes: scopes
            .iter()
            .map(|scope| CacheScope {
                scope: (*scope).to_owned(),
                read: true,
                write: true,
            })
            .collect(),
        issued_at_ms: None,
        expires_at_ms: i64::MAX,
    };
    // Few and nasty characters, so that many keys begin alike.
    let key = || "[aAb%_\\\\é🚢\u{10ffff}\u{d7ff}\u{e000} ]{0,3}[aA%_]";
    let mut runner = TestRunner::deterministic();
    let mut any = |strategy: BoxedStrategy<(usize, usize, String, Vec<String>)>| {
        strategy.new_tree(&mut runner).unwrap().current()
    };
    let choice = || {
        (
            0..SCOPES.len(),
            0..VERSIONS.len(),
            key(),
            prop::collection::vec(key(), 0..4),
        )
            .boxed()
    };
    let mut model = Model::default();
    for n in 0..120 {
        let (scope, version, key, _) = any(choice());
        let writer = principal(&SCOPES[scope..=scope]);
        let now_ms = server.clock.load(Ordering::Relaxed);
        let new = NewCacheEntry {
            principal: &writer,
            scope: SCOPES[scope],
            key: &key,
            version: VERSIONS[version],
            now_ms,
            dead_since_ms: 0,
        };
        let Reserved::Upload(id, blob) = services.db.reserve_cache_entry(&new).await.unwrap() else {
            continue;
        };
        // Some are never finished.
        if n % 7 > 0 {
            services.db.commit_whole(blob, None, None, now_ms).await.unwrap();
            let candidate = services
                .db
                .cache_candidate(&writer, SCOPES[scope], Reservation::Id(id))
                .await;
            let candidate = candidate.unwrap().unwrap();
            assert!(services.db.finalize_cache_entry(&candidate, now_ms).await.unwrap());
            model.0.push(Entry {
                scope: SCOPES[scope].to_owned(),
                version: VERSIONS[version],
                key,
                age: (now_ms, id.0),
            });
        }
        if n % 3 == 0 {
            server.advance(Duration::from_millis(1));
        }
    }
    assert!(model.0.len() > 40);
    let mut hits = 0;
    for _ in 0..300 {
        let (first, version, key, restore_keys) = any(choice());
        let mut scopes = SCOPES;
        scopes.rotate_left(first);
        let scopes = &scopes[..1 + first];
        let prefixes: Vec<&str> = restore_keys.iter().map(String::as_str).collect();
        let found = services
            .look_up_cache(&principal(scopes), &key, &prefixes, VERSIONS[version])
            .await
            .unwrap()
            .map(|hit| (hit.scope, hit.key));
        hits += usize::from(found.is_some());
        let expected = model.look_up(scopes, &key, &restore_keys, VERSIONS[version]);
        assert_eq!(found, expected, "{key:?} {restore_keys:?} in {scopes:?}");
    }
    assert!((50..300).contains(&hits), "{hits}");
    server.stop().await;
}

async fn scopes_and_repositories_are_apart(backend: Backend) {
    let server = start(backend).await;
    let main = job(&server, &[(MAIN, 3)]);
    main.save("k", b"main").await;
    let pull = job(&server, &[("refs/pull/7/merge", 3), (MAIN, 1)]);
    // It reads the default branch's, and what it saves under the same key stays its own.
    assert_eq!(pull.restore("k").await.unwrap(), b"main");
    pull.save("k", b"pull").await;
    assert_eq!(pull.restore("k").await.unwrap(), b"pull");
    assert_eq!(main.restore("k").await.unwrap(), b"main");
    for scope in [
        "refs/heads/other",
        "refs/heads/main/child",
        "refs/heads/mai",
        "refs/tags/v1",
        "refs/pull/8/merge",
        "refs/heads/MAIN",
        "",
    ] {
        let other = job(&server, &[(scope, 3)]);
        assert_eq!(other.look_up("k", &["k"]).await, None, "{scope}");
    }
    // Whatever a body says of scopes and repositories.
    let stranger = job(&server, &[("refs/heads/stranger", 3)]);
    let fields = json!({
        "metadata": { "repository_id": "1", "scope": [{ "scope": MAIN, "permission": "3" }] },
        "key": "k", "version": VERSION,
    });
    assert_eq!(
        stranger.call("GetCacheEntryDownloadURL", fields.clone()).await,
        (200, json!({ "ok": false }))
    );
    assert_eq!(stranger.call("CreateCacheEntry", fields).await.0, 200);
    assert_eq!(main.restore("k").await.unwrap(), b"main");
    // Another repository, the same one by number, another issuer.
    for more in [
        json!({ "repository": "octo/other" }),
        json!({ "repository_id": 7 }),
        json!({ "repository": "Octo/Demo", "repository_id": "8" }),
    ] {
        let other = CacheJob {
            server: &server,
            token: token(&server, "1", &[(MAIN, 3)], more.clone()),
        };
        assert_eq!(other.look_up("k", &["k"]).await, None, "{more}");
    }
    let minted = CacheJob {
        server: &server,
        token: server.token("octo/demo", "1", "build"),
    };
    assert_eq!(minted.look_up("k", &["k"]).await, None);
    minted.save("k", b"minted").await;
    // The name is the same in any case.
    let shouting = CacheJob {
        server: &server,
        token: token(&server, "9", &[(MAIN, 3)], json!({ "repository": "OCTO/Demo" })),
    };
    assert_eq!(shouting.restore("k").await.unwrap(), b"main");
    // A link is good for one thing.
    let (_, link) = main.look_up("k", &[]).await.unwrap();
    assert_eq!(main.put(&link, *b"x").await, 403);
    assert_eq!(main.put(&link.replace("sp=r", "sp=w"), *b"x").await, 403);
    let as_artifact = link.replace("/blob/cache/", "/blob/art/");
    assert_eq!(server.http.get(as_artifact).send().await.unwrap().status(), 403);
    server.stop().await;
}

async fn denials_are_in_the_clients_words(backend: Backend) {
    let server = start(backend).await;
    let asked = json!({ "key": "k", "version": VERSION });
    let denied = async |job: &CacheJob<'_>, method: &str| job.call(method, asked.clone()).await;
    let reader = job(&server, &[(MAIN, 1)]);
    let no_write = (
        200,
        json!({ "ok": false, "message": "cache write denied: token has no writable scopes" }),
    );
    assert_eq!(denied(&reader, "CreateCacheEntry").await, no_write);
    assert_eq!(denied(&reader, "FinalizeCacheEntryUpload").await, no_write);
    assert_eq!(
        denied(&reader, "GetCacheEntryDownloadURL").await,
        (200, json!({ "ok": false }))
    );
    let (status, reply) = reader.v1("POST", "caches", Some(asked.clone())).await;
    assert_eq!(status, 403);
    assert!(
        reply["message"].as_str().unwrap().starts_with("cache write denied:"),
        "{reply}"
    );

    let writer = job(&server, &[(MAIN, 2)]);
    assert_eq!(denied(&writer, "CreateCacheEntry").await.0, 200);
    let (status, reply) = denied(&writer, "GetCacheEntryDownloadURL").await;
    assert_eq!((status, &reply["code"]), (403, &json!("permission_denied")));
    assert!(reply["msg"].as_str().unwrap().contains("cache read denied:"), "{reply}");
    assert_eq!(
        writer
            .v1("GET", &format!("cache?keys=k&version={VERSION}"), None)
            .await
            .0,
        403
    );

    let nowhere = CacheJob {
        server: &server,
        token: token(&server, "1", &[(MAIN, 3)], json!({ "repository": null })),
    };
    let (status, reply) = denied(&nowhere, "GetCacheEntryDownloadURL").await;
    assert_eq!(status, 403);
    assert!(reply["msg"].as_str().unwrap().contains("cache read denied:"), "{reply}");
    let (status, reply) = denied(&nowhere, "CreateCacheEntry").await;
    assert_eq!((status, &reply["ok"]), (200, &json!(false)));
    assert!(
        reply["message"].as_str().unwrap().starts_with("cache write denied:"),
        "{reply}"
    );

    // Events of outsiders read, and write only where nobody else reads.
    let outsider = |scopes: &[(&str, u8)], event: &str| CacheJob {
        server: &server,
        token: token(&server, "1", scopes, json!({ "event_name": event })),
    };
    let comment = outsider(&[(MAIN, 3)], "issue_comment");
    assert_eq!(denied(&comment, "CreateCacheEntry").await, no_write);
    let pull = outsider(&[(MAIN, 3), ("refs/pull/7/merge", 3)], "pull_request");
    pull.save("pull", b"x").await;
    assert_eq!(job(&server, &[(MAIN, 3)]).look_up("pull", &[]).await, None);
    outsider(&[(MAIN, 3)], "push").save("pushed", b"x").await;
    server.stop().await;
}

async fn what_is_no_key_is_refused(backend: Backend) {
    let server = start(backend).await;
    let job = job(&server, &[(MAIN, 3)]);
    let long = "x".repeat(513);
    for key in ["", "   ", "a,b", "a\0", "a\n", &long] {
        let fields = json!({ "key": key, "version": VERSION, "size_bytes": 1 });
        for method in [
            "CreateCacheEntry",
            "FinalizeCacheEntryUpload",
            "GetCacheEntryDownloadURL",
        ] {
            let (status, reply) = job.call(method, fields.clone()).await;
            assert_eq!(
                (status, &reply["code"]),
                (400, &json!("invalid_argument")),
                "{method} {key:?}"
            );
        }
    }
    let many = ["k"; 11].join(",");
    for (keys, version) in [
        ("", VERSION),
        (many.as_str(), VERSION),
        (&"k".repeat(5000), VERSION),
        ("k", ""),
    ] {
        let (status, reply) = job
            .v1("GET", &format!("cache?keys={keys}&version={version}"), None)
            .await;
        assert_eq!(status, 400, "{keys}");
        assert!(reply["message"].is_string(), "{reply}");
    }
    assert_eq!(job.v1("GET", "cache?keys=k", None).await.0, 400);
    assert_eq!(job.v1("POST", "caches", Some(json!({ "key": "k" }))).await.0, 400);
    // As long as keys, scopes and versions may be, and hard to compress.
    let noise = |n: u32| -> String {
        let mut state = n;
        std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            char::from_u32(0x1_0000 + (state >> 8) % 0x1_0000).unwrap()
        })
        .take(512)
        .collect()
    };
    let scope = format!("refs/heads/{}", "é".repeat(186));
    let far = self::job(&server, &[(&scope, 3)]);
    for n in 0..3 {
        far.save(&noise(n), b"x").await;
        assert_eq!(far.restore(&noise(n)).await.unwrap(), b"x");
    }
    let too_far = self::job(&server, &[(&"x".repeat(400), 3)]);
    let (status, reply) = too_far
        .call("CreateCacheEntry", json!({ "key": "k", "version": VERSION }))
        .await;
    assert_eq!((status, &reply["ok"]), (200, &json!(false)));
    assert_eq!(too_far.look_up("k", &[]).await, None);
    server.stop().await;
}

async fn only_its_run_finalizes_a_reservation(backend: Backend) {
    let server = start(backend).await;
    let job = job(&server, &[(MAIN, 3)]);
    let link = job.create("k").await;
    assert_eq!(job.put(&link, *b"bytes").await, 201);
    for (run, scope) in [("2", MAIN), ("1", "refs/heads/other")] {
        let other = CacheJob {
            server: &server,
            token: token(&server, run, &[(scope, 3), (MAIN, 3)], json!({})),
        };
        let (status, reply) = other.finalize("k", 5).await;
        assert_eq!((status, &reply["code"]), (404, &json!("not_found")), "{run} {scope}");
    }
    let other = json!({ "key": "k", "version": "2", "size_bytes": 5 });
    assert_eq!(job.call("FinalizeCacheEntryUpload", other).await.0, 404);
    assert_eq!(job.finalize("l", 5).await.0, 404);
    // A number is as good as a string.
    let number = json!({ "key": "k", "version": VERSION, "size_bytes": 5 });
    assert_eq!(job.call("FinalizeCacheEntryUpload", number).await.0, 200);
    server.stop().await;
}

async fn sizes_have_limits(backend: Backend) {
    let server = TestServer::start_with(backend, |config| {
        issuer::add(config, "forge", None);
        config.cache.max_entry_bytes = 10;
    })
    .await;
    let job = job(&server, &[(MAIN, 3)]);
    let link = job.create("k").await;
    assert_eq!(job.put(&link, *b"elevenbytes").await, 413);
    assert_eq!(job.put(&block_link(&link, "QUFB"), *b"six.by").await, 201);
    assert_eq!(job.put(&block_link(&link, "QkJC"), *b"five.").await, 413);
    assert_eq!(job.put(&link, *b"ten.bytes.").await, 201);
    let (status, reply) = job.finalize("k", 11).await;
    assert_eq!((status, &reply["code"]), (403, &json!("resource_exhausted")));
    for size in [json!(-1), json!("9223372036854775808"), json!("x")] {
        let fields = json!({ "key": "k", "version": VERSION, "size_bytes": size });
        assert_eq!(job.call("FinalizeCacheEntryUpload", fields).await.0, 400, "{size}");
    }
    assert_eq!(job.finalize("k", 10).await.0, 200);
    // Version 1 says what it wants, and the client shows why it does not get it.
    let (status, reply) = job
        .v1(
            "POST",
            "caches",
            Some(json!({ "key": "l", "version": VERSION, "cacheSize": 11 })),
        )
        .await;
    assert_eq!(status, 400);
    assert!(reply["message"].as_str().unwrap().contains("10 bytes"), "{reply}");
    let id = job.v1_reserve("l").await;
    assert_eq!(job.v1_chunk(id, "bytes 8-10/*", b"abc").await.0, 400);
    assert_eq!(job.v1_commit(id, 11).await.0, 400);
    // An artifact has limits of its own.
    let artifacts = server.job_of("octo/demo", "1", "build");
    artifacts.upload("a", &[0; 20]).await;
    server.stop().await;
}

impl TestServer {
    /// One pass of the cleaner.
    async fn clean(&self) -> Report {
        self.app.services.clean().await.unwrap().expect("nobody else cleans")
    }

    /// What `fsck` finds.
    async fn problems(&self) -> Vec<Kind> {
        let mut found = Vec::new();
        self.app
            .services
            .fsck(
                fsck::Options {
                    deep: true,
                    repair: false,
                },
                &mut |problem| found.push(problem.kind),
            )
            .await
            .unwrap();
        found
    }
}

async fn the_least_recently_used_goes_first(backend: Backend) {
    let server = TestServer::start_with(backend, |config| {
        issuer::add(config, "forge", None);
        config.cache.max_bytes_per_repository = 100;
        config.cleaner.batch = 2;
    })
    .await;
    let job = job(&server, &[(MAIN, 3)]);
    for key in ["a", "b", "c", "d", "e"] {
        job.save(key, &[0; 25]).await;
        server.advance(Duration::from_secs(1));
    }
    let other = CacheJob {
        server: &server,
        token: token(&server, "1", &[(MAIN, 3)], json!({ "repository": "octo/other" })),
    };
    other.save("a", &[0; 100]).await;
    // What was looked up a while later is used more recently than all others.
    server.advance(Duration::from_secs(400));
    assert!(job.look_up("a", &[]).await.is_some());
    let report = server.clean().await;
    assert_eq!((report.evicted_cache_entries, report.abandoned_uploads), (1, 0));
    assert_eq!(job.look_up("b", &[]).await, None);
    for key in ["a", "c", "d", "e"] {
        assert!(job.look_up(key, &[]).await.is_some(), "{key}");
    }
    assert!(other.look_up("a", &[]).await.is_some());
    // Many at once, in steps.
    server.advance(Duration::from_secs(400));
    job.save("large", &[0; 100]).await;
    assert_eq!(server.clean().await.evicted_cache_entries, 4);
    assert_eq!(job.restore("large").await.unwrap(), [0; 100]);
    assert_eq!(server.clean().await, Report::default());
    // What went can be saved again.
    job.save("b", b"again").await;
    assert_eq!(server.clean().await.evicted_cache_entries, 1);
    assert_eq!(job.restore("b").await.unwrap(), b"again");
    assert_eq!(server.problems().await, []);
    server.stop().await;
}

async fn what_nobody_uses_goes(backend: Backend) {
    let server = start(backend).await;
    job(&server, &[(MAIN, 3)]).save("idle", b"x").await;
    job(&server, &[(MAIN, 3)]).save("used", b"x").await;
    server.advance(6 * 24 * HOUR);
    assert!(job(&server, &[(MAIN, 3)]).look_up("used", &[]).await.is_some());
    assert_eq!(server.clean().await.evicted_cache_entries, 0);
    server.advance(24 * HOUR);
    assert_eq!(server.clean().await.evicted_cache_entries, 1);
    let job = job(&server, &[(MAIN, 3)]);
    assert_eq!(job.look_up("idle", &[]).await, None);
    assert!(job.look_up("used", &[]).await.is_some());
    // With the grace time the bytes go too, and then every trace.
    server.advance(12 * HOUR);
    let report = server.clean().await;
    assert_eq!((report.deleted_objects, report.dropped_blobs), (1, 1));
    assert_eq!(server.problems().await, []);
    server.stop().await;
}

async fn reservations_that_nobody_finishes_go(backend: Backend) {
    let server = start(backend).await;
    let job = job(&server, &[(MAIN, 3)]);
    let link = job.create("k").await;
    assert_eq!(job.put(&link, *b"bytes").await, 201);
    server.advance(2 * HOUR - Duration::from_millis(1));
    assert_eq!(server.clean().await.abandoned_uploads, 0);
    assert_eq!(
        job.call("CreateCacheEntry", json!({ "key": "k", "version": VERSION }))
            .await
            .0,
        409
    );
    server.advance(Duration::from_millis(1));
    assert_eq!(server.clean().await.abandoned_uploads, 1);
    assert_eq!(job.finalize("k", 5).await.0, 404);
    job.save("k", b"again").await;
    server.advance(12 * HOUR);
    assert_eq!(server.clean().await.deleted_objects, 1);
    assert_eq!(server.problems().await, []);
    server.stop().await;
}

async fn an_evicted_entry_is_read_to_its_end(backend: Backend) {
    const SIZE: usize = 20 << 20;
    let server = TestServer::start_with(backend, |config| {
        issuer::add(config, "forge", None);
        config.cache.max_bytes_per_repository = SIZE as u64;
    })
    .await;
    let job = job(&server, &[(MAIN, 3)]);
    let bytes: Vec<u8> = (0..SIZE).map(|i| (i >> 9) as u8).collect();
    job.save("old", &bytes).await;
    let (_, link) = job.look_up("old", &[]).await.unwrap();
    let mut download = server.http.get(&link).send().await.unwrap().bytes_stream();
    let mut read = download.next().await.unwrap().unwrap().to_vec();
    server.advance(Duration::from_secs(1));
    job.save("new", b"new").await;
    assert_eq!(server.clean().await.evicted_cache_entries, 1);
    // Nobody begins any more, who began gets all.
    assert_eq!(server.http.get(&link).send().await.unwrap().status(), 404);
    assert_eq!(server.clean().await, Report::default());
    while let Some(piece) = download.next().await {
        read.extend_from_slice(&piece.unwrap());
    }
    assert!(read == bytes);
    server.stop().await;
}

async fn a_lost_entry_makes_room(backend: Backend) {
    let server = start(backend).await;
    let job = job(&server, &[(MAIN, 3)]);
    job.save("k", b"bytes").await;
    let (_, link) = job.look_up("k", &[]).await.unwrap();
    let blob = crate::common::blob_of(&link);
    let services = &server.app.services;
    for key in services.db.objects_of(blob).await.unwrap() {
        services.store.delete(&key).await.unwrap();
    }
    assert_eq!(server.problems().await, [Kind::Lost]);
    // The scrub finds it too, and takes it out.
    server.advance(31 * 24 * HOUR);
    assert!(services.scrub_next(Uuid::new_v4()).await.unwrap());
    let job = self::job(&server, &[(MAIN, 3)]);
    assert_eq!(job.look_up("k", &[]).await, None);
    job.save("k", b"again").await;
    assert_eq!(job.restore("k").await.unwrap(), b"again");
    assert_eq!(server.problems().await, []);
    server.stop().await;
}
