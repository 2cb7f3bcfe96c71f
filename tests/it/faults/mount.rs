//! File systems of a test's own, for root only.

use std::ffi::OsStr;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A mounted file system. Dropping it unmounts it.
pub struct Mount {
    pub path: PathBuf,
}

impl Mount {
    /// `Err` says why it can't be done here.
    fn new<S: AsRef<OsStr>>(arguments: &[S], at: &Path) -> Result<Self, String> {
        DirBuilder::new().recursive(true).mode(0o700).create(at).unwrap();
        run(Command::new("mount").args(arguments).arg(at))?;
        Ok(Self { path: at.to_owned() })
    }

    /// A disk in memory that is soon full.
    pub fn small(at: &Path) -> Result<Self, String> {
        Self::new(&["-t", "tmpfs", "-o", "size=64m,mode=700", "tmpfs"], at)
    }

    /// An image file that was formatted before.
    pub fn image(file: &Path, at: &Path) -> Result<Self, String> {
        Self::new(&[OsStr::new("-o"), OsStr::new("loop"), file.as_os_str()], at)
    }

    /// `ro` or `rw`.
    pub fn remount(&self, mode: &str) -> Result<(), String> {
        let options = format!("remount,{mode}");
        run(Command::new("mount").args(["-o", &options]).arg(&self.path))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazily: even after a failure that left somebody inside.
        let _ = run(Command::new("umount").arg("-l").arg(&self.path));
    }
}

/// Runs a system tool. `Err` is what it says.
pub fn run(command: &mut Command) -> Result<(), String> {
    let path = std::env::var("PATH").unwrap_or_default();
    let output = command
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .output()
        .map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        Ok(())
    } else {
        let said = String::from_utf8_lossy(&output.stderr);
        Err(format!("{command:?}: {}", said.trim()))
    }
}
