//! The servers that are compared, one module each: how it is started, and how uploads and downloads look in its dialect.
//!
//! `main` starts them, `scenarios` drives them through [`Server`] and does not know which one it has.

mod act;
mod azurite;
mod floor;
mod nginx;
mod postgres;
mod seaweedfs;
mod twirp;
mod wharfinger;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::load::{Client, Origin, Payload, Until, in_parallel};
use crate::scenarios::Scenario;

/// Workflow runs that the servers are asked about; each starts empty.
pub const RUNS: [&str; 3] = ["1", "10", "1000"];

/// A running server as its clients see it. Dropping it ends it.
pub trait Server: Send + Sync {
    /// The processes that the server consists of, without their children.
    fn pids(&self) -> Vec<u32>;

    fn origin(&self) -> Origin;

    /// Begins an upload; returns where to.
    fn begin(&self, client: &mut Client, run: &str, name: &str) -> Result<String>;

    /// Sends a block; returns what the list of blocks will call it.
    fn put_block(&self, client: &mut Client, target: &str, index: usize, block: &[u8]) -> Result<String>;

    /// Makes the blocks one content.
    fn commit(&self, client: &mut Client, target: &str, blocks: &[String]) -> Result<()>;

    /// Shows the artifact, where that is a step of its own.
    fn finalize(&self, _: &mut Client, _run: &str, _name: &str, _: &Payload) -> Result<()> {
        Ok(())
    }

    /// Looks an artifact up by its name, where that is needed before a download.
    fn find(&self, _: &mut Client, _run: &str, _name: &str) -> Result<()> {
        Ok(())
    }

    /// Counts all artifacts of a run.
    fn list(&self, _: &mut Client, _run: &str) -> Result<usize> {
        bail!("has no runs")
    }

    /// What to GET, one after the other, for an artifact of so many blocks.
    fn links(&self, client: &mut Client, run: &str, name: &str, blocks: usize) -> Result<Vec<String>>;

    /// Puts an artifact there that is to be downloaded as one.
    fn seed(&self, name: &str, payload: &Payload) -> Result<Vec<String>> {
        // More blocks at once would be quicker, but not all servers can.
        upload(self, name, payload, 1)?;
        self.links(&mut Client::new(self.origin()), RUNS[0], name, payload.blocks())
    }

    /// Returns when nothing is left to do in the background.
    fn settle(&self) -> Result<()> {
        Ok(())
    }

    /// How many artifacts its cleaner has found expired.
    fn expired(&self) -> Result<u64> {
        bail!("has no cleaner")
    }

    /// `ACTIONS_RUNTIME_TOKEN`, if it takes artifact clients.
    fn token(&self) -> Option<String> {
        None
    }
}

/// A whole upload with so many blocks at once.
pub fn upload<S: Server + ?Sized>(server: &S, name: &str, payload: &Payload, at_once: usize) -> Result<()> {
    let mut client = Client::new(server.origin());
    let target = server.begin(&mut client, RUNS[0], name)?;
    let blocks = in_parallel(
        &server.origin(),
        at_once,
        Until::Count(payload.blocks()),
        |client, index| server.put_block(client, &target, index, payload.block(index)),
    )?;
    server.commit(&mut client, &target, &blocks.results)?;
    server.finalize(&mut client, RUNS[0], name, payload)
}

/// The servers by the names that the command line and the tables have for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    WharfingerProcess,
    WharfingerTls,
    WharfingerFull,
    WharfingerS3,
    Nginx,
    Act,
    Azurite,
    Seaweedfs,
    FloorDiscard,
    FloorWrite,
}

impl Kind {
    pub const ALL: [Self; 10] = [
        Self::WharfingerProcess,
        Self::WharfingerTls,
        Self::WharfingerFull,
        Self::WharfingerS3,
        Self::Nginx,
        Self::Act,
        Self::Azurite,
        Self::Seaweedfs,
        Self::FloorDiscard,
        Self::FloorWrite,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::WharfingerProcess => "wharfinger-process",
            Self::WharfingerTls => "wharfinger-tls",
            Self::WharfingerFull => "wharfinger-full",
            Self::WharfingerS3 => "wharfinger-s3",
            Self::Nginx => "nginx",
            Self::Act => "act",
            Self::Azurite => "azurite",
            Self::Seaweedfs => "seaweedfs",
            Self::FloorDiscard => "floor-discard",
            Self::FloorWrite => "floor-write",
        }
    }

    /// What it is, for whoever reads the tables.
    pub fn describe(self) -> Result<String> {
        Ok(match self {
            Self::WharfingerProcess => {
                "Wharfinger, SQLite and disk, `durability = \"process\"`: no reply waits for the disk, as with the peers".to_owned()
            }
            Self::WharfingerTls => "as wharfinger-process, and speaks TLS itself".to_owned(),
            Self::WharfingerFull => "Wharfinger, SQLite and disk, as it comes: synced at the block list".to_owned(),
            Self::WharfingerS3 => format!(
                "Wharfinger on {} and SeaweedFS, all of their processes counted",
                postgres::version()?
            ),
            Self::Nginx => format!(
                "{}: `dav` PUT of each block as a file of its own, static GET",
                nginx::version()?
            ),
            Self::Act => format!("the artifact server inside {}", act::version()?),
            Self::Azurite => format!("Azurite {}", azurite::version()?),
            Self::Seaweedfs => format!("SeaweedFS's S3, multipart, {}", seaweedfs::version()?),
            Self::FloorDiscard => "axum that receives and discards, and answers calls with constant JSON".to_owned(),
            Self::FloorWrite => "axum that writes what it receives to its place in a file".to_owned(),
        })
    }

    /// Starts it on fresh data below a directory.
    pub fn start(self, scenario: Scenario, directory: &Path) -> Result<Box<dyn Server>> {
        Ok(match self {
            Self::WharfingerProcess if scenario == Scenario::Scale => Box::new(wharfinger::eager_to_clean(directory)?),
            Self::WharfingerProcess => Box::new(wharfinger::embedded(directory, "process")?),
            Self::WharfingerTls => Box::new(wharfinger::over_tls(directory)?),
            Self::WharfingerFull => Box::new(wharfinger::embedded(directory, "full")?),
            Self::WharfingerS3 => Box::new(wharfinger::on_postgres_and_s3(directory)?),
            Self::Nginx => Box::new(nginx::Nginx::start(directory)?),
            Self::Act => Box::new(act::start(directory)?),
            Self::Azurite => Box::new(azurite::Azurite::start(directory)?),
            Self::Seaweedfs => Box::new(seaweedfs::Seaweedfs::start(directory)?),
            Self::FloorDiscard => Box::new(floor::start(directory, false)?),
            Self::FloorWrite => Box::new(floor::start(directory, true)?),
        })
    }
}

/// What `tests/install.sh bench` put below `.tools/`.
fn tool(path: &str) -> Result<PathBuf> {
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join(".tools").join(path);
    tool.exists()
        .then_some(tool)
        .with_context(|| format!("no .tools/{path}: run `tests/install.sh bench`"))
}

/// The first line that a command prints.
fn first_line(command: &mut Command) -> Result<String> {
    let output = command.output()?;
    let said = [output.stdout, output.stderr].concat();
    Ok(String::from_utf8_lossy(&said)
        .lines()
        .next()
        .unwrap_or_default()
        .trim()
        .to_owned())
}

/// Does a GET of this target answer 200?
fn answers(address: SocketAddr, target: &str) -> bool {
    Client::new(address)
        .call("GET", target, "", &[])
        .is_ok_and(|reply| reply.status == 200)
}

fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}
