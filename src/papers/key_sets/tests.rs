//! Unit tests of key sets: which keys count, for which tokens, and files that change. What goes over the network is tried
//! in `tests/it/key_sets.rs`.

use aws_lc_rs::encoding::{AsDer as _, Pkcs8V1Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, RsaKeyPair};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{EncodingKey, crypto};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::super::Papers;
use super::super::issuers::tests::settings;
use super::super::issuers::{IssuerKind, IssuerSettings};
use super::super::secret::tests::{root, write};
use super::*;
use crate::error::Error;
use crate::model::Principal;

const NOW_S: i64 = 1_800_000_000;
const NOW_MS: i64 = NOW_S * 1000;
const ALGORITHMS: [Algorithm; 3] = [Algorithm::RS256, Algorithm::ES256, Algorithm::EdDSA];

fn private_key(algorithm: Algorithm) -> EncodingKey {
    let random = SystemRandom::new();
    match algorithm {
        Algorithm::RS256 => {
            let der: Pkcs8V1Der = RsaKeyPair::generate(KeySize::Rsa2048).unwrap().as_der().unwrap();
            // The library wants the RSAPrivateKey (RFC 8017) that PKCS #8 puts 26 bytes around.
            EncodingKey::from_rsa_der(&der.as_ref()[26..])
        }
        Algorithm::ES256 => {
            let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random);
            EncodingKey::from_ec_der(document.unwrap().as_ref())
        }
        _ => EncodingKey::from_ed_der(Ed25519KeyPair::generate_pkcs8v1(&random).unwrap().as_ref()),
    }
}

/// The public half as a JWK, with `changes` laid over it; `null` takes a member away.
fn jwk(key: &EncodingKey, algorithm: Algorithm, changes: Value) -> Value {
    let mut jwk = json!(Jwk::from_encoding_key(key, algorithm).unwrap());
    for (name, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => jwk.as_object_mut().unwrap().remove(name),
            value => jwk.as_object_mut().unwrap().insert(name.clone(), value.clone()),
        };
    }
    jwk
}

fn set(keys: &[Value]) -> String {
    json!({ "keys": keys }).to_string()
}

fn claims(changes: Value) -> Value {
    let mut claims = json!({
        "iss": "https://forge.example",
        "scp": "Actions.Results:run-1:job-1",
        "exp": NOW_S + 3600,
    });
    claims
        .as_object_mut()
        .unwrap()
        .extend(changes.as_object().unwrap().clone());
    claims
}

fn unsigned(header: Value, claims: &Value) -> String {
    let encode = |part: String| URL_SAFE_NO_PAD.encode(part);
    format!("{}.{}", encode(header.to_string()), encode(claims.to_string()))
}

fn token(key: &EncodingKey, algorithm: Algorithm, header: Value, claims: &Value) -> String {
    let signed = unsigned(header, claims);
    let signature = crypto::sign(signed.as_bytes(), key, algorithm).unwrap();
    format!("{signed}.{signature}")
}

fn papers_with(keys: &str, change: impl FnOnce(IssuerSettings) -> IssuerSettings) -> Result<Papers, String> {
    let directory = tempfile::tempdir().unwrap();
    let settings = IssuerSettings {
        kind: IssuerKind::Jwks,
        secret_file: None,
        jwks_file: Some(write(directory.path(), "keys.json", keys.as_bytes())),
        ..settings(directory.path(), "forge")
    };
    Papers::new(&[change(settings)], &root(), "http://localhost")
}

fn papers(keys: &str) -> Papers {
    papers_with(keys, |settings| settings).unwrap()
}

#[track_caller]
fn accepted(papers: &Papers, token: &str) -> Arc<Principal> {
    papers.verify_token(token, NOW_MS).unwrap()
}

#[track_caller]
fn refused(papers: &Papers, token: &str, why: &str) {
    match papers.verify_token(token, NOW_MS) {
        Err(Error::Unauthorized(reason)) => assert!(reason.contains(why), "{reason}"),
        other => panic!("{why}: {other:?}"),
    }
}

