//! Secret files: reading them, refusing weak ones, and the one root secret that every key is derived from.
//!
//! Called by `Papers::new`, by the issuer table and by whoever starts the server. Reads and writes files at start only.
//! Never prints what a file holds.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use hkdf::Hkdf;
use secrecy::{ExposeSecret, SecretSlice};
use sha2::Sha256;
use uuid::Uuid;

const MIN_BYTES: usize = 32;
/// Far above any key; keeps a path such as `/dev/zero` from being read for ever.
const MAX_BYTES: usize = 64 * 1024;

/// Beginnings of secrets that stand in manuals and in the sources of other servers, in lower case.
const KNOWN_WEAK: [&str; 13] = [
    "changeme",
    "change-me",
    "change_me",
    "change this",
    "password",
    "secret",
    "badbeef",
    "deadbeef",
    "01234567",
    "12345678",
    "abcdefgh",
    "example",
    "insecure",
];

/// The secret that all replicas of an installation share and that all of its keys come from.
#[derive(Clone, Debug)]
pub struct RootSecret {
    secret: SecretSlice<u8>,
    fingerprint: String,
}

impl RootSecret {
    /// Reads the secret from a file; one newline at its end does not count.
    ///
    /// # Errors
    /// One sentence that says what to do about the file.
    pub fn load(path: &Path) -> Result<Self, String> {
        Self::new(read(path)?)
    }

    /// As [`RootSecret::load`]; a file that is not there is written first, with mode 0600 and a fresh secret.
    /// Of processes that start at once, one writes and all load the same. The directory must exist.
    ///
    /// # Errors
    /// One sentence that says what to do about the file.
    pub fn load_or_create(path: &Path) -> Result<Self, String> {
        let exists = path
            .try_exists()
            .map_err(|error| format!("can't look for {}: {error}", path.display()))?;
        if !exists {
            create(path).map_err(|error| format!("can't write a fresh secret to {}: {error}", path.display()))?;
        }
        Self::load(path)
    }

    fn new(secret: SecretSlice<u8>) -> Result<Self, String> {
        let fingerprint = expand(&secret, "fingerprint/v1")?;
        let fingerprint = fingerprint.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { secret, fingerprint })
    }

    /// Tells one root secret from another and gives nothing of it away: 64 hex digits, to be kept in the database.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The key of key id `key_id` for one purpose, such as `jwt/v1`. No two purposes or ids share a key.
    pub(super) fn derive(&self, purpose: &str, key_id: &str) -> Result<[u8; 32], String> {
        expand(&self.secret, &format!("{purpose}/{key_id}"))
    }
}

/// HKDF-SHA256 (RFC 5869) without a salt.
fn expand(secret: &SecretSlice<u8>, info: &str) -> Result<[u8; 32], String> {
    let mut key = [0; 32];
    Hkdf::<Sha256>::new(None, secret.expose_secret())
        .expand(info.as_bytes(), &mut key)
        .map_err(|error| format!("can't derive the key {info}: {error}"))?;
    Ok(key)
}

/// Reads any secret file: bytes as they are, without one newline at their end.
///
/// # Errors
/// One sentence that names the file if it can't be read, if everybody on the machine can read it, or if its secret is
/// short or weak.
pub(super) fn read(path: &Path) -> Result<SecretSlice<u8>, String> {
    let name = path.display();
    let unreadable = |error| format!("can't read the secret file {name}: {error}");
    let file = File::open(path).map_err(unreadable)?;
    if file.metadata().map_err(unreadable)?.mode() & 0o006 != 0 {
        return Err(format!(
            "the secret file {name} is open to everybody on this machine: chmod 600 {name}"
        ));
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    if bytes.last() == Some(&b'\n') {
        bytes.pop();
    }
    match weakness(&bytes) {
        None => Ok(bytes.into()),
        Some(why) => Err(format!(
            "the secret in {name} {why}: make a fresh one with `openssl rand -hex 32 > {name}`"
        )),
    }
}

fn weakness(secret: &[u8]) -> Option<&'static str> {
    let repeats = |period: usize| secret.iter().zip(&secret[period..]).all(|(one, next)| one == next);
    let begins_with = |word: &str| {
        secret
            .get(..word.len())
            .is_some_and(|s| s.eq_ignore_ascii_case(word.as_bytes()))
    };
    if secret.len() < MIN_BYTES {
        Some("is shorter than 32 bytes")
    } else if secret.len() > MAX_BYTES {
        Some("is longer than 64 KiB")
    } else if (1..=MIN_BYTES / 2).any(repeats) {
        Some("only repeats a short pattern")
    } else if KNOWN_WEAK.into_iter().any(begins_with) {
        Some("begins like a well-known one")
    } else {
        None
    }
}

