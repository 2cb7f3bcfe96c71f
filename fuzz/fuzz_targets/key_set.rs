//! An issuer's public keys: a JWK set as it is, and anything as a key beside one that is good.

#![no_main]

use jsonwebtoken::Algorithm;
use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use wharfinger::papers::fuzzing;
use wharfinger_fuzz::PUBLIC_KEY;

fuzz_target!(|text: &str| {
    for algorithm in fuzzing::key_set(text.as_bytes()).unwrap_or_default() {
        assert!(matches!(
            algorithm,
            Algorithm::RS256 | Algorithm::ES256 | Algorithm::EdDSA
        ));
    }
    // One key, whatever it is, hides no other.
    if serde_json::from_str::<[[Value; 1]; 1]>(&format!("[[{text}]]")).is_ok() {
        let set = format!(r#"{{"keys":[{text},{PUBLIC_KEY}]}}"#);
        let keys = fuzzing::key_set(set.as_bytes()).unwrap_or_default();
        assert_eq!(keys.last(), Some(&Algorithm::EdDSA));
        assert!(keys.len() <= 2);
    }
});