#[test]
fn a_key_verifies_the_algorithm_of_its_type() {
    for algorithm in ALGORITHMS {
        let key = private_key(algorithm);
        for changes in [
            json!({}),
            json!({ "alg": null }),
            json!({ "use": "sig", "kid": "a", "x5t": "AAAA", "x5c": ["MII"], "more": {} }),
            json!({ "key_ops": ["verify"] }),
        ] {
            let keys = parse("forge", set(&[jwk(&key, algorithm, changes.clone())]).as_bytes()).unwrap();
            assert_eq!(keys.len(), 1);
            assert_eq!(keys[0].algorithm, algorithm);
            assert_eq!(keys[0].id.as_deref(), changes["kid"].as_str());
        }
    }
}

#[test]
fn keys_that_can_not_be_used_are_left_out() {
    let [rsa, ec, ed] = ALGORITHMS.map(|algorithm| (private_key(algorithm), algorithm));
    let of = |(key, algorithm): &(EncodingKey, Algorithm), changes| jwk(key, *algorithm, changes);
    let number = |bytes: usize| URL_SAFE_NO_PAD.encode(vec![0xff; bytes]);
    let mut just_too_short = vec![0xff; 256];
    just_too_short[0] = 0x7f;
    let good = of(&ec, json!({}));
    let bad = [
        json!(null),
        json!("key"),
        json!({}),
        json!({ "kty": "oct", "k": number(32) }),
        json!({ "kty": "oct", "k": number(32), "alg": "RS256", "use": "sig" }),
        of(&rsa, json!({ "kty": "rsa" })),
        of(&rsa, json!({ "kty": "oct" })),
        of(&rsa, json!({ "n": number(128) })),
        of(&rsa, json!({ "n": number(255) })),
        of(&rsa, json!({ "n": URL_SAFE_NO_PAD.encode(&just_too_short) })),
        of(
            &rsa,
            json!({ "n": URL_SAFE_NO_PAD.encode([vec![0; 200], vec![0xff; 128]].concat()) }),
        ),
        of(&rsa, json!({ "n": number(1025) })),
        of(&rsa, json!({ "n": "" })),
        of(&rsa, json!({ "n": "not base64url!" })),
        of(&rsa, json!({ "n": null })),
        of(&rsa, json!({ "e": null })),
        of(&rsa, json!({ "e": 65537 })),
        of(&rsa, json!({ "alg": "RS512" })),
        of(&rsa, json!({ "alg": "PS256" })),
        of(&rsa, json!({ "alg": "HS256" })),
        of(&rsa, json!({ "alg": "none" })),
        of(&rsa, json!({ "alg": "ES256" })),
        of(&rsa, json!({ "alg": "RSA-OAEP" })),
        of(&rsa, json!({ "use": "enc" })),
        of(&rsa, json!({ "use": "" })),
        of(&rsa, json!({ "key_ops": ["sign", "encrypt"] })),
        of(&rsa, json!({ "kid": 1 })),
        of(&ec, json!({ "crv": "P-384" })),
        of(&ec, json!({ "crv": "secp256k1" })),
        of(&ec, json!({ "x": number(48), "y": number(48) })),
        of(&ec, json!({ "x": number(31) })),
        of(&ec, json!({ "y": null })),
        of(&ec, json!({ "alg": "RS256" })),
        of(&ed, json!({ "crv": "X25519" })),
        of(&ed, json!({ "crv": "Ed448" })),
        of(&ed, json!({ "crv": "P-256" })),
        of(&ed, json!({ "x": number(31) })),
        of(&ed, json!({ "alg": "ES256" })),
    ];
    for bad in bad {
        let alone = parse("forge", set(std::slice::from_ref(&bad)).as_bytes());
        assert!(alone.unwrap_err().contains("no key that can be used"), "{bad}");
        let beside = parse("forge", set(&[bad, good.clone()]).as_bytes()).unwrap();
        assert_eq!(beside.len(), 1);
    }
    for text in [
        "",
        "[]",
        "{}",
        "null",
        r#"{"keys":{}}"#,
        r#"{"keys":"a"}"#,
        "{\"keys\":[",
        "<html>",
    ] {
        assert!(
            parse("forge", text.as_bytes()).unwrap_err().contains("not a JWK set"),
            "{text}"
        );
    }
}

