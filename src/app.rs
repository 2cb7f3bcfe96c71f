//! Puts the floors together. (Stub: `papers` and `prepare_data_dir` are meant to stay, the rest is still to be written.)

use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail};

use crate::config::{Config, RootSecretFile};
use crate::papers::{Papers, RootSecret};

pub async fn serve(_: Config) -> anyhow::Result<()> {
    bail!("this build can't serve yet")
}

pub async fn clean(_: Config) -> anyhow::Result<()> {
    bail!("this build can't clean yet")
}

pub async fn migrate(_: Config) -> anyhow::Result<()> {
    bail!("this build can't migrate yet")
}

/// The keys of this installation; makes the embedded root secret at first start.
///
/// # Errors
/// One sentence that says what to do about a secret file or an issuer.
pub fn papers(config: &Config) -> anyhow::Result<Papers> {
    let root_secret = match config.root_secret_file() {
        RootSecretFile::Given(path) => RootSecret::load(&path),
        RootSecretFile::Embedded(path) => {
            prepare_data_dir(&config.data_dir)?;
            RootSecret::load_or_create(&path)
        }
    };
    let root_secret = root_secret.map_err(|error| anyhow!(error))?;
    Papers::new(&config.issuers, &root_secret, &config.public_origin()).map_err(|error| anyhow!(error))
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
