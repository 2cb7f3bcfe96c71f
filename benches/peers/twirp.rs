//! The dialect of artifact clients of version 4 and later: Twirp calls around an Azure block blob.
//!
//! Spoken to Wharfinger, to act and to the floors; Azurite has the blobs alone.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::postgres::Postgres;
use super::seaweedfs::Seaweedfs;
use super::{RUNS, Server};
use crate::load::{Client, Origin, Payload};
use crate::process::Process;

/// For hashing what the largest scenario uploads.
const SETTLE_PATIENCE: Duration = Duration::from_secs(120);

/// A running server that artifact clients can talk to.
pub struct ArtifactServer {
    pub process: Process,
    pub origin: Origin,
    /// The job's id in every run; if empty, the run's.
    pub job: &'static str,
    /// Runs and their tokens.
    pub tokens: HashMap<&'static str, String>,
    /// Where Wharfinger has its metrics.
    pub internal: Option<SocketAddr>,
    /// What it stands on. Fields are dropped in this order: the server first.
    pub beside: Option<(Postgres, Seaweedfs)>,
}

impl ArtifactServer {
    fn call(&self, client: &mut Client, run: &str, method: &str, mut fields: Value) -> Result<Value> {
        let job = if self.job.is_empty() { run } else { self.job };
        fields["workflow_run_backend_id"] = json!(run);
        fields["workflow_job_run_backend_id"] = json!(job);
        let token = self.tokens.get(run).context("a run without a token")?;
        let reply = client
            .call(
                "POST",
                &format!("/twirp/github.actions.results.api.v1.ArtifactService/{method}"),
                &format!("Content-Type: application/json\r\nAuthorization: Bearer {token}\r\n"),
                fields.to_string().as_bytes(),
            )?
            .accepted(method)?;
        Ok(serde_json::from_slice(&reply.body)?)
    }

    fn metric(&self, name: &str) -> Result<u64> {
        let mut client = Client::new(self.internal.context("has no metrics")?);
        let reply = client.call("GET", "/metrics", "", &[])?.accepted("/metrics")?;
        let text = String::from_utf8(reply.body)?;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(value.with_context(|| format!("no {name}"))?.parse()?)
    }
}

impl Server for ArtifactServer {
    fn pids(&self) -> Vec<u32> {
        let beside = self
            .beside
            .iter()
            .flat_map(|(postgres, store)| [postgres.pid(), store.pid()]);
        beside.chain([self.process.pid()]).collect()
    }

    fn origin(&self) -> Origin {
        self.origin.clone()
    }

    fn begin(&self, client: &mut Client, run: &str, name: &str) -> Result<String> {
        let reply = self.call(client, run, "CreateArtifact", json!({ "name": name, "version": 4 }))?;
        target(&reply, ["signed_upload_url", "signedUploadUrl"])
    }

    fn put_block(&self, client: &mut Client, target: &str, index: usize, block: &[u8]) -> Result<String> {
        put_block(client, target, index, block)
    }

    fn commit(&self, client: &mut Client, target: &str, blocks: &[String]) -> Result<()> {
        commit(client, target, blocks)
    }

    fn finalize(&self, client: &mut Client, run: &str, name: &str, payload: &Payload) -> Result<()> {
        let fields = json!({
            "name": name,
            "size": payload.size_bytes.to_string(),
            "hash": format!("sha256:{}", payload.sha256),
        });
        self.call(client, run, "FinalizeArtifact", fields)?;
        Ok(())
    }

    fn find(&self, client: &mut Client, run: &str, name: &str) -> Result<()> {
        let reply = self.call(client, run, "ListArtifacts", json!({ "name_filter": name }))?;
        match reply["artifacts"].as_array().map(Vec::len) {
            Some(1) => Ok(()),
            other => bail!("{other:?} artifacts are named {name}"),
        }
    }

    fn list(&self, client: &mut Client, run: &str) -> Result<usize> {
        let reply = self.call(client, run, "ListArtifacts", json!({}))?;
        reply["artifacts"].as_array().map(Vec::len).context("no list")
    }

    fn links(&self, client: &mut Client, run: &str, name: &str, _blocks: usize) -> Result<Vec<String>> {
        let reply = self.call(client, run, "GetSignedArtifactURL", json!({ "name": name }))?;
        Ok(vec![target(&reply, ["signed_url", "signedUrl"])?])
    }

    /// Until every content has been hashed.
    fn settle(&self) -> Result<()> {
        if self.internal.is_none() {
            return Ok(());
        }
        let begun = Instant::now();
        loop {
            let pending = self.metric("wharfinger_verification_pending")?;
            if pending == 0 {
                return Ok(());
            }
            ensure!(
                begun.elapsed() < SETTLE_PATIENCE,
                "{pending} verifications are still pending"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn expired(&self) -> Result<u64> {
        self.metric("wharfinger_cleaner_expired_artifacts_total")
    }

    fn token(&self) -> Option<String> {
        self.tokens.get(RUNS[0]).cloned()
    }
}

/// Put Block; returns the block's id.
pub fn put_block(client: &mut Client, target: &str, index: usize, block: &[u8]) -> Result<String> {
    let id = STANDARD.encode(format!("{index:048}"));
    client
        .call(
            "PUT",
            &format!("{target}&comp=block&blockid={id}"),
            "Content-Type: application/octet-stream\r\nx-ms-version: 2026-04-06\r\n",
            block,
        )?
        .accepted("Put Block")?;
    Ok(id)
}

/// Put Block List.
pub fn commit(client: &mut Client, target: &str, blocks: &[String]) -> Result<()> {
    let listed: String = blocks.iter().map(|id| format!("<Latest>{id}</Latest>")).collect();
    let list = format!(r#"<?xml version="1.0" encoding="UTF-8" standalone="yes"?><BlockList>{listed}</BlockList>"#);
    client
        .call(
            "PUT",
            &format!("{target}&comp=blocklist"),
            "Content-Type: application/xml\r\nx-ms-version: 2026-04-06\r\nx-ms-blob-content-type: application/zip\r\n",
            list.as_bytes(),
        )?
        .accepted("Put Block List")?;
    Ok(())
}

/// A link without its origin. The field has one of two names: act's are in camel case.
fn target(reply: &Value, names: [&str; 2]) -> Result<String> {
    let link = names
        .into_iter()
        .find_map(|name| reply[name].as_str())
        .context("a reply without a link")?;
    let path = link.splitn(4, '/').nth(3).context("a link without a path")?;
    Ok(format!("/{path}"))
}