/// Writes a fresh secret, synced, in one step: whoever finds the file finds all of it.
fn create(path: &Path) -> std::io::Result<()> {
    let directory = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let unfinished = directory.join(format!(".secret-{}", Uuid::new_v4()));
    // 244 bits of the operating system's randomness, as 64 hex digits.
    let secret = format!("{}{}\n", Uuid::new_v4().simple(), Uuid::new_v4().simple());
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&unfinished)
        .and_then(|mut file| {
            file.write_all(secret.as_bytes())?;
            file.sync_all()?;
            // Unlike a rename, a link never replaces what another process was quicker to write.
            fs::hard_link(&unfinished, path)
        });
    let removed = fs::remove_file(&unfinished);
    match written {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        other => other?,
    }
    removed?;
    File::open(directory)?.sync_all()
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    use super::*;

    pub fn root() -> RootSecret {
        RootSecret::new(b"a root secret that only tests know".to_vec().into()).unwrap()
    }

    pub fn write(directory: &Path, name: &str, secret: &[u8]) -> PathBuf {
        let path = directory.join(name);
        fs::write(&path, secret).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        path
    }

    #[test]
    fn weak_secrets_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let act = [0xba, 0xdb, 0xee, 0xf0].repeat(16);
        let weak: [(&[u8], &str); 12] = [
            (b"", "shorter than 32"),
            (b"BADBEEF0", "shorter than 32"),
            (b"3q2+7wkY1xT5mZ0rVb8sQeHcJdL4uNf", "shorter than 32"),
            (b"3q2+7wkY1xT5mZ0rVb8sQeHcJdL4uNf\n", "shorter than 32"),
            (&[0; 64], "repeats"),
            (&[b'a'; 40], "repeats"),
            (&act, "repeats"),
            (b"BADBEEF0BADBEEF0BADBEEF0BADBEEF0", "repeats"),
            (b"0123456789abcdef0123456789abcdef0", "repeats"),
            (b"ChangeMe-3q2+7wkY1xT5mZ0rVb8sQeHcJdL4uNf", "well-known"),
            (b"secret-secret-secret-secret!-secret-1", "well-known"),
            (&[b'x'; MAX_BYTES + 9], "longer"),
        ];
        for (secret, why) in weak {
            let error = RootSecret::load(&write(directory.path(), "weak", secret)).expect_err(why);
            assert!(error.contains(why), "{error}");
            assert!(!error.contains("3q2"), "{error}");
        }
    }

    #[test]
    fn good_secrets_are_taken_without_their_newline() {
        let directory = tempfile::tempdir().unwrap();
        let secret = b"3q2+7wkY1xT5mZ0rVb8sQeHcJdL4uNfg";
        let load = |end: &str| {
            RootSecret::load(&write(directory.path(), "good", &[secret, end.as_bytes()].concat()))
                .unwrap()
                .fingerprint
        };
        assert_eq!(load(""), load("\n"));
        assert_ne!(load(""), load("\r\n"), "a binary key may end in a carriage return");
        assert_ne!(load(""), load("\n\n"));
        assert_ne!(load(""), load(" "));
    }

    #[test]
    fn a_file_open_to_everybody_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = write(directory.path(), "open", b"3q2+7wkY1xT5mZ0rVb8sQeHcJdL4uNfg");
        for (mode, taken) in [
            (0o400, true),
            (0o600, true),
            (0o640, true),
            (0o644, false),
            (0o602, false),
        ] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            assert_eq!(RootSecret::load(&path).is_ok(), taken, "{mode:o}");
        }
        assert!(RootSecret::load(&path).unwrap_err().contains("chmod 600"));
    }

    #[test]
    fn of_many_that_create_all_load_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("root-secret");
        let start = std::sync::Barrier::new(8);
        let fingerprints: Vec<String> = std::thread::scope(|scope| {
            let racers: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| {
                        start.wait();
                        RootSecret::load_or_create(&path).unwrap().fingerprint
                    })
                })
                .collect();
            racers.into_iter().map(|racer| racer.join().unwrap()).collect()
        });
        assert!(fingerprints.iter().all(|fingerprint| *fingerprint == fingerprints[0]));
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::read(&path).unwrap().len(), 65);
        assert_eq!(
            fs::read_dir(directory.path()).unwrap().count(),
            1,
            "nothing unfinished is left"
        );
    }

    #[test]
    fn a_secret_is_never_created_over_a_bad_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = write(directory.path(), "short", b"short");
        assert!(RootSecret::load_or_create(&path).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"short");
        let error = RootSecret::load_or_create(&directory.path().join("no/such/place")).unwrap_err();
        assert!(error.contains("can't write"), "{error}");
    }

    /// A changed derivation would break every live link and lock every installation out of its database.
    #[test]
    fn derivation_never_changes() {
        let hex = |key: [u8; 32]| key.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!(
            root().fingerprint(),
            "fb5a4f88218e8901e5c7b02d4a7b7c79fd715460232fb680c7857fd01cf2a215"
        );
        assert_eq!(
            hex(root().derive("jwt/v1", "1").unwrap()),
            "576e88b2d163df576e79f7696a3d58cdccb4fccaca92f467fe33cc47a53bc59d"
        );
        assert_eq!(
            hex(root().derive("url/v1", "1").unwrap()),
            "74a0015158b2e5729b996b4ef743d47abd902633e9aab1e8deb1e09eaf9ec44f"
        );
    }

    #[test]
    fn debug_shows_no_secret() {
        let text = format!("{:?}", root());
        assert!(!text.contains("tests know") && !text.contains("97, 32"), "{text}");
    }
}
