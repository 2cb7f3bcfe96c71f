//! What the figures were measured on.

use std::fs;
use std::path::Path;
use std::process::Command;

/// One line of Markdown per fact.
pub fn describe(directory: &Path) -> Vec<String> {
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = read("/proc/meminfo");
    let memory_kib = memory
        .split_whitespace()
        .nth(1)
        .and_then(|kib| kib.parse::<f64>().ok())
        .unwrap_or_default();
    let kernel = said(Command::new("uname").arg("-sr"));
    let columns = ["--output=fstype,source"];
    let file_system = said(Command::new("df").args(columns).arg(directory));
    vec![
        format!(
            "CPU: {}, {cores} cores for client and servers together",
            model.trim_start_matches(['\t', ' ', ':'])
        ),
        format!("memory: {:.0} GiB", memory_kib / 1024.0 / 1024.0),
        format!("kernel: {kernel}"),
        format!(
            "file system: {}",
            file_system.split_whitespace().collect::<Vec<_>>().join(" on ")
        ),
        format!(
            "load average at the start: {}",
            read("/proc/loadavg").split(' ').next().unwrap_or_default()
        ),
        format!("date: {}", said(Command::new("date").args(["-u", "+%Y-%m-%d"]))),
    ]
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// The last line that a command prints.
fn said(command: &mut Command) -> String {
    let output = command.output().map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&output)
        .lines()
        .last()
        .unwrap_or_default()
        .to_owned()
}
