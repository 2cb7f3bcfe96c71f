//! A runtime token: as it is, and its header and claims, one line each, signed by an issuer that we know.

#![no_main]

use std::sync::LazyLock;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, EncodingKey, crypto};
use libfuzzer_sys::fuzz_target;
use wharfinger::papers::Papers;
use wharfinger_fuzz::{ISSUER_SECRET, NOW_MS, papers};

static PAPERS: LazyLock<Papers> = LazyLock::new(papers);

fuzz_target!(|text: &str| {
    assert!(
        PAPERS.verify_token(text, NOW_MS).is_err(),
        "nobody but the issuer can sign"
    );
    let (header, claims) = text.split_once('\n').unwrap_or((r#"{"alg":"HS256"}"#, text));
    let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
    let key = EncodingKey::from_secret(ISSUER_SECRET.as_bytes());
    let signature = crypto::sign(signed.as_bytes(), &key, Algorithm::HS256).unwrap();
    let Ok(caller) = PAPERS.verify_token(&format!("{signed}.{signature}"), NOW_MS) else {
        return;
    };
    let word = |text: &str| {
        text.bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
    };
    // The other issuer has no secret.
    assert_eq!(caller.run.issuer, "forge");
    assert!(
        word(&caller.run.run_backend_id) && word(&caller.job_backend_id),
        "{caller:?}"
    );
    let (kind, name) = caller.run.repository.split_once(':').unwrap_or_default();
    assert!(
        name.is_empty() || ["id", "name"].contains(&kind) && name.split('/').all(word),
        "{caller:?}"
    );
    assert!(
        caller.run_id.is_none_or(|id| id > 0) && caller.run_attempt > 0,
        "{caller:?}"
    );
    assert!(caller.expires_at_ms > NOW_MS - 60_000, "{caller:?}");
    assert!(
        caller
            .cache_scopes
            .iter()
            .all(|scope| !scope.scope.contains(char::is_control)),
        "{caller:?}"
    );
});
