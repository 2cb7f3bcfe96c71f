//! nginx: a file per PUT and a file per GET, and nothing around it. The practical limit.

use std::fs;
use std::io::Write as _;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use super::{Server, first_line, local, tool};
use crate::load::{Client, Origin, Payload};
use crate::process::{Process, free_ports};

pub struct Nginx {
    process: Process,
    address: SocketAddr,
    files: PathBuf,
}

fn program() -> Result<PathBuf> {
    let system = Path::new("/usr/sbin/nginx");
    if system.exists() {
        Ok(system.to_owned())
    } else {
        tool("nginx/usr/sbin/nginx")
    }
}

pub fn version() -> Result<String> {
    let said = first_line(Command::new(program()?).arg("-v"))?;
    Ok(said.rsplit("version: ").next().unwrap_or_default().replace('/', " "))
}

impl Nginx {
    pub fn start(directory: &Path) -> Result<Self> {
        let address = local(free_ports(1));
        let files = directory.join("files");
        fs::create_dir(&files)?;
        // As root its workers would give up the right to write here.
        let user = if fs::metadata("/proc/self")?.uid() == 0 {
            "user root;"
        } else {
            ""
        };
        let at = directory.display();
        let config = format!(
            "{user} daemon off; worker_processes auto; pid {at}/pid; error_log stderr;
             events {{ worker_connections 1024; }}
             http {{
                 access_log off; sendfile on; tcp_nopush on;
                 keepalive_requests 1000000; client_max_body_size 0;
                 client_body_temp_path {at}/body; proxy_temp_path {at}/proxy; fastcgi_temp_path {at}/fastcgi;
                 uwsgi_temp_path {at}/uwsgi; scgi_temp_path {at}/scgi;
                 server {{
                     listen {address};
                     root {at}/files;
                     location / {{ dav_methods PUT DELETE; create_full_put_path on; }}
                 }}
             }}\n"
        );
        let path = directory.join("nginx.conf");
        fs::write(&path, config)?;
        let log = directory.join("nginx.log");
        let mut command = Command::new(program()?);
        command.args(["-e", "stderr", "-p"]).arg(directory).arg("-c").arg(path);
        let mut process = Process::start(&mut command, &log, "TERM")?;
        process.ready(&log, || Client::new(address).call("GET", "/", "", &[]).is_ok())?;
        Ok(Self {
            process,
            address,
            files,
        })
    }
}

impl Server for Nginx {
    fn pids(&self) -> Vec<u32> {
        vec![self.process.pid()]
    }

    fn origin(&self) -> Origin {
        self.address.into()
    }

    fn begin(&self, _: &mut Client, run: &str, name: &str) -> Result<String> {
        Ok(format!("/{run}/{name}"))
    }

    fn put_block(&self, client: &mut Client, target: &str, index: usize, block: &[u8]) -> Result<String> {
        client
            .call("PUT", &format!("{target}/{index}"), "", block)?
            .accepted("PUT")?;
        Ok(String::new())
    }

    fn commit(&self, _: &mut Client, _target: &str, _blocks: &[String]) -> Result<()> {
        Ok(())
    }

    fn links(&self, _: &mut Client, run: &str, name: &str, blocks: usize) -> Result<Vec<String>> {
        Ok((0..blocks).map(|index| format!("/{run}/{name}/{index}")).collect())
    }

    /// One file, which it serves without ever having received it.
    fn seed(&self, name: &str, payload: &Payload) -> Result<Vec<String>> {
        let mut file = fs::File::create(self.files.join(name)).context("the file to serve")?;
        for index in 0..payload.blocks() {
            file.write_all(payload.block(index))?;
        }
        Ok(vec![format!("/{name}")])
    }
}
