//! SeaweedFS's S3: multipart uploads and GETs by nobody in particular, which spares it checking signatures.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};

use super::{Server, first_line, local, tool};
use crate::load::{Client, Origin};
use crate::process::{Process, free_ports};

pub const BUCKET: &str = "bench";
pub const KEY_ID: &str = "bench-key-id";
pub const KEY: &str = "bench-secret-key";
const PORTS: u16 = 8;

pub struct Seaweedfs {
    process: Process,
    address: SocketAddr,
}

pub fn version() -> Result<String> {
    first_line(Command::new(tool("seaweedfs/bin/weed")?).arg("version"))
}

impl Seaweedfs {
    pub fn start(directory: &Path) -> Result<Self> {
        let data = directory.join("weed");
        fs::create_dir(&data)?;
        let identities = directory.join("s3.json");
        let actions = r#""actions": ["Admin", "Read", "Write", "List", "Tagging"]"#;
        fs::write(
            &identities,
            format!(
                r#"{{"identities": [{{"name": "anonymous", {actions}}}, {{"name": "bench", {actions},
                    "credentials": [{{"accessKey": "{KEY_ID}", "secretKey": "{KEY}"}}]}}]}}"#
            ),
        )?;
        let port = free_ports(PORTS);
        let log = directory.join("weed.log");
        let mut command = Command::new(tool("seaweedfs/bin/weed")?);
        command
            .arg("-logtostderr=true")
            .arg("server")
            .arg(format!("-dir={}", data.display()));
        command.arg(format!("-s3.config={}", identities.display()));
        command.args([
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-s3",
            "-filer",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
        ]);
        command.args([
            "-master.telemetry=false",
            "-master.volumeSizeLimitMB=1024",
            "-volume.max=50",
        ]);
        let flags = [
            "s3.port",
            "s3.port.grpc",
            "master.port",
            "master.port.grpc",
            "volume.port",
            "volume.port.grpc",
        ];
        for (flag, port) in flags.into_iter().chain(["filer.port", "filer.port.grpc"]).zip(port..) {
            command.arg(format!("-{flag}={port}"));
        }
        let address = local(port);
        let mut process = Process::start(&mut command, &log, "TERM")?;
        process.ready(&log, || {
            let made = Client::new(address).call("PUT", &format!("/{BUCKET}"), "", &[]);
            made.is_ok_and(|reply| reply.status == 200 || reply.status == 409)
        })?;
        Ok(Self { process, address })
    }
}

impl Seaweedfs {
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }
}

impl Drop for Seaweedfs {
    fn drop(&mut self) {
        self.process.stop();
        // It makes sockets in /tmp, wherever it is told to be, and leaves them there.
        for entry in fs::read_dir("/tmp").into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let mut ports = self.address.port()..self.address.port() + PORTS;
            if name.starts_with("seaweedfs-") && ports.any(|port| name.ends_with(&format!("-{port}.sock"))) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

impl Server for Seaweedfs {
    fn pids(&self) -> Vec<u32> {
        vec![self.process.pid()]
    }

    fn origin(&self) -> Origin {
        self.address.into()
    }

    fn begin(&self, client: &mut Client, run: &str, name: &str) -> Result<String> {
        let path = format!("/{BUCKET}/{run}/{name}");
        let reply = client
            .call("POST", &format!("{path}?uploads="), "", &[])?
            .accepted("CreateMultipartUpload")?;
        let text = String::from_utf8(reply.body)?;
        let id = text
            .split_once("<UploadId>")
            .and_then(|(_, rest)| rest.split_once("</UploadId>"));
        Ok(format!("{path}?uploadId={}", id.context("no upload id")?.0))
    }

    fn put_block(&self, client: &mut Client, target: &str, index: usize, block: &[u8]) -> Result<String> {
        let reply = client
            .call("PUT", &format!("{target}&partNumber={}", index + 1), "", block)?
            .accepted("UploadPart")?;
        Ok(reply.header("etag").context("no ETag")?.to_owned())
    }

    fn commit(&self, client: &mut Client, target: &str, blocks: &[String]) -> Result<()> {
        let parts: String = (1..)
            .zip(blocks)
            .map(|(number, etag)| format!("<Part><PartNumber>{number}</PartNumber><ETag>{etag}</ETag></Part>"))
            .collect();
        let list = format!("<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>");
        client
            .call("POST", target, "Content-Type: application/xml\r\n", list.as_bytes())?
            .accepted("CompleteMultipartUpload")?;
        Ok(())
    }

    fn links(&self, _: &mut Client, run: &str, name: &str, _blocks: usize) -> Result<Vec<String>> {
        Ok(vec![format!("/{BUCKET}/{run}/{name}")])
    }
}
