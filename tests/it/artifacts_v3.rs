//! Artifacts of version 3 by hand-made requests, on both backends; what they are to clients of version 4; and what the
//! cleaner leaves of them. Python reads the zips: they must be right for others, not for us.

use std::collections::BTreeSet;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use crc_fast::{CrcAlgorithm, checksum};
use futures_util::TryStreamExt;
use futures_util::future::join_all;
use md5::Digest;
use serde_json::{Value, json};
use wharfinger::model::ObjectKey;
use wharfinger::service::fsck::{Kind, Options};

use crate::common::{Backend, Job, TestServer};
use crate::db_contract::Raw;

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);
/// Clients send 8 MiB.
const CHUNK: usize = 1000;

/// A job as a client of version 3 acts for it.
pub struct V3<'a>(pub Job<'a>);

impl<'a> V3<'a> {
    fn of(server: &'a TestServer, job: &str) -> Self {
        Self(server.job_of("octo/demo", "1", job))
    }

    fn request(&self, method: reqwest::Method, url: &str) -> reqwest::RequestBuilder {
        self.0.server.http.request(method, url).bearer_auth(&self.0.token)
    }

    pub fn artifacts(&self) -> String {
        format!(
            "{}/_apis/pipelines/workflows/{}/artifacts?api-version=6.0-preview",
            self.0.server.url, self.0.run
        )
    }

    pub async fn create(&self, body: Value) -> (u16, Value) {
        let request = self.request(reqwest::Method::POST, &self.artifacts());
        answer(
            request
                .header("content-type", "application/json")
                .body(body.to_string()),
        )
        .await
    }

    /// Creates or joins an artifact. Returns the URL of its container.
    pub async fn open(&self, name: &str) -> String {
        let (status, reply) = self.create(json!({ "Type": "actions_storage", "Name": name })).await;
        assert_eq!(status, 201, "{reply}");
        reply["fileContainerResourceUrl"].as_str().unwrap().to_owned()
    }

    /// Puts a part of a file. `length`: it is packed, and this is what it was.
    pub async fn part(
        &self,
        container: &str,
        path: &str,
        bytes: &[u8],
        from: usize,
        total: usize,
        length: Option<u64>,
    ) -> (u16, Value) {
        let last = (from + bytes.len()) as i64 - 1;
        let mut request = self
            .request(reqwest::Method::PUT, &format!("{container}?itemPath={}", form(path)))
            .header("content-type", "application/octet-stream")
            .header("content-range", format!("bytes {from}-{last}/{total}"))
            .header("content-length", bytes.len())
            .header("x-actions-results-crc64", crc64(bytes))
            .header("x-actions-results-md5", STANDARD.encode(md5::Md5::digest(bytes)));
        if let Some(length) = length {
            request = request
                .header("content-encoding", "gzip")
                .header("x-tfs-filelength", length);
        }
        answer(request.body(bytes.to_vec())).await
    }

    /// Puts a whole file in chunks.
    pub async fn put(&self, container: &str, path: &str, bytes: &[u8], length: Option<u64>) {
        let mut from = 0;
        loop {
            let to = bytes.len().min(from + CHUNK);
            let (status, reply) = self
                .part(container, path, &bytes[from..to], from, bytes.len(), length)
                .await;
            assert_eq!(status, 201, "{path}: {reply}");
            from = to;
            if from == bytes.len() {
                break;
            }
        }
    }

    pub async fn finalize(&self, name: &str, size: u64) -> (u16, Value) {
        let url = format!("{}&artifactName={}", self.artifacts(), form(name));
        let request = self.request(reqwest::Method::PATCH, &url);
        let body = json!({ "Size": size }).to_string();
        answer(request.header("content-type", "application/json").body(body)).await
    }

    /// Creates, puts and finalizes. Returns the container's URL.
    pub async fn upload(&self, name: &str, files: &[(&str, &[u8])]) -> String {
        let container = self.open(name).await;
        for (path, bytes) in files {
            self.put(&container, &format!("{name}/{path}"), bytes, None).await;
        }
        let size = files.iter().map(|(_, bytes)| bytes.len() as u64).sum();
        let (status, reply) = self.finalize(name, size).await;
        assert_eq!(status, 200, "{reply}");
        container
    }

    pub async fn list(&self) -> Vec<Value> {
        self.values(&self.artifacts()).await
    }

    pub async fn items(&self, container: &str, path: &str) -> Vec<Value> {
        self.values(&format!("{container}?itemPath={}", form(path))).await
    }