#[test]
fn a_token_is_verified_by_the_key_that_it_names() {
    for algorithm in ALGORITHMS {
        let [own, other, nameless] = [(); 3].map(|()| private_key(algorithm));
        let papers = papers(&set(&[
            jwk(&own, algorithm, json!({ "kid": "own" })),
            jwk(&other, algorithm, json!({ "kid": "other" })),
            jwk(&nameless, algorithm, json!({})),
        ]));
        let sign = |key, header: Value| token(key, algorithm, header, &claims(json!({})));
        let header = |kid: &str| json!({ "alg": algorithm, "typ": "JWT", "kid": kid });
        assert_eq!(accepted(&papers, &sign(&own, header("own"))).run.issuer, "forge");
        accepted(&papers, &sign(&nameless, json!({ "alg": algorithm })));
        refused(&papers, &sign(&own, header("other")), "signature is wrong");
        refused(&papers, &sign(&nameless, header("own")), "signature is wrong");
        refused(&papers, &sign(&own, json!({ "alg": algorithm })), "signature is wrong");
        refused(&papers, &sign(&own, header("")), "kid");
        refused(&papers, &sign(&own, header("own ")), "kid");
        refused(&papers, &sign(&own, json!({ "alg": algorithm, "kid": null })), "kid");
        for name in ["jku", "jwk", "x5u", "x5c", "crit", "b64", "zip"] {
            let header = json!({ "alg": algorithm, "kid": "own", name: ["exp"] });
            refused(&papers, &sign(&own, header), name);
        }
    }
}

/// B004, B005: the algorithm is the key's, not the token's.
#[test]
fn no_token_chooses_its_algorithm() {
    for algorithm in ALGORITHMS {
        let key = private_key(algorithm);
        let public = jwk(&key, algorithm, json!({ "kid": "a" }));
        let papers = papers(&set(std::slice::from_ref(&public)));
        for alg in [
            "none", "None", "", "HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512",
            "ES256", "ES384", "EdDSA", "eddsa", "Ed25519",
        ] {
            if alg.parse() == Ok(algorithm) {
                continue;
            }
            let header = json!({ "alg": alg, "kid": "a" });
            refused(
                &papers,
                &token(&key, algorithm, header.clone(), &claims(json!({}))),
                "alg",
            );
            let unsigned = unsigned(header, &claims(json!({})));
            refused(&papers, &format!("{unsigned}."), "alg");
            for secret in [public.to_string(), public["x"].to_string(), public["n"].to_string()] {
                let secret = EncodingKey::from_secret(secret.as_bytes());
                let signature = crypto::sign(unsigned.as_bytes(), &secret, Algorithm::HS256).unwrap();
                refused(&papers, &format!("{unsigned}.{signature}"), "alg");
            }
        }
    }
}

