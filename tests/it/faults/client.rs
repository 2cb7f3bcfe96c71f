//! An artifact client that looks closely at every refusal, tries again like the real ones, and keeps a ledger of what
//! was promised to it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::sync::Mutex;

use super::PATIENCE;
use crate::common::process::{Process, http_client_builder};
use crate::common::{TestServer, block_link, block_list};

const RUN: &str = "1";
const JOB: &str = "build";

/// What came back.
#[derive(Debug)]
pub struct Reply {
    /// 0 if nothing did.
    pub status: u16,
    /// Azure's or Twirp's word for the error.
    pub code: String,
    retry_after: bool,
    /// What came of the body, and whether all of it did.
    pub body: Vec<u8>,
    pub whole: bool,
}

impl Reply {
    async fn of(sent: reqwest::Result<reqwest::Response>) -> Self {
        let mut reply = Self {
            status: 0,
            code: String::new(),
            retry_after: false,
            body: Vec::new(),
            whole: false,
        };
        let Ok(mut response) = sent else { return reply };
        reply.status = response.status().as_u16();
        let headers = response.headers();
        reply.retry_after = headers.contains_key("retry-after");
        if let Some(code) = headers.get("x-ms-error-code") {
            reply.code = code.to_str().unwrap().to_owned();
        }
        reply.whole = loop {
            match response.chunk().await {
                Ok(Some(chunk)) => reply.body.extend_from_slice(&chunk),
                Ok(None) => break true,
                Err(_) => break false,
            }
        };
        if let (true, Ok(Value::String(code))) = (
            reply.code.is_empty(),
            serde_json::from_slice::<Value>(&reply.body).map(|body| body["code"].clone()),
        ) {
            reply.code = code;
        }
        reply
    }

    /// A 503 that tells the client, in its own dialect, to come back.
    pub fn is_busy(&self) -> bool {
        let azure = self.code == "ServerBusy" && self.body.starts_with(b"<?xml");
        self.status == 503 && self.retry_after && (azure || self.code == "unavailable")
    }

    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status) && self.whole
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("not JSON: {self}"))
    }
}

impl std::fmt::Display for Reply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let start = String::from_utf8_lossy(&self.body[..self.body.len().min(300)]);
        let Self {
            status, code, whole, ..
        } = self;
        write!(
            f,
            "{status} {code:?}, {} bytes, whole: {whole}: {start:?}",
            self.body.len()
        )
    }
}

pub struct Client {
    http: reqwest::Client,
    url: String,
    token: String,
    /// What Finalize acknowledged: id and bytes by name.
    ledger: Mutex<BTreeMap<String, (String, Vec<u8>)>>,
}

impl Client {
    fn new(url: &str, token: String) -> Self {
        Self {
            // A connection kept open would keep a file descriptor of the server.
            http: http_client_builder().pool_max_idle_per_host(0).build().unwrap(),
            url: url.to_owned(),
            token,
            ledger: Mutex::default(),
        }
    }

    pub fn of(server: &TestServer) -> Self {
        Self::new(&server.url, server.token("octo/demo", RUN, JOB))
    }

    pub fn of_process(process: &Process) -> Self {
        Self::new(&process.url, process.token("octo/demo", RUN, JOB))
    }

    /// The same ledger for a server that has taken the place of the first, or a token that has run out.
    pub fn handed_over_to(self, next: Self) -> Self {
        Self {
            ledger: self.ledger,
            ..next
        }
    }

    pub async fn call(&self, method: &str, mut fields: Value) -> Reply {
        fields["workflow_run_backend_id"] = json!(RUN);
        fields["workflow_job_run_backend_id"] = json!(JOB);
        let path = "twirp/github.actions.results.api.v1.ArtifactService";
        let request = self.http.post(format!("{}/{path}/{method}", self.url));
        let request = request
            .header("content-type", "application/json")
            .bearer_auth(&self.token);
        Reply::of(request.body(fields.to_string()).send().await).await
    }

    pub async fn create(&self, name: &str) -> Result<String, Reply> {
        let reply = self.call("CreateArtifact", json!({ "name": name, "version": 4 })).await;
        if reply.status == 200 {
            Ok(reply.json()["signed_upload_url"].as_str().unwrap().to_owned())
        } else {
            Err(reply)
        }
    }

    /// Put Blob, or with a link of its own Put Block and Put Block List.
    pub async fn put(&self, link: &str, body: Vec<u8>) -> Reply {
        let request = self
            .http
            .put(link)
            .header("x-ms-blob-type", "BlockBlob")
            .header("content-length", body.len());
        Reply::of(request.body(body).send().await).await
    }

