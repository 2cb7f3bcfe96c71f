//! What lies in the data directory itself: its permissions, the root secret, and locks between processes.
//!
//! Called by `app`.

use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail};

use crate::config::{Config, RootSecretFile};
use crate::papers::RootSecret;

/// The root secret of this installation; made at first start on the embedded default.
pub fn root_secret(config: &Config) -> anyhow::Result<RootSecret> {
    match config.root_secret_file() {
        RootSecretFile::Given(path) => RootSecret::load(&path),
        RootSecretFile::Embedded(path) => {
            prepare_data_dir(&config.data_dir)?;
            RootSecret::load_or_create(&path)
        }
    }
    .map_err(|error| anyhow!(error))
}

/// The root secret of an installation that is there already.
///
/// # Errors
/// One sentence that says what to do about it. A missing embedded secret is an error: made here, it would be a stranger
/// to the server whose tokens are wanted.
pub fn existing_root_secret(config: &Config) -> anyhow::Result<RootSecret> {
    let file = config.root_secret_file();
    let path = file.path();
    if matches!(file, RootSecretFile::Embedded(_)) && !path.try_exists()? {
        bail!(
            "there is no root secret at {} yet: start the server there first, or name its directory with --data-dir",
            path.display()
        );
    }
    RootSecret::load(path).map_err(|error| anyhow!(error))
}

/// Makes the data directory with mode 0700, or checks the one that is there.
///
/// # Errors
/// If it can't be made, is not a directory of its own or can be written by everybody.
pub fn prepare_data_dir(path: &Path) -> anyhow::Result<()> {
    // Without a slash at its end, which would follow a link.
    let path: PathBuf = path.components().collect();
    let name = path.display();
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&path)
        .with_context(|| format!("can't make the data directory {name}: check data_dir and who may write there"))?;
    let metadata = fs::symlink_metadata(&path).with_context(|| format!("can't look at the data directory {name}"))?;
    if metadata.is_symlink() {
        bail!("the data directory {name} is a symbolic link: set data_dir to the directory itself");
    }
    if metadata.mode() & 0o002 != 0 {
        bail!(
            "everybody may write to the data directory {name}: chmod 700 {name}, or set data_dir to a directory in it"
        );
    }
    Ok(())
}

/// A lock between processes on one data directory. Ends with the process, whatever ends that.
pub struct Lock(#[expect(dead_code, reason = "held, never read")] File);

impl Lock {
    /// # Errors
    /// If another process has it.
    pub fn try_take(data_dir: &Path, name: &str) -> anyhow::Result<Self> {
        let file = open(data_dir, name)?;
        match file.try_lock() {
            Ok(()) => Ok(Self(file)),
            Err(fs::TryLockError::WouldBlock) => bail!(
                "another server is running on {}: stop it, or set data_dir to another directory",
                data_dir.display()
            ),
            Err(fs::TryLockError::Error(error)) => {
                Err(error).with_context(|| format!("cannot lock {}", data_dir.display()))
            }
        }
    }

    /// Waits for it.
    pub async fn wait(data_dir: &Path, name: &str) -> anyhow::Result<Self> {
        let file = open(data_dir, name)?;
        let locked = tokio::task::spawn_blocking(move || file.lock().map(|()| file)).await?;
        Ok(Self(
            locked.with_context(|| format!("cannot lock {}", data_dir.display()))?,
        ))
    }
}

/// Opens a file of the data directory, which nobody else may read; makes it if it is not there.
pub fn open(data_dir: &Path, name: &str) -> anyhow::Result<File> {
    let path = data_dir.join(name);
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn the_data_directory_is_made_private() {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("deep/data");
        prepare_data_dir(&data).unwrap();
        assert_eq!(fs::metadata(&data).unwrap().mode() & 0o777, 0o700);
        prepare_data_dir(&data).unwrap();
    }

    #[test]
    fn a_data_directory_that_others_could_change_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        prepare_data_dir(&data).unwrap();
        let link = directory.path().join("link");
        symlink(&data, &link).unwrap();
        for path in [link.clone(), link.join("")] {
            assert!(
                prepare_data_dir(&path)
                    .unwrap_err()
                    .to_string()
                    .contains("symbolic link")
            );
        }
        fs::set_permissions(&data, Permissions::from_mode(0o777)).unwrap();
        assert!(prepare_data_dir(&data).unwrap_err().to_string().contains("chmod 700"));
        fs::write(directory.path().join("file"), "").unwrap();
        let error = format!("{:#}", prepare_data_dir(&directory.path().join("file")).unwrap_err());
        assert!(error.contains("can't make the data directory"), "{error}");
    }
}
