//! The key ring: the keys that sign and verify minted tokens and links, each under an id.
//!
//! Called by `mint`, `links` and the issuer table. A key id from outside is only ever compared with the ids here.

use std::fmt;

use hmac::{Hmac, KeyInit};
use jsonwebtoken::{DecodingKey, EncodingKey};
use sha2::Sha256;

use super::secret::RootSecret;

/// What signs links.
pub(super) type LinkMac = Hmac<Sha256>;

/// One generation of keys: the same id stands in a token's `kid` and in a link's `sk`.
pub(super) struct Key {
    pub id: String,
    pub mint: EncodingKey,
    pub minted: DecodingKey,
    /// Keyed and fed nothing yet: clone it for each link.
    pub link: LinkMac,
}

impl Key {
    fn derive(root: &RootSecret, id: &str) -> Result<Self, String> {
        let jwt = root.derive("jwt/v1", id)?;
        let url = root.derive("url/v1", id)?;
        Ok(Self {
            id: id.to_owned(),
            mint: EncodingKey::from_secret(&jwt),
            minted: DecodingKey::from_secret(&jwt),
            link: Hmac::new_from_slice(&url).map_err(|error| format!("can't use the key url/v1/{id}: {error}"))?,
        })
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key").field("id", &self.id).finish_non_exhaustive()
    }
}

#[derive(Debug)]
pub(super) struct KeyRing {
    active: Key,
}

impl KeyRing {
    pub fn new(root: &RootSecret) -> Result<Self, String> {
        Ok(Self {
            active: Key::derive(root, "1")?,
        })
    }

    /// The key that signs.
    pub fn active(&self) -> &Key {
        &self.active
    }

    /// Every key that may still verify.
    pub fn all(&self) -> impl Iterator<Item = &Key> {
        std::iter::once(&self.active)
    }

    pub fn find(&self, id: &str) -> Option<&Key> {
        self.all().find(|key| key.id == id)
    }
}

#[cfg(test)]
mod tests {
    use super::super::secret::tests::root;
    use super::*;

    #[test]
    fn keys_are_found_by_exact_id() {
        let ring = KeyRing::new(&root()).unwrap();
        assert_eq!(ring.find("1").unwrap().id, ring.active().id);
        for id in ["", "0", "01", "2", "1 ", "../../etc/passwd"] {
            assert!(ring.find(id).is_none());
        }
    }

    #[test]
    fn debug_shows_ids_only() {
        assert_eq!(
            format!("{:?}", KeyRing::new(&root()).unwrap()),
            "KeyRing { active: Key { id: \"1\", .. } }"
        );
    }
}
