//! Tokens that were verified before: a job shows the same one with each of its requests.
//!
//! Asked by `Papers::verify_token`, which looks again at whatever may have changed since. Knows a token by its hash and
//! never keeps its text. A token that was refused is not remembered.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use sha2::{Digest, Sha256};

use super::tokens::Verified;

/// A job has one token, of which less than a KiB is kept as a rule, and never more than some.
const MAX_TOKENS: usize = 4096;

#[derive(Debug, Default)]
pub(super) struct KnownTokens(RwLock<HashMap<[u8; 32], Arc<Verified>>>);

impl KnownTokens {
    pub fn find(&self, token: &str) -> Option<Arc<Verified>> {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        known.get(&hash(token)).cloned()
    }

    /// Remembers a token, in the place of what was known of it. If there are too many, all others are forgotten: those
    /// that are still in use come again.
    pub fn add(&self, token: &str, verified: Arc<Verified>) {
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MAX_TOKENS {
            known.clear();
        }
        known.insert(hash(token), verified);
    }
}

fn hash(token: &str) -> [u8; 32] {
    Sha256::digest(token).into()
}

#[cfg(test)]
mod tests {
    use super::super::issuers::{Issuer, Issuers};
    use super::super::keys::tests::first;
    use super::super::mint::mint;
    use super::super::mint::tests::{NOW_MS, request};
    use super::super::tokens::verify;
    use super::*;

    #[test]
    fn there_are_never_too_many() {
        let ring = first();
        let (issuers, minted) = (Issuers::new(&[]).unwrap(), Issuer::minted(&ring).unwrap());
        let token = mint(&ring, &request(), NOW_MS).unwrap();
        let verified = Arc::new(verify(&issuers, &minted, &token, true, NOW_MS).unwrap());
        let known = KnownTokens::default();
        for number in 0..=MAX_TOKENS {
            known.add(&number.to_string(), Arc::clone(&verified));
            assert!(known.find(&number.to_string()).is_some());
        }
        assert!(known.find("0").is_none() && known.find("other").is_none());
        assert_eq!(known.0.read().unwrap().len(), 1);
    }
}
