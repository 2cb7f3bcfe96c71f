//! API tokens: how they are written and read. For people and automation, never for jobs.
//!
//! ```text
//! whf_<id: 16 hex digits><secret: 64 hex digits><checksum: 16 hex digits>
//! ```
//!
//! The prefix lets scanners find one that leaked, the checksum (CRC-64/NVME of all before it) tells a token with a slip
//! of the pen without a look at the database. Called by `service/credentials.rs`; what a token may do is written there.

use crc_fast::{CrcAlgorithm, checksum};
use secrecy::SecretString;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use uuid::Uuid;

const PREFIX: &str = "whf_";
const ID_DIGITS: usize = 16;
const SECRET_DIGITS: usize = 64;
const CHECKSUM_DIGITS: usize = 16;

/// A token that was read and is not believed yet.
#[derive(Debug, PartialEq, Eq)]
pub struct ApiTokenText {
    /// Which token it says it is.
    pub id: String,
    /// What is kept of its secret.
    pub secret_sha256: [u8; 32],
}

impl ApiTokenText {
    /// Whether a text claims to be an API token, good or not.
    pub fn is_claimed_by(text: &str) -> bool {
        text.starts_with(PREFIX)
    }

    /// `None` if it is no API token, or a slip of the pen.
    pub fn read(text: &str) -> Option<Self> {
        let digits = text.strip_prefix(PREFIX)?;
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if digits.len() != ID_DIGITS + SECRET_DIGITS + CHECKSUM_DIGITS || !digits.bytes().all(is_digit) {
            return None;
        }
        let (id, rest) = digits.split_at(ID_DIGITS);
        let (secret, checksum) = rest.split_at(SECRET_DIGITS);
        (checksum == checksum_of(id, secret)).then(|| Self {
            id: id.to_owned(),
            secret_sha256: Sha256::digest(secret).into(),
        })
    }

    /// A fresh one, and the text that its owner is shown once: 244 bits of the operating system's randomness.
    pub fn fresh() -> (Self, SecretString) {
        let id: String = Uuid::new_v4().simple().to_string().chars().take(ID_DIGITS).collect();
        let secret = format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple());
        let text = format!("{PREFIX}{id}{secret}{}", checksum_of(&id, &secret));
        let secret_sha256 = Sha256::digest(secret).into();
        (Self { id, secret_sha256 }, text.into())
    }

    /// Whether it is the token of which `kept` was kept, told in a time that does not depend on where they differ.
    pub fn matches(&self, kept: &[u8]) -> bool {
        self.secret_sha256.ct_eq(kept).into()
    }
}

fn checksum_of(id: &str, secret: &str) -> String {
    let crc = checksum(CrcAlgorithm::Crc64Nvme, format!("{PREFIX}{id}{secret}").as_bytes());
    format!("{crc:0width$x}", width = CHECKSUM_DIGITS)
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret;

    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let (token, text) = ApiTokenText::fresh();
        let text = text.expose_secret();
        assert_eq!(text.len(), 100);
        assert!(ApiTokenText::is_claimed_by(text));
        let read = ApiTokenText::read(text).unwrap();
        assert_eq!(read, token);
        assert!(read.matches(&token.secret_sha256));
        let (other, _) = ApiTokenText::fresh();
        assert!(!read.matches(&other.secret_sha256) && read.id != other.id);
        assert!(!read.matches(&[]) && !read.matches(&token.secret_sha256[1..]));
    }

    #[test]
    fn a_slip_of_the_pen_is_seen() {
        let (_, text) = ApiTokenText::fresh();
        let text = text.expose_secret();
        for at in 0..text.len() {
            let end = at + 1;
            for new in ["0", "a", "F", "é", ""] {
                let changed = format!("{}{new}{}", &text[..at], &text[end..]);
                assert!(changed == text || ApiTokenText::read(&changed).is_none(), "{changed}");
            }
        }
        for text in ["", "whf_", "ghp_0123456789abcdef", "a.b.c"] {
            assert_eq!(ApiTokenText::read(text), None);
        }
    }
}