    pub async fn finalize(&self, name: &str, bytes: &[u8]) -> Result<String, Reply> {
        let hash: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        let fields = json!({ "name": name, "size": bytes.len().to_string(), "hash": format!("sha256:{hash}") });
        let reply = self.call("FinalizeArtifact", fields).await;
        if reply.status != 200 {
            return Err(reply);
        }
        let id = reply.json()["artifact_id"].as_str().unwrap().to_owned();
        self.ledger
            .lock()
            .await
            .insert(name.to_owned(), (id.clone(), bytes.to_vec()));
        Ok(id)
    }

    /// Uploads and finalizes `bytes` in blocks of `block_bytes`, without trying anything twice.
    pub async fn upload(&self, name: &str, bytes: &[u8], block_bytes: usize) -> Result<String, Reply> {
        let link = self.create(name).await?;
        let ids: Vec<String> = (0..bytes.chunks(block_bytes).len())
            .map(|i| format!("{i:08}"))
            .collect();
        for (id, block) in ids.iter().zip(bytes.chunks(block_bytes)) {
            expect_success(self.put(&block_link(&link, id), block.to_vec()).await)?;
        }
        let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
        expect_success(self.put(&format!("{link}&comp=blocklist"), block_list(&ids)).await)?;
        self.finalize(name, bytes).await
    }

    /// Uploads like the real clients: every request again and again until it is neither refused for now nor lost.
    /// Returns how many requests were put off.
    pub async fn upload_patiently(&self, name: &str, bytes: &[u8]) -> usize {
        let mut put_off = 0;
        let link = insist(&mut put_off, async || self.create(name).await).await;
        let block = block_link(&link, "00000000");
        let list = format!("{link}&comp=blocklist");
        insist(&mut put_off, async || {
            expect_success(self.put(&block, bytes.to_vec()).await)
        })
        .await;
        insist(&mut put_off, async || {
            expect_success(self.put(&list, block_list(&["00000000"])).await)
        })
        .await;
        insist(&mut put_off, async || self.finalize(name, bytes).await).await;
        put_off
    }

    pub async fn delete(&self, name: &str) -> Reply {
        let reply = self.call("DeleteArtifact", json!({ "name": name })).await;
        if reply.status == 200 {
            self.forget(name).await;
        }
        reply
    }

    /// Strikes an artifact from the ledger.
    pub async fn forget(&self, name: &str) {
        self.ledger.lock().await.remove(name);
    }

    pub async fn download(&self, name: &str) -> Reply {
        let reply = self.call("GetSignedArtifactURL", json!({ "name": name })).await;
        if reply.status != 200 {
            return reply;
        }
        let link = reply.json()["signed_url"].as_str().unwrap().to_owned();
        Reply::of(self.http.get(link).send().await).await
    }

    /// Ids by name, as the run's list shows them.
    pub async fn list(&self) -> BTreeMap<String, String> {
        let reply = self.call("ListArtifacts", json!({})).await;
        assert_eq!(reply.status, 200, "{reply}");
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let artifacts = reply.json()["artifacts"].as_array().unwrap().clone();
        let listed: BTreeMap<_, _> = artifacts
            .iter()
            .map(|artifact| (text(&artifact["name"]), text(&artifact["database_id"])))
            .collect();
        assert_eq!(listed.len(), artifacts.len(), "a name stands twice in the list");
        listed
    }

    /// All that was acknowledged is there, under its id and byte for byte, and nothing else.
    pub async fn check_ledger(&self) {
        let ledger = self.ledger.lock().await;
        let promised: BTreeMap<_, _> = ledger
            .iter()
            .map(|(name, (id, _))| (name.clone(), id.clone()))
            .collect();
        assert!(!promised.is_empty(), "an empty ledger shows nothing");
        assert_eq!(self.list().await, promised);
        for (name, (_, bytes)) in ledger.iter() {
            let reply = self.download(name).await;
            assert!(reply.is_success(), "{name}: {reply}");
            assert!(reply.body == *bytes, "{name} has other bytes: {reply}");
        }
    }
}

fn expect_success(reply: Reply) -> Result<(), Reply> {
    if reply.is_success() { Ok(()) } else { Err(reply) }
}

async fn insist<T>(put_off: &mut usize, request: impl AsyncFn() -> Result<T, Reply>) -> T {
    let begun = Instant::now();
    loop {
        match request().await {
            Ok(value) => return value,
            Err(reply) => {
                assert!(
                    reply.is_busy(),
                    "a passing fault must be a 503 in the right dialect: {reply}"
                );
                assert!(begun.elapsed() < PATIENCE, "still {reply}");
                *put_off += 1;
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
