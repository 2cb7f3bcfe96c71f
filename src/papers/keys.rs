//! The key ring: the keys that sign and verify minted tokens and links, each under an id.
//!
//! Called by `mint`, `links` and the issuer table. Which keys there are is written in the database and handed in; what
//! they are is derived from the root secret. A key id from outside is only ever compared with the ids here.

use std::fmt;

use hmac::{Hmac, KeyInit};
use jsonwebtoken::{DecodingKey, EncodingKey};
use sha2::Sha256;

use super::secret::RootSecret;
use crate::model::SigningKey;

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
    /// By the time from which they sign.
    keys: Vec<Key>,
    active: usize,
}

impl KeyRing {
    /// Of the keys that are not retired, the newest that signs by now is the active one.
    pub fn new(root: &RootSecret, keys: &[SigningKey], now_ms: i64) -> Result<Self, String> {
        let is_live = |key: &&SigningKey| key.retired_at_ms.is_none_or(|retired_at_ms| now_ms < retired_at_ms);
        let mut live: Vec<_> = keys.iter().filter(is_live).collect();
        live.sort_by_key(|key| key.signs_from_ms);
        let Some(active) = live.iter().rposition(|key| key.signs_from_ms <= now_ms) else {
            return Err("no signing key signs by now: is this machine's clock right?".into());
        };
        let keys = live.iter().map(|key| Key::derive(root, &key.id));
        Ok(Self {
            keys: keys.collect::<Result<_, _>>()?,
            active,
        })
    }

    /// The key that signs.
    pub fn active(&self) -> &Key {
        &self.keys[self.active]
    }

    /// Every key that may still verify.
    pub fn all(&self) -> impl Iterator<Item = &Key> {
        self.keys.iter()
    }

    pub fn find(&self, id: &str) -> Option<&Key> {
        self.all().find(|key| key.id == id)
    }

    /// Whether it has the same keys and signs with the same.
    pub fn is_like(&self, other: &Self) -> bool {
        self.active().id == other.active().id && self.all().map(|key| &key.id).eq(other.all().map(|key| &key.id))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::secret::tests::root;
    use super::*;

    pub fn first() -> KeyRing {
        KeyRing::new(&root(), &[SigningKey::first()], 0).unwrap()
    }

    #[test]
    fn keys_are_found_by_exact_id() {
        let ring = first();
        assert_eq!(ring.find("1").unwrap().id, ring.active().id);
        for id in ["", "0", "01", "2", "1 ", "../../etc/passwd"] {
            assert!(ring.find(id).is_none());
        }
    }

    #[test]
    fn a_new_key_verifies_before_it_signs_and_the_old_one_until_it_is_retired() {
        let second = SigningKey {
            id: "2".into(),
            created_at_ms: 1000,
            signs_from_ms: 2000,
            retired_at_ms: None,
        };
        let state = |keys: &[SigningKey], now_ms| {
            let ring = KeyRing::new(&root(), keys, now_ms)?;
            let all: Vec<_> = ring.all().map(|key| key.id.clone()).collect();
            Ok::<_, String>((ring.active().id.clone(), all.join(",")))
        };
        let ids = |active: &str, all: &str| Ok((active.to_owned(), all.to_owned()));
        let keys = [second.clone(), SigningKey::first()];
        assert_eq!(state(&keys, 1999), ids("1", "1,2"));
        assert_eq!(state(&keys, 2000), ids("2", "1,2"));
        let retired = SigningKey {
            retired_at_ms: Some(3000),
            ..SigningKey::first()
        };
        let keys = [retired, second];
        assert_eq!(state(&keys, 2999), ids("2", "1,2"));
        assert_eq!(state(&keys, 3000), ids("2", "2"));
        assert!(state(&keys[..1], 3000).unwrap_err().contains("clock"));
    }

    #[test]
    fn debug_shows_ids_only() {
        assert_eq!(
            format!("{:?}", first()),
            "KeyRing { keys: [Key { id: \"1\", .. }], active: 0 }"
        );
    }
}
