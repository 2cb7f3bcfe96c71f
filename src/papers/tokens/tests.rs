//! Unit tests of token verification: every way in which a token can be wrong, and the few in which it is right.

use std::path::Path;
use std::time::Duration;

use hmac::{Hmac, KeyInit, Mac};
use serde_json::json;

use super::super::Papers;
use super::super::issuers::IssuerSettings;
use super::super::issuers::tests::{secret_of, settings};
use super::super::secret::tests::{root, write};
use super::*;
use crate::model::ClosedRun;

const NOW_S: i64 = 1_800_000_000;
const NOW_MS: i64 = NOW_S * 1000;
const HEADER: &str = r#"{"alg":"HS256","typ":"JWT"}"#;

fn sign(secret: &[u8], header: &str, claims: &str) -> String {
    let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
    let mac = Hmac::<sha2::Sha256>::new_from_slice(secret)
        .unwrap()
        .chain_update(&signed);
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes()))
}

fn forge_token(header: &str, claims: &str) -> String {
    sign(secret_of("forge").as_bytes(), header, claims)
}

/// Good claims with `changes` laid over them; `null` takes a claim away.
fn claims(changes: Value) -> String {
    let mut claims = json!({
        "iss": "https://forge.example",
        "scp": "Actions.Results:run-1:job-1",
        "exp": NOW_S + 3600,
    });
    for (name, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => claims.as_object_mut().unwrap().remove(name),
            value => claims.as_object_mut().unwrap().insert(name.clone(), value.clone()),
        };
    }
    claims.to_string()
}

fn papers_with(change: impl FnOnce(&Path, IssuerSettings) -> IssuerSettings) -> Papers {
    let directory = tempfile::tempdir().unwrap();
    let settings = change(directory.path(), settings(directory.path(), "forge"));
    Papers::new(&[settings], &root(), "http://localhost").unwrap()
}

fn papers() -> Papers {
    papers_with(|_, settings| settings)
}

#[track_caller]
fn accepted(papers: &Papers, changes: Value) -> Principal {
    let caller = papers.verify_token(&forge_token(HEADER, &claims(changes)), NOW_MS);
    Arc::unwrap_or_clone(caller.unwrap())
}

#[track_caller]
fn refused(papers: &Papers, token: &str, why: &str) {
    match papers.verify_token(token, NOW_MS) {
        Err(Error::Unauthorized(reason)) => assert!(reason.contains(why), "{reason}"),
        other => panic!("{why}: {other:?}"),
    }
}

#[track_caller]
fn refused_claims(papers: &Papers, changes: Value, why: &str) {
    refused(papers, &forge_token(HEADER, &claims(changes)), why);
}

#[test]
fn a_token_says_who_calls() {
    let principal = accepted(
        &papers(),
        json!({
            "scp": "Actions.GenericRead:x Actions.Results:ce7f54c7-61c7-4aae:ca395085.1_A Actions.Upload:a:b:c",
            "ac": r#"[{"Scope":"refs/heads/main","Permission":1},{"Scope":"refs/pull/7/merge","Permission":3,"More":[]}]"#,
            "repository": "Octo/Demo.Repo", "repository_id": "1296269", "run_id": 30433642, "run_attempt": "2",
            "iat": NOW_S - 5, "nbf": NOW_S - 300, "jti": {"any": 1},
        }),
    );
    let scope = |scope: &str, write| CacheScope {
        scope: scope.to_owned(),
        read: true,
        write,
    };
    let expected = Principal {
        run: RunKey {
            issuer: "forge".into(),
            repository: "id:1296269".into(),
            run_backend_id: "ce7f54c7-61c7-4aae".into(),
        },
        repository_name: Some("Octo/Demo.Repo".into()),
        run_id: Some(30_433_642),
        run_attempt: 2,
        job_backend_id: "ca395085.1_A".into(),
        cache_scopes: vec![scope("refs/heads/main", false), scope("refs/pull/7/merge", true)],
        issued_at_ms: Some(NOW_MS - 5_000),
        expires_at_ms: NOW_MS + 3_600_000,
    };
    assert_eq!(principal, expected);
}

