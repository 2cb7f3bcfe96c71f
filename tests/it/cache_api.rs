//! The cache by hand-made requests: version 2 in JSON and protobuf, version 1, who may read and write what, and what the
//! cleaner takes away.

use std::time::Duration;

use prost::Message;
use serde_json::{Value, json};

use crate::common::{Backend, TestServer, block_link, block_list, issuer};

const VERSION: &str = "4982f7847d41153f1825e05c5c05916bb69e860b48ee5c408d68e1b87abf48e4";
const MAIN: &str = "refs/heads/main";
const HOUR: Duration = Duration::from_secs(3600);

/// One job as a cache client acts for it.
pub struct CacheJob<'a> {
    pub server: &'a TestServer,
    pub token: String,
}

/// A token of the issuer `forge` for a job of run `run` of `octo/demo` with the claim `ac`; `more` claims over it.
fn token(server: &TestServer, run: &str, scopes: &[(&str, u8)], more: Value) -> String {
    let now_ms = server.clock.load(std::sync::atomic::Ordering::Relaxed);
    let mut claims = issuer::claims("forge", "octo/demo", run, "build", now_ms);
    let ac: Vec<_> = scopes
        .iter()
        .map(|(scope, permission)| json!({ "Scope": scope, "Permission": permission }))
        .collect();
    claims["ac"] = json!(json!(ac).to_string());
    for (name, value) in more.as_object().unwrap() {
        claims[name] = value.clone();
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

    async fn v1_reserve(&self, key: &str) -> i64 {
        let body = json!({ "key": key, "version": VERSION, "cacheSize": 10 });
        let (status, reply) = self.v1("POST", "caches", Some(body)).await;
        assert_eq!(status, 201, "{reply}");
        reply["cacheId"].as_i64().filter(|id| *id > 0).unwrap()
    }

    /// Sends a chunk without saying its length. Returns the status and what was said.
    async fn v1_chunk(&self, id: i64, range: &str, bytes: &'static [u8]) -> (u16, Value) {
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

    async fn v1_commit(&self, id: i64, size: u64) -> (u16, Value) {
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
    assert_eq!(heir.save("dead", b"heir").await.parse::<i64>().is_ok(), true);
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