    async fn values(&self, url: &str) -> Vec<Value> {
        let (status, reply) = answer(self.request(reqwest::Method::GET, url)).await;
        assert_eq!(status, 200, "{reply}");
        let values = reply["value"].as_array().unwrap().clone();
        assert_eq!(reply["count"], values.len());
        values
    }

    /// A file's bytes as they are stored, and what they are encoded in.
    pub async fn get(&self, url: &str) -> (u16, Option<String>, Vec<u8>) {
        let request = self
            .request(reqwest::Method::GET, url)
            .header("accept-encoding", "gzip")
            .header("accept", "application/octet-stream;api-version=6.0-preview");
        let reply = request.send().await.unwrap();
        let encoding = reply.headers().get("content-encoding");
        let encoding = encoding.map(|encoding| encoding.to_str().unwrap().to_owned());
        (reply.status().as_u16(), encoding, reply.bytes().await.unwrap().to_vec())
    }
}

async fn answer(request: reqwest::RequestBuilder) -> (u16, Value) {
    let reply = request.send().await.unwrap();
    let status = reply.status().as_u16();
    let bytes = reply.bytes().await.unwrap();
    (status, serde_json::from_slice(&bytes).expect("a reply is always JSON"))
}

/// As `URLSearchParams` writes it.
fn form(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b' ' => "+".to_owned(),
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'*' | b'-' | b'.' | b'_' => char::from(byte).to_string(),
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

fn crc64(bytes: &[u8]) -> String {
    STANDARD.encode(checksum(CrcAlgorithm::Crc64Nvme, bytes).to_le_bytes())
}

fn python(script: &str, input: &[u8]) -> Vec<u8> {
    let mut python = Command::new("python3")
        .args(["-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    python.stdin.take().unwrap().write_all(input).unwrap();
    let output = python.wait_with_output().unwrap();
    assert!(output.status.success());
    output.stdout
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    python(
        "import sys,gzip; sys.stdout.buffer.write(gzip.compress(sys.stdin.buffer.read(), mtime=0))",
        bytes,
    )
}

/// What Python finds in a zip, every member checked against its CRC: name, how it is kept, content.
pub fn unzip(zip: &[u8]) -> Vec<(String, bool, Vec<u8>)> {
    let script = "
import sys,io,json,zipfile
z = zipfile.ZipFile(io.BytesIO(sys.stdin.buffer.read()))
assert z.testzip() is None
for i in z.infolist():
    assert i.date_time == (1980, 1, 1, 0, 0, 0) and i.external_attr >> 16 == 0o100644
print(json.dumps([[i.filename, i.compress_type == zipfile.ZIP_DEFLATED, list(z.read(i))] for i in z.infolist()]))";
    serde_json::from_slice(&python(script, zip)).unwrap()
}

fn names(zip: &[u8]) -> Vec<String> {
    unzip(zip).into_iter().map(|(name, ..)| name).collect()
}

fn noise(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    })
    .take(size)
    .collect()
}

async fn objects(server: &TestServer) -> BTreeSet<ObjectKey> {
    let objects: Vec<_> = server.app.services.store.list_all().try_collect().await.unwrap();
    objects.into_iter().map(|object| object.key).collect()
}

/// The digest of the run's only artifact, as soon as it is there.
async fn digest_of(job: &Job<'_>) -> String {
    for _ in 0..2000 {
        let (_, reply) = job.call("ListArtifacts", json!({})).await;
        if let Some(digest) = reply["artifacts"][0]["digest"].as_str() {
            return digest.to_owned();
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("it is not verified");
}

/// Cleans until there is nothing left that is due now.
async fn clean(server: &TestServer) {
    for _ in 0..3 {
        server.app.services.clean().await.unwrap().unwrap();
    }
}

async fn healthy(server: &TestServer) {
    let mut told = Vec::new();
    let options = Options {
        deep: true,
        repair: false,
    };
    let tell = &mut |problem: &wharfinger::service::fsck::Problem| told.push(format!("{problem:?}"));
    server.app.services.fsck(options, tell).await.unwrap();
    assert_eq!(told, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn files_come_back_one_by_one_and_as_a_zip() {
    for backend in Backend::ALL {
        let server = TestServer::start(backend).await;
        let job = V3::of(&server, "build");
        let text = b"something that packs well, ".repeat(4000);
        let packed = gzip(&text);
        let large = noise(1, 10 * CHUNK + 7);
        let (status, reply) = job
            .create(json!({ "Type": "actions_storage", "Name": "small art", "RetentionDays": 5 }))
            .await;
        assert_eq!(
            (status, &reply["size"], &reply["name"]),
            (201, &json!(-1), &json!("small art"))
        );
        let container = reply["fileContainerResourceUrl"].as_str().unwrap().to_owned();
        assert!(container.starts_with(&format!("{}/", server.url)), "{container}");
        job.put(
            &container,
            "small art/sub/compress.txt",
            &packed,
            Some(text.len() as u64),
        )
        .await;
        job.put(&container, "small art\\win\\ü 100%+.txt", b"hello\n", None)
            .await;
        job.put(&container, "small art/empty.txt", b"", None).await;
        job.put(&container, "small art/large.bin", &large, None).await;
        assert!(job.list().await.is_empty(), "not before it is finalized");
        assert!(job.0.names().await.is_empty());
        let total = (text.len() + 6 + large.len()) as u64;
        let (status, reply) = job.finalize("small art", total).await;
        assert_eq!((status, &reply["size"]), (200, &json!(total)));

        let list = job.list().await;
        assert_eq!(list.len(), 1);
        assert_eq!(
            (&list[0]["name"], &list[0]["size"]),
            (&json!("small art"), &json!(total))
        );
        assert_eq!(list[0]["fileContainerResourceUrl"], json!(container));
        let items = job.items(&container, "small art").await;
        let expected = [
            ("small art/empty.txt", 0, None, &b""[..]),
            ("small art/large.bin", large.len(), None, &large),
            ("small art/sub/compress.txt", text.len(), Some("gzip"), &packed),
            ("small art/win/ü 100%+.txt", 6, None, b"hello\n"),
        ];
        assert_eq!(items.len(), expected.len());
        for (item, (path, length, encoding, bytes)) in items.iter().zip(expected) {
            assert_eq!((&item["path"], &item["fileLength"]), (&json!(path), &json!(length)));
            assert_eq!(
                (&item["itemType"], &item["status"]),
                (&json!("file"), &json!("created"))
            );
            let (status, found, content) = job.get(item["contentLocation"].as_str().unwrap()).await;
            assert_eq!((status, found.as_deref()), (200, encoding));
            assert!(content == bytes, "{path}");
        }
        assert_eq!(job.items(&container, "small art/sub").await.len(), 1);
        assert_eq!(job.items(&container, "small art/su").await.len(), 0);
        assert_eq!(job.items(&container, "small art/empty.txt").await.len(), 1);

        // To clients of version 4 it is an artifact like any other.
        let (_, reply) = job.0.call("ListArtifacts", json!({})).await;
        let listed = &reply["artifacts"][0];
        // The verifier may not have come to it yet.
        assert!(listed["digest"].is_null() || listed["digest"].is_string());
        let zip = job.0.download("small art").await;
        assert_eq!(listed["size"], json!(zip.len().to_string()));
        let members = unzip(&zip);
        assert_eq!(
            members,
            [
                ("empty.txt".to_owned(), false, Vec::new()),
                ("large.bin".to_owned(), false, large.clone()),
                ("sub/compress.txt".to_owned(), true, text.clone()),
                ("win/ü 100%+.txt".to_owned(), false, b"hello\n".to_vec()),
            ]
        );
        let link = job.0.link("small art").await;
        let reply = server
            .http
            .get(&link)
            .header("range", "bytes=20-5000")
            .send()
            .await
            .unwrap();
        assert_eq!(
            (reply.status(), &reply.headers()["content-type"]),
            (
                reqwest::StatusCode::PARTIAL_CONTENT,
                &"application/zip".parse().unwrap()
            )
        );
        assert!(reply.bytes().await.unwrap() == zip[20..=5000]);
        let digest: String = sha2::Sha256::digest(&zip)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(digest_of(&job.0).await, format!("sha256:{digest}"));

        // The same files give the same zip, in whatever order and pieces they came.
        let again = job.open("again").await;
        for (path, bytes, length) in [
            ("again/win/ü 100%+.txt", &b"hello\n"[..], None),
            ("again/large.bin", &large, None),
            ("again/empty.txt", b"", None),
            ("again/sub/compress.txt", &packed, Some(text.len() as u64)),
        ] {
            let (status, _) = job.part(&again, path, bytes, 0, bytes.len(), length).await;
            assert_eq!(status, 201);
        }
        assert_eq!(job.finalize("again", total).await.0, 200);
        assert!(job.0.download("again").await == zip);
        server.advance(HOUR);
        healthy(&server).await;
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_packed_file_is_a_member_however_it_was_cut() {
    let text = b"some text, and the same again; ".repeat(300);
    let packed = gzip(&text);
    let length = Some(text.len() as u64);
    for backend in Backend::ALL {
        let server = TestServer::start(backend).await;
        let job = V3::of(&server, "build");
        let container = job.open("cut").await;
        // The trailer ends in the last chunk, or is all of it, or begins in the one before.
        for last in 1..=12 {
            let path = format!("cut/{last:02}");
            let cuts = [0, 30, packed.len() - last - 3, packed.len() - last, packed.len()];
            for cut in cuts.windows(2) {
                let part = &packed[cut[0]..cut[1]];
                let (status, reply) = job.part(&container, &path, part, cut[0], packed.len(), length).await;
                assert_eq!(status, 201, "{reply}");
            }
        }
        // Of a named pipe the client says that it has no bytes.
        job.put(&container, "cut/pipe", &packed, Some(0)).await;
        assert_eq!(job.finalize("cut", 12 * text.len() as u64).await.0, 200);
        let members = unzip(&job.0.download("cut").await);
        assert_eq!(members.len(), 13);
        assert!(
            members
                .iter()
                .all(|(_, deflated, content)| *deflated && *content == text)
        );
        let items = job.items(&container, "cut").await;
        assert!(items.iter().all(|item| item["fileLength"] == json!(text.len())));
        healthy(&server).await;
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_came_as_gzip_and_is_none_is_kept_but_not_published() {
    for backend in Backend::ALL {
        let server = TestServer::start(backend).await;
        let job = V3::of(&server, "build");
        let container = job.open("odd").await;
        job.put(&container, "odd/fine", b"fine", None).await;
        for (bytes, length) in [
            (gzip(b"ten bytes?"), 11),
            (b"no gzip at all".to_vec(), 100),
            (vec![0x1f], 1),
        ] {
            job.put(&container, "odd/odd", &bytes, Some(length)).await;
            let items = job.items(&container, "odd/odd").await;
            assert_eq!(items[0]["fileLength"], json!(length));
            let (status, encoding, content) = job.get(items[0]["contentLocation"].as_str().unwrap()).await;
            assert_eq!((status, encoding.as_deref()), (200, Some("gzip")));
            assert_eq!(content, bytes);
            let (status, reply) = job.finalize("odd", 1).await;
            assert_eq!(status, 400, "{reply}");
            assert!(
                reply["message"].as_str().unwrap().contains("odd came as gzip"),
                "{reply}"
            );
        }
        assert!(job.0.names().await.is_empty());
        // Sent anew, it is.
        job.put(&container, "odd/odd", &gzip(b"ten bytes!"), Some(10)).await;
        assert_eq!(job.finalize("odd", 14).await.0, 200);
        assert_eq!(names(&job.0.download("odd").await), ["fine", "odd"]);
        server.advance(3 * HOUR);
        clean(&server).await;
        // Two chunks of files, the headers, and nothing of what came to nothing.
        assert_eq!(objects(&server).await.len(), 3, "{backend:?}");
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn several_jobs_fill_one_artifact() {
    for backend in Backend::ALL {
        let server = TestServer::start(backend).await;
        let (one, two) = (V3::of(&server, "one"), V3::of(&server, "two"));
        let container = one.upload("shared", &[("a", b"a of one"), ("b", b"b of one")]).await;
        let id = one.list().await[0]["containerId"].clone();
        let old_link = one.0.link("shared").await;
        let old_zip = one.0.download("shared").await;

        // What the second adds is seen when it finalizes; what it has begun is not.
        assert_eq!(two.open("shared").await, container);
        two.put(&container, "shared/b", b"b of two, which is longer", None)
            .await;
        two.put(&container, "shared/c", b"c of two", None).await;
        let half = two.part(&container, "shared/half", b"half", 0, 8, None).await;
        assert_eq!(half.0, 201);
        assert!(one.0.download("shared").await == old_zip);
        assert_eq!(two.finalize("shared", 33).await.0, 200);
        let expected = [
            ("a", &b"a of one"[..]),
            ("b", b"b of two, which is longer"),
            ("c", b"c of two"),
        ];
        let members = unzip(&two.0.download("shared").await);
        let found: Vec<_> = members
            .iter()
            .map(|(name, _, content)| (name.as_str(), &content[..]))
            .collect();
        assert_eq!(found, expected);
        assert_eq!(two.list().await[0]["containerId"], id);
        assert_eq!(server.http.get(&old_link).send().await.unwrap().status(), 404);

        // Nothing new: nothing is done.
        let link = one.0.link("shared").await;
        assert_eq!(one.finalize("shared", 16).await.0, 200);
        assert_eq!(server.http.get(&link).send().await.unwrap().status(), 200);
        // More than ever came.
        assert_eq!(one.finalize("shared", 50).await.0, 400);
        assert_eq!(one.finalize("nothing", 0).await.0, 404);

        // The replaced file and the headers of the first zip go; all that the second shows stays.
        assert_eq!(objects(&server).await.len(), 4 + 1 + 2);
        server.advance(3 * HOUR);
        clean(&server).await;
        assert_eq!(objects(&server).await.len(), 3 + 1 + 1);
        server.advance(30 * HOUR);
        clean(&server).await;
        let (one, two) = (V3::of(&server, "one"), V3::of(&server, "two"));
        assert_eq!(unzip(&one.0.download("shared").await), members);
        assert_eq!(one.items(&container, "shared").await.len(), 3);
        healthy(&server).await;
        // And it can still be added to.
        two.part(&container, "shared/half", b"more", 4, 8, None).await;
        assert_eq!(one.finalize("shared", 0).await.0, 200);
        assert_eq!(names(&one.0.download("shared").await), ["a", "b", "c", "half"]);

        let (status, _) = one.0.call("DeleteArtifact", json!({ "name": "shared" })).await;
        assert_eq!(status, 200);
        assert!(one.list().await.is_empty());
        assert_eq!(one.get(&format!("{container}?itemPath=shared")).await.0, 403);
        assert_eq!(two.part(&container, "shared/late", b"late", 0, 4, None).await.0, 403);
        server.advance(3 * HOUR);
        clean(&server).await;
        assert_eq!(objects(&server).await, BTreeSet::new(), "{backend:?}");
        server.advance(30 * HOUR);
        clean(&server).await;
        let raw = Raw::of(&server).await;
        for table in [
            "artifacts",
            "containers",
            "files",
            "chunks",
            "blobs",
            "blocks",
            "garbage",
        ] {
            assert_eq!(raw.number(&format!("SELECT count(*) FROM {table}")).await, 0, "{table}");
        }
        healthy(&server).await;
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_that_finalize_at_once_all_get_their_files_in() {
    const JOBS: usize = 8;
    for backend in Backend::ALL {
        let server = TestServer::start(backend).await;
        join_all((0..JOBS).map(async |number| {
            let job = V3::of(&server, &format!("job-{number}"));
            let container = job.open("matrix").await;
            for file in 0..5 {
                // One that all of them send, and others that are their own.
                job.put(&container, "matrix/same", format!("from {number}").as_bytes(), None)
                    .await;
                let path = format!("matrix/{number}/{file}");
                job.put(&container, &path, &noise(file, 1500), None).await;
            }
            let (status, reply) = job.finalize("matrix", 5 * 1506).await;
            assert_eq!(status, 200, "{reply}");
        }))
        .await;
        let job = V3::of(&server, "reader");
        let members = unzip(&job.0.download("matrix").await);
        assert_eq!(members.len(), 5 * JOBS + 1);
        assert!(members.last().unwrap().2.starts_with(b"from "));
        server.advance(40 * HOUR);
        clean(&server).await;
        let job = V3::of(&server, "reader");
        assert_eq!(unzip(&job.0.download("matrix").await), members);
        healthy(&server).await;
        assert_eq!(objects(&server).await.len(), 5 * JOBS * 2 + 2, "{backend:?}");
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_come_in_order_and_may_be_repeated() {
    for backend in Backend::ALL {
        let server = TestServer::start(backend).await;
        let job = V3::of(&server, "build");
        let container = job.open("order").await;
        let part = async |path: &str, bytes: &[u8], from, total| {
            let path = format!("order/{path}");
            job.part(&container, &path, bytes, from, total, None).await.0
        };
        assert_eq!(part("f", b"bb", 2, 6).await, 400, "not begun");
        assert_eq!(part("f", b"aa", 0, 6).await, 201);
        assert_eq!(part("f", b"cc", 4, 6).await, 400, "a gap");
        assert_eq!(part("f", b"bb", 2, 7).await, 400, "another length");
        assert_eq!(part("f", b"bb", 2, 6).await, 201);
        assert_eq!(part("f", b"bb", 2, 6).await, 201, "its answer may be lost");
        assert_eq!(part("f", b"xx", 2, 6).await, 400, "other bytes");
        assert_eq!(part("f", b"b", 2, 6).await, 400, "other bytes");
        assert_eq!(part("f", b"cc", 4, 6).await, 201);
        assert_eq!(part("f", b"cc", 4, 6).await, 201);
        assert_eq!(part("f", b"xx", 4, 6).await, 400);
        // Begun anew, the old one is there until the new one is complete.
        assert_eq!(part("f", b"new", 0, 5).await, 201);
        assert_eq!(job.finalize("order", 6).await.0, 200);
        assert_eq!(unzip(&job.0.download("order").await)[0].2, b"aabbcc");
        assert_eq!(part("f", b"er", 3, 5).await, 201);
        assert_eq!(job.finalize("order", 0).await.0, 200);
        assert_eq!(unzip(&job.0.download("order").await)[0].2, b"newer");
        // A file that others replace from the middle stays what either sent, never a mixture.
        let other = V3::of(&server, "other");
        assert_eq!(part("g", b"11", 0, 4).await, 201);
        assert_eq!(other.part(&container, "order/g", b"22", 0, 4, None).await.0, 201);
        assert_eq!(part("g", b"11", 2, 4).await, 201);
        assert_eq!(other.part(&container, "order/g", b"22", 2, 4, None).await.0, 201);
        assert_eq!(job.finalize("order", 0).await.0, 200);
        assert_eq!(unzip(&job.0.download("order").await)[1].2, b"2222");
        // Two that differ in case are two.
        assert_eq!(part("README", b"1", 0, 1).await, 201);
        assert_eq!(part("readme", b"2", 0, 1).await, 201);
        assert_eq!(job.items(&container, "order").await.len(), 4);
        assert_eq!(job.finalize("order", 0).await.0, 200);
        server.advance(40 * HOUR);
        clean(&server).await;
        healthy(&server).await;
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_not_what_was_sent_are_refused() {
    let server = TestServer::start(Backend::SqliteDisk).await;
    let job = V3::of(&server, "build");
    let container = job.open("sums").await;
    for (name, value) in [
        ("x-actions-results-crc64", crc64(b"other")),
        ("x-actions-results-crc64", "AAAA".to_owned()),
        ("x-actions-results-md5", STANDARD.encode(md5::Md5::digest(b"other"))),
        ("x-actions-results-md5", "not base64".to_owned()),
    ] {
        let request = job
            .request(reqwest::Method::PUT, &format!("{container}?itemPath=sums%2Ff"))
            .header("content-range", "bytes 0-4/5")
            .header(name, value)
            .body("bytes");
        assert_eq!(answer(request).await.0, 400, "{name}");
    }
    // Clients before 1.1.2 send none.
    let request = job
        .request(reqwest::Method::PUT, &format!("{container}?itemPath=sums%2Ff"))
        .header("content-range", "bytes 0-4/5")
        .body("bytes");
    assert_eq!(answer(request).await.0, 201);
    assert_eq!(job.items(&container, "sums").await.len(), 1);
    assert_eq!(objects(&server).await.len(), 1);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_is_of_one_kind() {
    for backend in Backend::ALL {
        let server = TestServer::start(backend).await;
        let job = V3::of(&server, "build");
        job.0.upload("four", b"bytes").await;
        job.0.create("four, pending").await;
        let four = async |name: &str| job.create(json!({ "Type": "actions_storage", "Name": name })).await;
        for name in ["four", "four, pending"] {
            let (status, reply) = four(name).await;
            assert_eq!(status, 409, "{reply}");
            assert!(reply["message"].as_str().unwrap().contains("exists"), "{reply}");
        }
        job.open("three, pending").await;
        job.upload("three", &[("f", b"bytes")]).await;
        for name in ["three", "three, pending"] {
            let (status, reply) = job
                .0
                .call("CreateArtifact", json!({ "name": name, "version": 4 }))
                .await;
            assert_eq!((status, &reply["code"]), (409, &json!("already_exists")));
        }
        // Each kind of client lists what it can read.
        assert_eq!(job.list().await.len(), 1);
        assert_eq!(
            BTreeSet::from_iter(job.0.names().await),
            BTreeSet::from(["four".to_owned(), "three".to_owned()])
        );
        // When its time is up a name is free for either kind.
        server.advance(91 * DAY);
        let job = V3::of(&server, "build");
        job.0.upload("three", b"now of version 4").await;
        job.upload("four", &[("f", b"now of version 3")]).await;
        assert_eq!(job.0.download("three").await, b"now of version 4");
        assert_eq!(names(&job.0.download("four").await), ["f"]);
        clean(&server).await;
        server.advance(DAY);
        clean(&server).await;
        healthy(&server).await;
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_run_itself_sees_its_containers() {
    for backend in Backend::ALL {
        let server = TestServer::start(backend).await;
        let job = V3::of(&server, "build");
        let container = job.upload("mine", &[("f", b"secret")]).await;
        let others = [
            V3(server.job_of("octo/demo", "2", "build")),
            V3(server.job_of("octo/other", "1", "build")),
        ];
        for other in &others {
            assert!(other.list().await.is_empty());
            let file = format!("{container}/file?itemPath=mine%2Ff");
            for url in [&container, &format!("{container}?itemPath=mine"), &file] {
                assert_eq!(other.get(url).await.0, 403);
            }
            assert_eq!(other.part(&container, "mine/f", b"theirs", 0, 6, None).await.0, 403);
            assert_eq!(other.finalize("mine", 0).await.0, 404);
            // What is not there at all gets the same words.
            let missing = container.replace("Containers/", "Containers/9");
            let words = answer(other.request(reqwest::Method::GET, &container)).await;
            assert_eq!(words, answer(other.request(reqwest::Method::GET, &missing)).await);
        }
        // The run of the path is the token's, by its number.
        for run in ["2", "01x", "", "-1", "9223372036854775808"] {
            let url = job.artifacts().replace("workflows/1/", &format!("workflows/{run}/"));
            let (status, ..) = job.get(&url).await;
            assert_eq!(status, 403, "{run}");
        }
        let unnumbered = V3(server.job_of("octo/demo", "0ce7-aa", "build"));
        assert_eq!(unnumbered.get(&unnumbered.artifacts()).await.0, 403);
        assert_eq!(server.http.get(job.artifacts()).send().await.unwrap().status(), 401);
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_are_those_of_all_artifacts() {
    for backend in Backend::ALL {
        let server = TestServer::start_with(backend, |config| {
            config.artifacts.max_per_job = 2;
            config.artifacts.max_size_bytes = 3000;
            config.artifacts.max_files = 3;
            config.uploads.max_block_bytes = 2000;
        })
        .await;
        let job = V3::of(&server, "build");
        let container = job.open("one").await;
        job.open("two").await;
        let (status, reply) = job.create(json!({ "Type": "actions_storage", "Name": "three" })).await;
        assert_eq!(status, 403, "{reply}");
        assert!(reply["message"].as_str().unwrap().contains("insufficient usage"));
        assert_eq!(job.open("one").await, container, "it is there already");
        assert_eq!(
            V3::of(&server, "another").create(json!({ "Name": "three" })).await.0,
            201
        );
        for body in [
            json!({ "Name": "a/b" }),
            json!({ "Name": "" }),
            json!({}),
            json!({ "Name": "x", "Type": "other" }),
            json!({ "Name": "x", "RetentionDays": -1 }),
            json!({ "Name": "x", "RetentionDays": "many" }),
        ] {
            assert_eq!(job.create(body.clone()).await.0, 400, "{body}");
        }
        let put = async |path: &str, size: usize| job.part(&container, path, &noise(1, size), 0, size, None).await.0;
        assert_eq!(put("one/a", 2001).await, 400);
        assert_eq!(put("one/a", 2000).await, 201);
        assert_eq!(put("one/b", 1000).await, 201);
        assert_eq!(put("one/c", 1).await, 400);
        assert_eq!(put("one/c", 0).await, 201);
        assert_eq!(put("one/d", 0).await, 400, "the fourth file");
        assert_eq!(put("one/c", 0).await, 201, "the third again");
        assert_eq!(job.finalize("one", 3000).await.0, 200);
        assert_eq!(names(&job.0.download("one").await), ["a", "b", "c"]);
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn how_long_files_stay() {
    for backend in Backend::ALL {
        let server = TestServer::start(backend).await;
        let job = V3::of(&server, "build");
        // Given up.
        let given_up = job.open("given up").await;
        job.put(&given_up, "given up/f", b"bytes", None).await;
        // Kept for five days, and in a second wish for ten.
        for days in [5, 10, 7] {
            let (status, _) = job
                .create(json!({ "Type": "actions_storage", "Name": "kept", "RetentionDays": days }))
                .await;
            assert_eq!(status, 201);
        }
        let (_, reply) = job.create(json!({ "Name": "kept", "RetentionDays": 1 })).await;
        let kept = reply["fileContainerResourceUrl"].as_str().unwrap();
        job.put(kept, "kept/f", b"bytes", None).await;
        assert_eq!(job.finalize("kept", 5).await.0, 200);
        let (_, reply) = job.create(json!({ "Name": "short", "RetentionDays": 1 })).await;
        let short = reply["fileContainerResourceUrl"].as_str().unwrap();
        job.put(short, "short/f", b"bytes", None).await;
        assert_eq!(job.finalize("short", 5).await.0, 200);
        // A zip that came to nothing, as after a crash.
        let raw = Raw::of(&server).await;
        let zip = wharfinger::model::BlobId::fresh();
        let now_ms = server.app.services.clock.now_ms();
        server.app.services.db.begin_zip(zip, now_ms).await.unwrap();
        assert_eq!(objects(&server).await.len(), 5);

        server.advance(DAY + HOUR);
        // Whoever joins an upload begins it again.
        let job = V3::of(&server, "build");
        assert_eq!(job.open("given up").await, given_up);
        clean(&server).await;
        assert_eq!(
            raw.number("SELECT count(*) FROM blobs WHERE state = 'deleting'").await,
            3
        );
        assert_eq!(job.list().await.len(), 1);
        server.advance(DAY + HOUR);
        clean(&server).await;
        let job = V3::of(&server, "build");
        assert_eq!(job.get(&given_up).await.0, 403);
        server.advance(3 * HOUR);
        clean(&server).await;
        assert_eq!(objects(&server).await.len(), 2);
        healthy(&server).await;
        server.advance(5 * DAY);
        clean(&server).await;
        let job = V3::of(&server, "build");
        assert_eq!(names(&job.0.download("kept").await), ["f"]);
        server.advance(9 * DAY);
        clean(&server).await;
        server.advance(3 * HOUR);
        clean(&server).await;
        server.advance(DAY);
        clean(&server).await;
        assert_eq!(objects(&server).await, BTreeSet::new());
        for table in [
            "artifacts",
            "containers",
            "files",
            "chunks",
            "blobs",
            "blocks",
            "garbage",
        ] {
            assert_eq!(
                raw.number(&format!("SELECT count(*) FROM {table}")).await,
                0,
                "{table} {backend:?}"
            );
        }
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_of_many_files_is_listed_and_published_in_pages() {
    const FILES: usize = 1100;
    for backend in Backend::ALL {
        let server = TestServer::start(backend).await;
        let job = V3::of(&server, "build");
        let container = job.open("many").await;
        let numbers: Vec<usize> = (0..FILES).collect();
        for page in numbers.chunks(50) {
            join_all(page.iter().map(async |number| {
                let path = format!("many/{}/{number}.txt", number % 7);
                job.put(&container, &path, number.to_string().as_bytes(), None).await;
            }))
            .await;
        }
        let size = numbers.iter().map(|number| number.to_string().len() as u64).sum();
        assert_eq!(job.finalize("many", size).await.0, 200);
        let items = job.items(&container, "many").await;
        let paths: BTreeSet<_> = items.iter().map(|item| item["path"].as_str().unwrap()).collect();
        assert_eq!((items.len(), paths.len()), (FILES, FILES));
        let members = unzip(&job.0.download("many").await);
        assert_eq!(members.len(), FILES);
        for (name, _, content) in members {
            assert!(name.ends_with(&format!("/{}.txt", String::from_utf8(content).unwrap())));
        }
        healthy(&server).await;
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fsck_finds_files_without_their_chunks() {
    for backend in Backend::ALL {
        let server = TestServer::start(backend).await;
        let job = V3::of(&server, "build");
        job.upload("whole", &[("f", &noise(1, 3 * CHUNK))]).await;
        job.upload("broken", &[("f", &noise(2, 3 * CHUNK)), ("g", b"g")]).await;
        healthy(&server).await;
        let raw = Raw::of(&server).await;
        raw.execute(
            "DELETE FROM chunks WHERE file_offset = 1000 AND file_id IN (
                 SELECT f.id FROM files f JOIN artifacts a ON a.container_id = f.container_id WHERE a.name = 'broken')",
        )
        .await;
        let mut told = Vec::new();
        let tell =
            &mut |problem: &wharfinger::service::fsck::Problem| told.push((problem.kind, problem.subject.clone()));
        server.app.services.fsck(Options::default(), tell).await.unwrap();
        assert_eq!(told.len(), 1, "{told:?}");
        assert_eq!(told[0].0, Kind::Broken);
        assert!(told[0].1.starts_with("file f of container "), "{told:?}");
        // An object that is gone is missed by the zip.
        for key in objects(&server).await {
            server.app.services.store.delete(&key).await.unwrap();
        }
        let mut kinds = Vec::new();
        let tell = &mut |problem: &wharfinger::service::fsck::Problem| kinds.push(problem.kind);
        let repair = Options {
            deep: false,
            repair: true,
        };
        server.app.services.fsck(repair, tell).await.unwrap();
        assert_eq!(kinds, [Kind::Lost, Kind::Lost, Kind::Broken]);
        assert!(job.list().await.is_empty());
        // A lost artifact's name is free.
        job.upload("whole", &[("f", b"anew")]).await;
        assert_eq!(names(&job.0.download("whole").await), ["f"]);
        server.stop().await;
    }
}
