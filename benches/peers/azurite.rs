//! Azurite: Microsoft's emulator of Azure's blobs, with one signature of the account for everything.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};

use super::{Server, local, tool, twirp};
use crate::load::{Client, Origin};
use crate::process::{Process, free_ports};

/// Of every Azurite, by its documentation.
const ACCOUNT: &str = "devstoreaccount1";
const CONTAINER: &str = "bench";
const KEY: &str = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

pub struct Azurite {
    process: Process,
    address: SocketAddr,
    signature: String,
}

pub fn version() -> Result<String> {
    let text = fs::read_to_string(tool("azurite/node_modules/azurite/package.json")?)?;
    let manifest: serde_json::Value = serde_json::from_str(&text)?;
    Ok(manifest["version"].as_str().context("no version")?.to_owned())
}

impl Azurite {
    pub fn start(directory: &Path) -> Result<Self> {
        let data = directory.join("azurite");
        fs::create_dir(&data)?;
        let address = local(free_ports(1));
        let log = directory.join("azurite.log");
        let mut command = Command::new(tool("node/bin/node")?);
        command.arg(tool("azurite/node_modules/azurite/dist/src/blob/main.js")?);
        command.args([
            "--silent",
            "--disableTelemetry",
            "--skipApiVersionCheck",
            "--blobHost",
            "127.0.0.1",
        ]);
        command
            .args(["--blobPort", &address.port().to_string(), "--location"])
            .arg(&data);
        let mut process = Process::start(command.current_dir(directory), &log, "TERM")?;
        let signature = account_signature()?;
        let container = format!("/{ACCOUNT}/{CONTAINER}?restype=container&{signature}");
        process.ready(&log, || {
            let made = Client::new(address).call("PUT", &container, "", &[]);
            made.is_ok_and(|reply| reply.status == 201)
        })?;
        Ok(Self {
            process,
            address,
            signature,
        })
    }
}

/// An account SAS for all that a client does here.
fn account_signature() -> Result<String> {
    let (permissions, services, types, version) = ("rwdlac", "b", "sco", "2019-12-12");
    let (expiry, protocol) = ("2099-01-01T00:00:00Z", "https,http");
    let text = format!("{ACCOUNT}\n{permissions}\n{services}\n{types}\n\n{expiry}\n\n{protocol}\n{version}\n");
    let mac = Hmac::<sha2::Sha256>::new_from_slice(&STANDARD.decode(KEY)?)?.chain_update(text);
    let signature = STANDARD.encode(mac.finalize().into_bytes());
    let signature = signature.replace('+', "%2B").replace('/', "%2F").replace('=', "%3D");
    Ok(format!(
        "sv={version}&ss={services}&srt={types}&sp={permissions}&se={expiry}&spr={protocol}&sig={signature}"
    ))
}

impl Server for Azurite {
    fn pids(&self) -> Vec<u32> {
        vec![self.process.pid()]
    }

    fn origin(&self) -> Origin {
        self.address.into()
    }

    fn begin(&self, _: &mut Client, run: &str, name: &str) -> Result<String> {
        Ok(format!("/{ACCOUNT}/{CONTAINER}/{run}/{name}?{}", self.signature))
    }

    fn put_block(&self, client: &mut Client, target: &str, index: usize, block: &[u8]) -> Result<String> {
        twirp::put_block(client, target, index, block)
    }

    fn commit(&self, client: &mut Client, target: &str, blocks: &[String]) -> Result<()> {
        twirp::commit(client, target, blocks)
    }

    fn links(&self, client: &mut Client, run: &str, name: &str, _blocks: usize) -> Result<Vec<String>> {
        Ok(vec![self.begin(client, run, name)?])
    }
}