/// Signatures that some verifiers once took for good whatever was signed.
#[test]
fn signatures_of_nothing() {
    for algorithm in ALGORITHMS {
        let papers = papers(&set(&[jwk(&private_key(algorithm), algorithm, json!({}))]));
        let signed = unsigned(json!({ "alg": algorithm }), &claims(json!({})));
        for length in [0, 1, 32, 64, 70, 256] {
            for byte in [0, 1, 0xff] {
                let signature = URL_SAFE_NO_PAD.encode(vec![byte; length]);
                refused(&papers, &format!("{signed}.{signature}"), "signature is wrong");
            }
        }
    }
    // With the exponent 1 everybody can sign.
    let one = json!({ "kty": "RSA", "n": URL_SAFE_NO_PAD.encode([0xff; 256]), "e": "AQ" });
    let papers = papers(&set(&[one]));
    let signed = unsigned(json!({ "alg": "RS256" }), &claims(json!({})));
    let mut padded = vec![0xff; 256];
    padded[..2].copy_from_slice(&[0, 1]);
    padded[204] = 0;
    // DigestInfo of SHA-256 (RFC 8017, section 9.2).
    padded[205..224].copy_from_slice(&[
        0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0x04,
        0x20,
    ]);
    padded[224..].copy_from_slice(&Sha256::digest(&signed));
    let forged = format!("{signed}.{}", URL_SAFE_NO_PAD.encode(padded));
    refused(&papers, &forged, "signature is wrong");
}

/// B014.
#[test]
fn an_allow_list_lets_only_its_own_in() {
    let key = private_key(Algorithm::EdDSA);
    let keys = set(&[jwk(&key, Algorithm::EdDSA, json!({}))]);
    let papers_of = |owners: Option<Vec<i64>>, repositories: Option<Vec<i64>>| {
        let change = |settings| IssuerSettings {
            kind: IssuerKind::GithubRuntime,
            allowed_owner_ids: owners,
            allowed_repository_ids: repositories,
            ..settings
        };
        papers_with(&keys, change).unwrap()
    };
    let token = |changes| token(&key, Algorithm::EdDSA, json!({ "alg": "EdDSA" }), &claims(changes));
    let owners = papers_of(Some(vec![7, 583_231]), None);
    accepted(&owners, &token(json!({ "repository_owner_id": "583231" })));
    accepted(
        &owners,
        &token(json!({ "repository_owner_id": 7, "repository_id": "1" })),
    );
    for changes in [
        json!({}),
        json!({ "repository_owner_id": "8" }),
        json!({ "repository_owner_id": 58 }),
        json!({ "repository_id": "7" }),
        json!({ "repository_owner": "octo", "repository": "octo/demo" }),
    ] {
        refused(&owners, &token(changes), "allowed_owner_ids");
    }
    for id in [
        json!("7 "),
        json!("+7"),
        json!(7.0),
        json!(["7"]),
        json!(null),
        json!(-7),
    ] {
        refused(
            &owners,
            &token(json!({ "repository_owner_id": id })),
            "repository_owner_id",
        );
    }
    let repositories = papers_of(None, Some(vec![9]));
    let allowed = accepted(
        &repositories,
        &token(json!({ "repository_id": "9", "repository_owner_id": "1" })),
    );
    assert_eq!(allowed.run.repository, "id:9");
    for changes in [
        json!({}),
        json!({ "repository_id": "10" }),
        json!({ "repository_owner_id": "9" }),
    ] {
        refused(&repositories, &token(changes), "allowed_repository_ids");
    }
    // Who sets both means both.
    let both = papers_of(Some(vec![7]), Some(vec![9]));
    accepted(
        &both,
        &token(json!({ "repository_id": "9", "repository_owner_id": "7" })),
    );
    refused(
        &both,
        &token(json!({ "repository_id": "9", "repository_owner_id": "8" })),
        "allowed_owner_ids",
    );
    refused(
        &both,
        &token(json!({ "repository_id": "8", "repository_owner_id": "7" })),
        "allowed_repository_ids",
    );
    // An id token has the same issuer and the same keys, and no scp.
    let id_token = json!({ "scp": null, "repository_owner_id": "7", "aud": "sts.amazonaws.com" });
    refused(&owners, &token(id_token), "scp");
}

