//! Ways to the parsers that are private to this floor, for the targets in `fuzz/`. In no build but theirs.

use jsonwebtoken::{Algorithm, crypto};

use super::key_sets;

/// Reads an issuer's key set: what each of its keys verifies. None of them may verify nonsense.
pub fn key_set(text: &[u8]) -> Option<Vec<Algorithm>> {
    const NONSENSE: &str = "bm9uc2Vuc2U";
    let keys = key_sets::parse("fuzzing", text).ok()?;
    let verified = keys.iter().map(|key| {
        let verifies = crypto::verify(NONSENSE, b"nonsense", &key.key, key.algorithm);
        assert!(!verifies.unwrap_or_default(), "{key:?}");
        key.algorithm
    });
    Some(verified.collect())
}