#[test]
fn a_token_may_say_little() {
    let principal = accepted(&papers(), json!({}));
    assert_eq!(principal.run.repository, "");
    assert_eq!(
        (principal.repository_name, principal.run_id, principal.run_attempt),
        (None, None, 1)
    );
    assert_eq!(principal.cache_scopes, []);
}

#[test]
fn the_repository_is_a_number_or_a_name_and_the_two_never_meet() {
    let papers = papers();
    let key = |changes| accepted(&papers, changes).run.repository;
    assert_eq!(key(json!({"repository": "Octo/Demo"})), "name:octo/demo");
    assert_eq!(key(json!({"repository": "octo/demo", "repository_id": 5})), "id:5");
    assert_eq!(key(json!({"repository_id": "5"})), "id:5");
    for bad in [
        "", "demo", "a/b/c", "/b", "a/", "a/..", "./b", "a b/c", "a/b\u{0}", "ä/b",
    ] {
        refused_claims(&papers, json!({"repository": bad}), "repository");
    }
    for bad in [
        json!(0),
        json!(-1),
        json!(1.5),
        json!("+5"),
        json!(""),
        json!("0x5"),
        json!(u64::MAX),
        json!([5]),
    ] {
        for name in ["repository_id", "run_id", "run_attempt"] {
            refused_claims(&papers, json!({name: bad}), name);
        }
    }
    refused_claims(&papers, json!({"run_attempt": 2_147_483_648_i64}), "run_attempt");

    let papers = papers_with(|_, settings| IssuerSettings {
        repository: Some("Own/Repo".into()),
        ..settings
    });
    let key = |changes| accepted(&papers, changes).run.repository;
    assert_eq!(key(json!({})), "name:own/repo");
    assert_eq!(key(json!({"repository": "octo/demo"})), "name:octo/demo");
    assert_eq!(key(json!({"repository_id": 5})), "id:5");
}