#[test]
fn urls_are_https_or_lead_to_this_machine() {
    for good in [
        "https://forge.example/keys",
        "https://10.0.0.1:8443/keys?x=1",
        "http://127.0.0.1:8080/keys",
        "http://127.1.2.3/",
        "http://[::1]:80/keys",
    ] {
        assert!(parse_url(good).is_ok(), "{good}");
    }
    for bad in [
        "",
        "keys",
        "/keys.json",
        "file:///keys.json",
        "data:application/json,{}",
        "ftp://forge.example/keys",
        "http://forge.example/keys",
        "http://169.254.169.254/keys",
        "http://127.0.0.1.evil.example/",
        "http://localhost/keys",
        "http://[::2]/keys",
        "https://",
        "https://user@forge.example/keys",
        "https://user:pass@forge.example/keys",
    ] {
        let error = KeySet::at_url("forge", bad).expect_err(bad);
        assert!(error.contains("`jwks_url`") && !error.contains("pass"), "{error}");
    }
}

#[test]
fn a_file_that_can_not_be_used_refuses_to_start() {
    let key = jwk(&private_key(Algorithm::EdDSA), Algorithm::EdDSA, json!({}));
    let good = set(&[key]);
    let large = format!("{good}{}", " ".repeat(MAX_BYTES));
    for (text, why) in [
        ("", "not a JWK set"),
        (r#"{"keys":[]}"#, "no key that can be used"),
        (&large, "larger than 1 MiB"),
    ] {
        let error = papers_with(text, |settings| settings).unwrap_err();
        assert!(error.starts_with("issuer `forge`: ") && error.contains(why), "{error}");
        assert!(error.contains("keys.json"), "{error}");
    }
    let directory = tempfile::tempdir().unwrap();
    let file = write(directory.path(), "keys.json", good.as_bytes());
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    assert!(KeySet::in_file("forge", &file).unwrap_err().contains("chmod o-w"));
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    KeySet::in_file("forge", &file).unwrap();
}

#[tokio::test]
async fn a_changed_file_is_read_again() {
    let directory = tempfile::tempdir().unwrap();
    let [old, new] = [(); 2].map(|()| private_key(Algorithm::ES256));
    let texts = [&old, &new].map(|key| set(&[jwk(key, Algorithm::ES256, json!({}))]));
    let file = write(directory.path(), "keys.json", texts[0].as_bytes());
    let settings = IssuerSettings {
        kind: IssuerKind::Jwks,
        secret_file: None,
        jwks_file: Some(file.clone()),
        ..settings(directory.path(), "forge")
    };
    let papers = Papers::new(&[settings], &root(), "http://localhost").unwrap();
    let token = |key| token(key, Algorithm::ES256, json!({ "alg": "ES256" }), &claims(json!({})));
    let (mut now_ms, years_ms) = (NOW_MS, 100 * 24 * 3_600_000);
    let only = |key, papers: &Papers| {
        for other in [&old, &new] {
            assert_eq!(
                papers.verify_token(&token(other), NOW_MS).is_ok(),
                std::ptr::eq(other, key)
            );
        }
    };
    only(&old, &papers);
    papers.refresh_key_sets(now_ms).await;

    std::fs::write(&file, &texts[1]).unwrap();
    now_ms += EVERY_MS - 1;
    papers.refresh_key_sets(now_ms).await;
    assert!(papers.authenticate(&token(&new), NOW_MS).await.is_err());
    only(&old, &papers);
    now_ms += 1;
    papers.refresh_key_sets(now_ms).await;
    only(&new, &papers);

    // What can't be used changes nothing, for however long.
    for bad in ["", "{\"keys\":[]}", &" ".repeat(MAX_BYTES + 1)] {
        std::fs::write(&file, bad).unwrap();
        now_ms += years_ms;
        papers.refresh_key_sets(now_ms).await;
        only(&new, &papers);
    }
    std::fs::remove_file(&file).unwrap();
    now_ms += years_ms;
    papers.refresh_key_sets(now_ms).await;
    only(&new, &papers);
    std::fs::write(&file, &texts[0]).unwrap();
    now_ms += EVERY_MS;
    papers.refresh_key_sets(now_ms).await;
    only(&old, &papers);
}
