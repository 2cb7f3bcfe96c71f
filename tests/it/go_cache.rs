//! What Go's cache client sends (github.com/tonistiigi/go-actions-cache, of BuildKit's `type=gha`), as requests, on
//! every backend.
//!
//! It differs from the JavaScript clients: the key stands among the restore keys, sizes are JSON numbers, blocks have
//! 88-character ids and 1 MiB, reads begin at an offset, a conflict is told by its `code`, and a blob reply without
//! `x-ms-request-id` makes it panic.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use reqwest::{RequestBuilder, Response};
use serde_json::{Value, json};

use super::common::{Backend, TestServer, block_link, block_list};

const MIB: usize = 1024 * 1024;
/// One constant for everything that BuildKit stores.
const VERSION: &str = "693bb7016429d80366022f036f84856888c9f13e00145f5f6f4dce303a38d6f2";

/// A job of run 1 of `octo/demo`.
struct Go<'a> {
    server: &'a TestServer,
    token: String,
}

impl Go<'_> {
    async fn call(&self, method: &str, mut message: Value) -> (u16, Value) {
        message["version"] = json!(VERSION);
        let url = format!(
            "{}/twirp/github.actions.results.api.v1.CacheService/{method}",
            self.server.url
        );
        let request = self.server.http.post(url).bearer_auth(&self.token);
        let request = request.header("content-type", "application/json");
        let reply = request.body(message.to_string()).send().await.unwrap();
        let status = reply.status().as_u16();
        (status, serde_json::from_slice(&reply.bytes().await.unwrap()).unwrap())
    }

    /// Where the newest entry is whose key begins with one of `keys`, and that key. The first is the one wanted.
    async fn load(&self, keys: &[&str]) -> Option<(String, String)> {
        let message = json!({ "key": keys[0], "restore_keys": keys });
        let (status, reply) = self.call("GetCacheEntryDownloadURL", message).await;
        assert_eq!(status, 200, "{reply}");
        let text = |name: &str| reply[name].as_str().unwrap().to_owned();
        let hit = reply["ok"] == true;
        hit.then(|| (text("signed_download_url"), text("matched_key")))
    }

    async fn save(&self, key: &str, content: &[u8]) {
        let (status, reply) = self.call("CreateCacheEntry", json!({ "key": key })).await;
        assert_eq!((status, &reply["ok"]), (200, &json!(true)), "{reply}");
        let link = reply["signed_upload_url"].as_str().unwrap();
        self.upload(link, content).await;
        let message = json!({ "key": key, "size_bytes": content.len() });
        let (status, reply) = self.call("FinalizeCacheEntryUpload", message).await;
        assert_eq!((status, &reply["ok"]), (200, &json!(true)), "{reply}");
        let id = reply["entry_id"]
            .as_str()
            .expect("Go reads entry_id from a string only");
        assert!(id.parse::<i64>().unwrap() > 0);
    }

    /// As azblob's `UploadStream` does: one Put Blob up to 1 MiB, else blocks of that size.
    async fn upload(&self, link: &str, content: &[u8]) {
        let put = |url: &str, body: &[u8]| {
            let request = self.server.http.put(url).header("x-ms-version", "2025-05-05");
            request.header("content-length", body.len()).body(body.to_vec())
        };
        if content.len() <= MIB {
            let reply = azure(put(link, content).header("x-ms-blob-type", "BlockBlob")).await;
            assert_eq!(reply.status(), 201);
            return;
        }
        let mut ids = Vec::new();
        for (block, bytes) in content.chunks(MIB).enumerate() {
            ids.push(block_id(block));
            let url = block_link(link, &ids[block]);
            let reply = azure(put(&url, bytes)).await;
            assert_eq!(reply.status(), 201);
        }
        let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
        let reply = azure(put(&format!("{link}&comp=blocklist"), &block_list(&ids))).await;
        assert_eq!(reply.status(), 201);
        assert!(reply.headers().contains_key("etag"));
    }

    /// Reads as its `ReaderAt` does, which knows no end.
    async fn read(&self, link: &str, offset: usize) -> Vec<u8> {
        let mut request = self.server.http.get(link);
        if offset > 0 {
            request = request.header("x-ms-range", format!("bytes={offset}-"));
        }
        let reply = azure(request).await;
        assert_eq!(reply.status(), if offset > 0 { 206 } else { 200 });
        if offset > 0 {
            let range = reply.headers()["content-range"].to_str().unwrap();
            assert!(range.starts_with(&format!("bytes {offset}-")), "{range}");
        }
        reply.bytes().await.unwrap().to_vec()
    }
}

/// Sends a request for a blob; whatever the answer is, it has an id.
async fn azure(request: RequestBuilder) -> Response {
    let reply = request.send().await.unwrap();
    assert!(reply.headers().contains_key("x-ms-request-id"), "{reply:?}");
    reply
}

/// azblob's: 16 bytes of a UUID, the block's number, and zeros up to 64 bytes.
fn block_id(block: usize) -> String {
    let mut id = [0xfb; 64];
    id[16..20].copy_from_slice(&u32::try_from(block).unwrap().to_be_bytes());
    id[20..].fill(0);
    STANDARD.encode(id)
}

