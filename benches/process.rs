//! Servers as processes of their own, and what they use: CPU time, memory, bytes written.
//!
//! `peers` starts them, `scenarios` reads their meters. Each is the leader of a process group, so that its children end
//! with it. Nothing here ends a process that it did not start.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// The kernel counts CPU time in these (`USER_HZ`; 100 on every architecture that Rust's tier 1 knows).
const TICKS_PER_SECOND: f64 = 100.0;
const SAMPLE_EVERY: Duration = Duration::from_millis(20);
/// Samples between two looks for new processes.
const SAMPLES_PER_LOOK: usize = 25;
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// The groups that run now, for when the benchmark itself is told to stop.
static GROUPS: Mutex<Vec<u32>> = Mutex::new(Vec::new());

/// A running server. Dropping it ends it and its children.
pub struct Process {
    child: Child,
    /// The signal that it takes as a wish to stop soon.
    signal: &'static str,
}

impl Process {
    /// Starts a server that writes its log to a file.
    pub fn start(command: &mut Command, log: &Path, signal: &'static str) -> Result<Self> {
        let log = File::options().create(true).append(true).open(log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .with_context(|| format!("can't start {}", command.get_program().display()))?;
        GROUPS.lock().unwrap_or_else(PoisonError::into_inner).push(child.id());
        Ok(Self { child, signal })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until a question is answered with yes.
    ///
    /// # Errors
    /// If the process ends or a minute passes first.
    pub fn ready(&mut self, log: &Path, is_ready: impl Fn() -> bool) -> Result<()> {
        let begun = Instant::now();
        while !is_ready() {
            let ended = self.child.try_wait()?;
            if ended.is_some() || begun.elapsed() > Duration::from_secs(60) {
                let log = fs::read_to_string(log).unwrap_or_default();
                let tail: Vec<_> = log.lines().rev().take(10).collect();
                bail!("not ready, ended: {ended:?}; its log backwards: {tail:#?}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Ends it and waits for its end.
    pub fn stop(&mut self) {
        signal_group(self.child.id(), self.signal);
        let begun = Instant::now();
        while !matches!(self.child.try_wait(), Ok(Some(_))) && begun.elapsed() < STOP_PATIENCE {
            std::thread::sleep(Duration::from_millis(5));
        }
        // Whatever is left of the group.
        signal_group(self.child.id(), "KILL");
        let _ = self.child.wait();
        let mut groups = GROUPS.lock().unwrap_or_else(PoisonError::into_inner);
        groups.retain(|group| *group != self.child.id());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.stop();
    }
}

fn signal_group(group: u32, signal: &str) {
    // A group that is gone already is as good.
    let _ = Command::new("kill")
        .args([format!("-{signal}"), "--".to_owned(), format!("-{group}")])
        .stderr(Stdio::null())
        .status();
}

/// Ends all servers at once.
pub fn kill_all() {
    for group in GROUPS.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
        signal_group(group, "KILL");
    }
}

/// So many neighbouring ports of 127.0.0.1 that are free now, below those from which outgoing connections are made.
/// Returns the first.
pub fn free_ports(count: u16) -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Processes that run at the same time differ in their pid, so they begin at different ports.
    let base = 10_000 + (std::process::id() % 1_000) as u16 * 10;
    loop {
        let first = base + NEXT.fetch_add(count, Ordering::Relaxed) % 10_000;
        if (first..first + count).all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok()) {
            return first;
        }
    }
}

/// What a set of processes used between two points in time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Used {
    pub cpu_s: f64,
    /// Handed to the file system, whether or not it has reached the disk.
    pub written_bytes: f64,
    /// The most memory at one time that is not backed by files.
    pub anon_bytes: f64,
    /// The sum of the resident peaks since the processes began, pages of files included.
    pub resident_peak_bytes: f64,
}

/// Watches processes and their children from its start on.
pub struct Meter {
    roots: Vec<u32>,
    cpu_s: f64,
    written_bytes: f64,
    stop: Arc<AtomicBool>,
    sampler: JoinHandle<f64>,
}

impl Meter {
    pub fn start(roots: Vec<u32>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (told, watched) = (Arc::clone(&stop), roots.clone());
        let sampler = std::thread::spawn(move || {
            let (mut peak, mut tree) = (0.0_f64, Vec::new());
            for sample in 0.. {
                if sample % SAMPLES_PER_LOOK == 0 {
                    tree = with_children(&watched);
                }
                peak = peak.max(tree.iter().map(|pid| status_bytes(*pid, "RssAnon:")).sum());
                if told.load(Ordering::Relaxed) {
                    break;
                }
                std::thread::sleep(SAMPLE_EVERY);
            }
            peak
        });
        let tree = with_children(&roots);
        Self {
            cpu_s: tree.iter().map(|pid| cpu_s(*pid)).sum(),
            written_bytes: tree.iter().map(|pid| written_bytes(*pid)).sum(),
            roots,
            stop,
            sampler,
        }
    }

    /// CPU seconds up to now.
    pub fn cpu_s(&self) -> f64 {
        with_children(&self.roots).iter().map(|pid| cpu_s(*pid)).sum::<f64>() - self.cpu_s
    }

    pub fn stop(self) -> Used {
        self.stop.store(true, Ordering::Relaxed);
        let tree = with_children(&self.roots);
        Used {
            cpu_s: self.cpu_s(),
            written_bytes: tree.iter().map(|pid| written_bytes(*pid)).sum::<f64>() - self.written_bytes,
            resident_peak_bytes: tree.iter().map(|pid| status_bytes(*pid, "VmHWM:")).sum(),
            anon_bytes: self.sampler.join().unwrap_or_default(),
        }
    }
}

/// These processes and all below them.
fn with_children(roots: &[u32]) -> Vec<u32> {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        if let Some(parent) = stat(pid).and_then(|fields| fields.get(1)?.parse().ok()) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let (mut found, mut queue) = (HashSet::new(), roots.to_vec());
    while let Some(pid) = queue.pop() {
        if found.insert(pid) {
            queue.extend(children.get(&pid).into_iter().flatten());
        }
    }
    found.into_iter().collect()
}

/// The fields of `/proc/<pid>/stat` from the third on: behind the name, which may contain anything.
fn stat(pid: u32) -> Option<Vec<String>> {
    let line = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = line.rsplit_once(')')?;
    Some(fields.split_whitespace().map(str::to_owned).collect())
}

/// Of the process and of those of its children that have ended.
fn cpu_s(pid: u32) -> f64 {
    // utime, stime, cutime, cstime: fields 14 to 17 in proc(5).
    let ticks = stat(pid).map_or(0, |fields| {
        fields
            .iter()
            .skip(11)
            .take(4)
            .filter_map(|ticks| ticks.parse::<u64>().ok())
            .sum()
    });
    ticks as f64 / TICKS_PER_SECOND
}

fn status_bytes(pid: u32, name: &str) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    number_after(&status, name) * 1024.0
}

fn written_bytes(pid: u32) -> f64 {
    let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    number_after(&io, "write_bytes:")
}

fn number_after(text: &str, name: &str) -> f64 {
    text.lines()
        .find_map(|line| line.strip_prefix(name))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or_default()
}