/// B002 and whatever else is no token at all.
#[test]
fn text_that_is_no_token() {
    let papers = papers();
    let good = forge_token(HEADER, &claims(json!({})));
    let (signed, signature) = good.rsplit_once('.').unwrap();
    for token in [
        "",
        ".",
        "..",
        "...",
        "a.b.c",
        "dXNlcjpwYXNz",
        &format!("{good}."),
        &format!(".{good}"),
        &format!("{good}.{good}"),
        &format!(" {good}"),
        &format!("{good}\n"),
        &format!("{good}="),
        signed,
        &format!("{signed}."),
        &format!("{signed}.{signature}A"),
        &format!("{signed}.{}", &signature[..42]),
        &format!("{signed}=.{signature}"),
        &"a".repeat(MAX_TOKEN_BYTES + 1),
        &forge_token("[]", &claims(json!({}))),
        &forge_token(HEADER, r#"["https://forge.example",1]"#),
        &forge_token(HEADER, "null"),
        &forge_token(HEADER, ""),
        &forge_token(HEADER, &format!("{}x", claims(json!({})))),
        &forge_token(&format!("{}{HEADER}", " ".repeat(MAX_HEADER_BYTES)), &claims(json!({}))),
    ] {
        refused(&papers, token, "");
    }
}

#[test]
fn a_name_given_twice_is_refused() {
    let papers = papers();
    let good = claims(json!({}));
    for twice in [r#""exp":1800000001"#, r#""iss":"wharfinger""#, r#""other":1,"other":2"#] {
        let claims = good.replacen('{', &format!("{{{twice},"), 1);
        refused(&papers, &forge_token(HEADER, &claims), "not a JSON object");
    }
    refused(
        &papers,
        &forge_token(r#"{"alg":"HS256","alg":"HS256"}"#, &good),
        "not a JSON object",
    );
    let ac = r#"[{"Scope":"a","Scope":"b","Permission":1}]"#;
    refused_claims(&papers, json!({ "ac": ac }), "ac");
}

/// B004, B005.
#[test]
fn only_the_issuers_algorithm_counts() {
    let papers = papers();
    let claims = claims(json!({}));
    for alg in [
        "none", "None", "NONE", "nOnE", "", "hs256", "HS384", "HS512", "RS256", "ES256", "EdDSA", "HS256 ",
    ] {
        let header = json!({"alg": alg, "typ": "JWT"}).to_string();
        let signed = forge_token(&header, &claims);
        let unsigned = format!("{}.", signed.rsplit_once('.').unwrap().0);
        refused(&papers, &signed, "alg");
        refused(&papers, &unsigned, "alg");
    }
    for header in ["{}", r#"{"alg":null}"#, r#"{"alg":["HS256"]}"#, r#"{"alg":256}"#] {
        refused(&papers, &forge_token(header, &claims), "alg");
    }
    let unsigned = format!(
        "{}.{}.",
        URL_SAFE_NO_PAD.encode(HEADER),
        URL_SAFE_NO_PAD.encode(&claims)
    );
    refused(&papers, &unsigned, "signature is wrong");
}

/// B006, and right keys in wrong hands (B015).
#[test]
fn only_the_issuers_own_keys_count() {
    let papers = papers();
    let minted = claims(json!({"iss": "wharfinger"}));
    for secret in [
        &b""[..],
        b"BADBEEF0",
        &[0xba, 0xdb, 0xee, 0xf0],
        secret_of("other").as_bytes(),
    ] {
        refused(&papers, &sign(secret, HEADER, &claims(json!({}))), "signature is wrong");
    }
    refused(&papers, &forge_token(HEADER, &minted), "kid");
    refused(
        &papers,
        &forge_token(r#"{"alg":"HS256","kid":"1"}"#, &minted),
        "signature is wrong",
    );
    let root_itself = b"a root secret that only tests know";
    refused(
        &papers,
        &sign(root_itself, r#"{"alg":"HS256","kid":"1"}"#, &minted),
        "signature is wrong",
    );
}

#[test]
fn the_previous_secret_still_verifies() {
    let papers = papers_with(|directory, settings| {
        let previous = write(directory, "previous", secret_of("previous").as_bytes());
        IssuerSettings {
            previous_secret_file: Some(previous),
            ..settings
        }
    });
    for name in ["forge", "previous"] {
        let token = sign(secret_of(name).as_bytes(), HEADER, &claims(json!({})));
        assert!(papers.verify_token(&token, NOW_MS).is_ok());
    }
}

/// B007.
#[test]
fn a_kid_only_chooses_among_known_keys() {
    let papers = papers();
    for kid in ["../../etc/passwd", "' OR 1=1--", "1", "", "/dev/null", "\u{0}"] {
        let header = json!({"alg": "HS256", "kid": kid}).to_string();
        refused(&papers, &forge_token(&header, &claims(json!({}))), "kid");
        refused(&papers, &sign(b"", &header, &claims(json!({}))), "kid");
        if kid != "1" {
            refused(
                &papers,
                &forge_token(&header, &claims(json!({"iss": "wharfinger"}))),
                "kid",
            );
        }
    }
    for kid in [json!(1), json!(null), json!(["1"]), json!({})] {
        let header = json!({"alg": "HS256", "kid": kid}).to_string();
        refused(&papers, &forge_token(&header, &claims(json!({}))), "kid");
    }
}

/// What can change about a token that was good before, one after the other.
#[test]
fn a_token_that_comes_again_is_looked_at_again() {
    let papers = papers();
    let token = forge_token(HEADER, &claims(json!({"nbf": NOW_S, "repository": "octo/demo"})));
    let at = |now_ms| match papers.verify_token(&token, now_ms) {
        Err(Error::Unauthorized(reason)) => reason,
        other => format!("{other:?}"),
    };
    let good = at(NOW_MS);
    assert!(good.starts_with("Ok(Principal") && at(NOW_MS) == good, "{good}");
    assert_eq!(at(NOW_MS - LEEWAY_MS - 1), "the token is not valid yet");
    assert_eq!(at(NOW_MS + 3_600_000 + LEEWAY_MS), "the token has expired");
    assert_eq!(at(NOW_MS), good);
    let closed = ClosedRun {
        issuer: None,
        repository: "name:octo/demo".to_owned(),
        run: "run-1".to_owned(),
        job: None,
        closed_at_ms: NOW_MS,
        ends_issued_until_ms: NOW_MS,
    };
    papers.close_runs([closed], NOW_MS);
    assert_eq!(at(NOW_MS), "the token's run or job was closed");
}

/// B008.
#[test]
fn a_header_brings_no_key_along() {
    let papers = papers();
    for name in FORBIDDEN_HEADERS {
        for value in [
            json!("https://evil.example/keys"),
            json!({"kty": "oct", "k": ""}),
            json!(["exp"]),
            json!(false),
        ] {
            let header = json!({"alg": "HS256", name: value}).to_string();
            refused(&papers, &forge_token(&header, &claims(json!({}))), name);
        }
    }
}

/// B019.
#[test]
fn every_bit_of_the_signature_counts() {
    let papers = papers();
    let good = forge_token(HEADER, &claims(json!({})));
    assert!(papers.verify_token(&good, NOW_MS).is_ok());
    let (signed, signature) = good.rsplit_once('.').unwrap();
    let signature = URL_SAFE_NO_PAD.decode(signature).unwrap();
    for bit in 0..256 {
        let mut changed = signature.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        let token = format!("{signed}.{}", URL_SAFE_NO_PAD.encode(changed));
        refused(&papers, &token, "signature is wrong");
    }
}

/// B010.
#[test]
fn exp_is_an_integer_and_there() {
    let papers = papers();
    let good = claims(json!({}));
    let exp = format!("\"exp\":{}", NOW_S + 3600);
    assert!(good.contains(&exp));
    for bad in [
        "\"never\"",
        "\"1800003600\"",
        "null",
        "true",
        "[1800003600]",
        "1800003600.0",
        "1.8e9",
        "1e400",
    ] {
        let claims = good.replace(&exp, &format!("\"exp\":{bad}"));
        refused(&papers, &forge_token(HEADER, &claims), "");
    }
    for bad in [0, -1, i64::MAX, i64::MIN, MAX_DATE_S + 1] {
        refused_claims(&papers, json!({"exp": bad}), "");
    }
    refused_claims(&papers, json!({"exp": u64::MAX}), "exp");
    refused_claims(&papers, json!({"exp": null}), "no exp");
}

/// B011.
#[test]
fn nbf_and_iat_are_checked_where_they_stand() {
    let papers = papers();
    for name in ["nbf", "iat"] {
        refused_claims(&papers, json!({name: "99999999999"}), name);
        refused_claims(&papers, json!({name: NOW_S as f64}), name);
        refused_claims(&papers, json!({name: -1}), name);
        refused_claims(&papers, json!({name: i64::MAX}), name);
        refused_claims(&papers, json!({name: NOW_S + 3600}), "not valid yet");
        refused_claims(&papers, json!({name: NOW_S + 61}), "not valid yet");
        accepted(&papers, json!({name: NOW_S + 59}));
        let null = claims(json!({})).replacen('{', &format!("{{\"{name}\":null,"), 1);
        refused(&papers, &forge_token(HEADER, &null), name);
    }
}

/// B012.
#[test]
fn a_token_ends_60_seconds_after_its_exp() {
    let papers = papers();
    refused_claims(&papers, json!({"exp": NOW_S - 61}), "expired");
    refused_claims(&papers, json!({"exp": NOW_S - 60}), "expired");
    let principal = accepted(&papers, json!({"exp": NOW_S - 59}));
    assert_eq!(
        principal.expires_at_ms,
        NOW_MS - 59_000,
        "the leeway lengthens nothing else"
    );
}

#[test]
fn a_token_lives_no_longer_than_its_issuer_may() {
    let papers = papers_with(|_, settings| IssuerSettings {
        max_lifetime: Duration::from_secs(7200),
        ..settings
    });
    let why = "max_lifetime";
    accepted(&papers, json!({"iat": NOW_S, "exp": NOW_S + 7200}));
    refused_claims(&papers, json!({"iat": NOW_S, "exp": NOW_S + 7201}), why);
    refused_claims(&papers, json!({"iat": NOW_S - 7200, "exp": NOW_S + 3600}), why);
    refused_claims(&papers, json!({"iat": 0, "exp": NOW_S + 1}), why);
    accepted(&papers, json!({"exp": NOW_S + 7260}));
    refused_claims(&papers, json!({"exp": NOW_S + 7261}), why);
    refused_claims(&papers, json!({"exp": MAX_DATE_S}), why);
}

/// B015.
#[test]
fn issuer_and_audience_are_exact() {
    let papers = papers();
    for iss in [
        json!("https://evil.example"),
        json!(""),
        json!("https://forge.example/"),
        json!("forge"),
        json!(1),
    ] {
        refused_claims(&papers, json!({"iss": iss}), "iss");
    }
    refused_claims(&papers, json!({"iss": null}), "iss");
    accepted(&papers, json!({"aud": "anybody"}));
    accepted(&papers, json!({"aud": ["anybody"]}));
    for aud in [json!(["a", "b"]), json!([]), json!(1), json!({"a": 1}), json!([1])] {
        refused_claims(&papers, json!({"aud": aud}), "aud");
    }

    let papers = papers_with(|_, settings| IssuerSettings {
        audience: Some("ours".into()),
        ..settings
    });
    accepted(&papers, json!({"aud": "ours"}));
    accepted(&papers, json!({"aud": ["ours"]}));
    refused_claims(&papers, json!({}), "audience");
    for aud in [
        json!("evil"),
        json!("Ours"),
        json!(""),
        json!(["evil"]),
        json!(["ours", "evil"]),
        json!([["ours"]]),
    ] {
        refused_claims(&papers, json!({"aud": aud}), "aud");
    }
}

#[test]
fn a_token_without_iss_is_the_default_issuers() {
    let papers = papers_with(|_, settings| IssuerSettings {
        iss: None,
        default: true,
        ..settings
    });
    assert_eq!(accepted(&papers, json!({"iss": null})).run.issuer, "forge");
    refused_claims(&papers, json!({}), "iss");
}

/// B016.
#[test]
fn scp_names_one_run_and_one_job() {
    let papers = papers();
    let long = "x".repeat(128);
    assert_eq!(
        accepted(&papers, json!({"scp": format!("Actions.Results:{long}:1")}))
            .run
            .run_backend_id,
        long
    );
    for scp in [
        "",
        "Actions.Other:a:b",
        "actions.results:a:b",
        "Actions.Results",
        "Actions.Results:",
        "Actions.Results:a",
        "Actions.Results:a:",
        "Actions.Results::b",
        "Actions.Results:a:b:c",
        "Actions.Results:a:b Actions.Results:a:b",
        "Actions.Results:a:b Actions.Results",
        "Actions.Results:a:b\tActions.Results:c:d",
        "Actions.Results:a/b:c",
        "Actions.Results:a:b\u{0}",
        "Actions.Results:ä:b",
        "Actions.Results:a:b%20",
        &format!("Actions.Results:{long}x:1"),
    ] {
        refused_claims(&papers, json!({"scp": scp}), "scp");
    }
    for scp in [json!(["Actions.Results:a:b"]), json!(1), json!(null)] {
        refused_claims(&papers, json!({"scp": scp}), "scp");
    }
}

/// B017.
#[test]
fn ac_is_a_short_list_in_a_string() {
    let papers = papers();
    let scopes = |count| {
        let scopes: Vec<_> = (0..count)
            .map(|n| json!({"Scope": n.to_string(), "Permission": 3}))
            .collect();
        json!({"ac": json!(scopes).to_string()})
    };
    assert_eq!(accepted(&papers, json!({"ac": "[]"})).cache_scopes, []);
    assert_eq!(accepted(&papers, scopes(16)).cache_scopes.len(), 16);
    refused_claims(&papers, scopes(17), "too many");
    refused_claims(&papers, scopes(10_000), "");
    refused_claims(
        &papers,
        json!({"ac": format!("[{}]", " ".repeat(MAX_AC_BYTES))}),
        "too long",
    );
    for ac in [json!([]), json!([{"Scope": "a", "Permission": 1}]), json!(3), json!({})] {
        refused_claims(&papers, json!({"ac": ac}), "ac");
    }
    for permission in ["4", "-1", "\"3\"", "3.0", "null", "true", "18446744073709551616"] {
        let ac = format!(r#"[{{"Scope":"a","Permission":{permission}}}]"#);
        refused_claims(&papers, json!({ "ac": ac }), "Permission");
    }
    for ac in [
        "",
        "[{",
        "null",
        "{}",
        "[1]",
        r#"[["a",3]]"#,
        r#"[{"Scope":"a"}]"#,
        r#"[{"Permission":1}]"#,
        r#"[{"Scope":1,"Permission":1}]"#,
        r#"[{"Scope":"a\u0000","Permission":1}]"#,
        r#"[{"scope":"a","permission":1}]"#,
        "[] []",
    ] {
        refused_claims(&papers, json!({ "ac": ac }), "");
    }
}

#[test]
fn permissions_are_bits() {
    let ac = r#"[{"Scope":"","Permission":0},{"Scope":"","Permission":1},{"Scope":"","Permission":2},{"Scope":"","Permission":3}]"#;
    let bits = |papers: Papers| -> Vec<_> {
        let scopes = accepted(&papers, json!({ "ac": ac })).cache_scopes;
        scopes.into_iter().map(|scope| (scope.read, scope.write)).collect()
    };
    assert_eq!(
        bits(papers()),
        [(false, false), (true, false), (false, true), (true, true)]
    );
    let gitea = papers_with(|_, settings| IssuerSettings {
        write_implies_read: true,
        ..settings
    });
    assert_eq!(bits(gitea), [(false, false), (true, false), (true, true), (true, true)]);
}

#[test]
fn events_of_outsiders_write_no_branch() {
    let scopes = [
        "refs/heads/main",
        "",
        "refs/pull/7/merge",
        "refs/tags/v1",
        "refs/heads/gh-readonly-queue/main/pr-7",
    ];
    let ac = json!(scopes.map(|scope| json!({ "Scope": scope, "Permission": 3 }))).to_string();
    let writable = |papers: &Papers, event: Value| -> Vec<String> {
        let caller = accepted(papers, json!({ "ac": ac, "event_name": event }));
        assert!(caller.cache_scopes.iter().all(|scope| scope.read));
        let scopes = caller.cache_scopes.into_iter();
        scopes.filter(|scope| scope.write).map(|scope| scope.scope).collect()
    };
    for event in [
        json!("push"),
        json!("schedule"),
        json!("workflow_dispatch"),
        Value::Null,
    ] {
        assert_eq!(writable(&papers(), event), scopes);
    }
    for event in [
        "pull_request",
        "pull_request_target",
        "issue_comment",
        "workflow_run",
        "",
        "Push",
    ] {
        assert_eq!(writable(&papers(), json!(event)), ["refs/pull/7/merge"], "{event}");
    }
    assert_eq!(writable(&papers(), json!("release")), ["refs/tags/v1"]);
    assert_eq!(
        writable(&papers(), json!("merge_group")),
        ["refs/heads/gh-readonly-queue/main/pr-7"]
    );
    let trusting = papers().untrusted_events_readonly(false);
    assert_eq!(writable(&trusting, json!("issue_comment")), scopes);
    refused_claims(&papers(), json!({ "event_name": 1 }), "event_name");
}