async fn build_kit_saves_and_loads(backend: Backend) {
    let server = TestServer::start(backend).await;
    let go = Go {
        token: server.token("octo/demo", "1", "build"),
        server: &server,
    };
    assert_eq!(go.load(&["blob-a"]).await, None);

    let content: Vec<u8> = (0..3 * MIB + 5).map(|at| (at % 253) as u8).collect();
    assert_eq!(block_id(0).len(), 88);
    go.save("blob-a", &content).await;
    let (link, matched) = go.load(&["blob-a"]).await.unwrap();
    assert_eq!(matched, "blob-a");
    for offset in [0, 1, MIB - 1, MIB, content.len() - 1] {
        assert!(go.read(&link, offset).await == content[offset..], "from {offset}");
    }
    let behind = format!("bytes={}-", content.len());
    let reply = azure(server.http.get(&link).header("x-ms-range", behind)).await;
    assert_eq!(reply.status(), 416);

    // The conflict that it looks for when two builds end at once.
    let (status, reply) = go.call("CreateCacheEntry", json!({ "key": "blob-a" })).await;
    assert_eq!((status, &reply["code"]), (409, &json!("already_exists")), "{reply}");

    // The index is written anew under the next number, and found by what comes before it.
    for number in 1..=3 {
        let content = format!("index {number}");
        go.save(&format!("index-main#{number}"), content.as_bytes()).await;
        let (link, matched) = go.load(&["index-main#"]).await.unwrap();
        assert_eq!(matched, format!("index-main#{number}"));
        assert_eq!(go.read(&link, 0).await, content.as_bytes());
        assert_eq!(go.read(&link, 3).await, content.as_bytes()[3..]);
    }
    go.save("index-main", b"no number").await;
    let (_, matched) = go.load(&["index-main#"]).await.unwrap();
    assert_eq!(matched, "index-main#3");

    // A link that is not ours: refused in a way that makes it ask for another one.
    let reply = azure(server.http.get(format!("{link}x"))).await;
    assert_eq!(reply.status(), 403);
    server.stop().await;
}

/// Version 1, which it speaks where ACTIONS_CACHE_SERVICE_V2 is not set: one chunk after the other, of a length that
/// it says.
async fn build_kit_with_version_1(backend: Backend) {
    let server = TestServer::start(backend).await;
    let base = format!("{}/_apis/artifactcache", server.url);
    let token = server.token("octo/demo", "1", "build");
    let with_token = |request: RequestBuilder| {
        let request = request.bearer_auth(&token);
        request.header("accept", "application/json;api-version=6.0-preview.1")
    };
    let look_up = || async {
        let query = format!("{base}/cache?keys=blob-a%2Cblob-&version={VERSION}");
        with_token(server.http.get(query)).send().await.unwrap()
    };
    let reserve = || async {
        let body = json!({ "key": "blob-a", "version": VERSION });
        let request = with_token(server.http.post(format!("{base}/caches")));
        let request = request.header("content-type", "application/json");
        let reply = request.body(body.to_string()).send().await.unwrap();
        let status = reply.status().as_u16();
        (
            status,
            serde_json::from_slice::<Value>(&reply.bytes().await.unwrap()).unwrap(),
        )
    };
    assert_eq!(look_up().await.status(), 204);

    let (status, reply) = reserve().await;
    assert_eq!(status, 201, "{reply}");
    let entry = format!("{base}/caches/{}", reply["cacheId"].as_i64().unwrap());
    let content: Vec<u8> = (0..2 * MIB + 5).map(|at| (at % 253) as u8).collect();
    for (chunk, bytes) in content.chunks(MIB).enumerate() {
        let (first, last) = (chunk * MIB, chunk * MIB + bytes.len() - 1);
        let request = with_token(server.http.patch(&entry));
        let request = request.header("content-range", format!("bytes {first}-{last}/*"));
        let request = request.header("content-type", "application/octet-stream");
        let reply = request.body(bytes.to_vec()).send().await.unwrap();
        assert_eq!(reply.status(), 204);
    }
    let request = with_token(server.http.post(&entry)).header("content-type", "application/json");
    let reply = request
        .body(json!({ "size": content.len() }).to_string())
        .send()
        .await
        .unwrap();
    assert_eq!(reply.status(), 204);

    let (status, reply) = reserve().await;
    assert_eq!(status, 409, "{reply}");
    assert_eq!(reply["typeKey"], "ArtifactCacheItemAlreadyExistsException");

    let found: Value = serde_json::from_slice(&look_up().await.bytes().await.unwrap()).unwrap();
    assert_eq!(found["cacheKey"], "blob-a");
    let link = found["archiveLocation"].as_str().unwrap();
    for offset in [0, MIB + 1] {
        let range = format!("bytes={offset}-");
        let reply = azure(server.http.get(link).header("range", range)).await;
        assert_eq!(reply.status(), 206);
        assert!(reply.bytes().await.unwrap() == content[offset..], "from {offset}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn on_sqlite_and_disk() {
    build_kit_saves_and_loads(Backend::SqliteDisk).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn on_postgres_and_s3() {
    build_kit_saves_and_loads(Backend::PostgresS3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn version_1_on_sqlite_and_disk() {
    build_kit_with_version_1(Backend::SqliteDisk).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn version_1_on_postgres_and_s3() {
    build_kit_with_version_1(Backend::PostgresS3).await;
}
