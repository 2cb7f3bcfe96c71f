//! Issuers with public keys, over the network: outages, storms of bad tokens, changes of keys, forgeries; and two issuers
//! at once with the real client. What makes a key usable is tried beside `src/papers/key_sets.rs`.

use std::net::TcpListener;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures_util::future::join_all;
use jsonwebtoken::Algorithm;
use serde_json::{Value, json};
use wharfinger::clock::Clock;

use super::common::client::{Runner, Status, run_client};
use super::common::issuer::{self, Answer, KeyPair, KeySetServer, key_set};
use super::common::process::{Environment, Process};
use super::common::s3::S3Server;
use super::common::{Backend, Job, TestServer, polled, postgres_database};

const ALGORITHMS: [Algorithm; 3] = [Algorithm::RS256, Algorithm::ES256, Algorithm::EdDSA];
const MINUTE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// A server whose one issuer `ghes` publishes its keys at `keys`.
async fn server_of(keys: &KeySetServer) -> TestServer {
    TestServer::start_with(Backend::SqliteDisk, |config| {
        issuer::add_public(config, "ghes", &keys.url);
    })
    .await
}

fn claims(server: &TestServer) -> Value {
    issuer::claims("ghes", "octo/demo", "1", "build", server.app.services.clock.now_ms())
}

fn token(server: &TestServer, key: &KeyPair) -> String {
    key.sign(&key.header(), &claims(server))
}

/// A token that names a key that nobody has.
fn stranger(server: &TestServer, key: &KeyPair) -> String {
    let header = json!({ "alg": key.algorithm, "kid": uuid::Uuid::new_v4().to_string() });
    key.sign(&header, &claims(server))
}

/// What a list with this token is answered with.
async fn status(server: &TestServer, token: String) -> u16 {
    let job = Job {
        server,
        token,
        run: "1".to_owned(),
        job: "build".to_owned(),
    };
    job.call("ListArtifacts", json!({})).await.0
}

/// A listener that nobody may speak to.
fn trap() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let url = format!("http://{}/keys", listener.local_addr().unwrap());
    (listener, url)
}

/// B004, B005, B007, B008, B015, B019 for issuers with public keys.
#[tokio::test(flavor = "multi_thread")]
async fn forged_tokens_are_refused_and_ask_nobody() {
    let (trap, trap_url) = trap();
    for algorithm in ALGORITHMS {
        let own = KeyPair::generate(algorithm, "1");
        let others: Vec<KeyPair> = ALGORITHMS.map(|other| KeyPair::generate(other, "1")).into();
        let foreign = KeyPair::generate(algorithm, "foreign");
        let keys = KeySetServer::start(Answer::Text(key_set(&[&own]))).await;
        let foreign_keys = KeySetServer::start(Answer::Text(key_set(&[&others[0], &others[1], &foreign]))).await;
        let server = TestServer::start_with(Backend::SqliteDisk, |config| {
            issuer::add_public(config, "ghes", &keys.url);
            issuer::add_public(config, "other", &foreign_keys.url);
            issuer::add(config, "forge", None);
        })
        .await;
        let claims = claims(&server);
        let good = own.sign(&own.header(), &claims);
        assert_eq!(status(&server, good.clone()).await, 200);

        let mut forged = Vec::new();
        let unsigned = |header: &Value| good_parts(header, &claims);
        for alg in [
            "none", "None", "nOnE", "HS256", "HS512", "RS256", "RS512", "PS256", "ES256", "ES384", "EdDSA",
        ] {
            let header = json!({ "alg": alg, "kid": "1" });
            forged.push(format!("{}.", unsigned(&header)));
            for key in others.iter().chain([&foreign]) {
                forged.push(key.sign(&header, &claims));
            }
            if alg.parse() != Ok(algorithm) {
                forged.push(own.sign(&header, &claims));
            }
        }
        let header = json!({ "alg": "HS256", "kid": "1" }).to_string();
        for secret in [
            own.public_pem().into_bytes(),
            own.public_pem().trim_end().as_bytes().to_vec(),
            own.public_der.clone(),
            own.jwk().to_string().into_bytes(),
            issuer::secret("forge").into_bytes(),
            Vec::new(),
        ] {
            forged.push(issuer::sign(&secret, &header, &claims.to_string()));
        }
        for kid in [
            json!("foreign"),
            json!("2"),
            json!(""),
            json!("../1"),
            json!(1),
            json!(null),
        ] {
            let header = json!({ "alg": algorithm, "kid": kid });
            forged.push(own.sign(&header, &claims));
            forged.push(foreign.sign(&header, &claims));
        }
        forged.push(own.sign(&json!({ "alg": algorithm }), &claims));
        for (name, value) in [
            ("jwk", others[0].jwk()),
            ("jku", json!(trap_url)),
            ("x5u", json!(trap_url)),
            ("x5c", json!([URL_SAFE_NO_PAD.encode(&own.public_der)])),
            ("crit", json!(["exp"])),
        ] {
            for key in others.iter().chain([&own]) {
                let mut header = key.header();
                header[name] = value.clone();
                forged.push(key.sign(&header, &claims));
            }
        }
        for iss in ["https://forge.example", "https://other.example", "wharfinger", ""] {
            let mut claims = claims.clone();
            claims["iss"] = json!(iss);
            forged.push(own.sign(&own.header(), &claims));
        }
        let (signed, signature) = good.rsplit_once('.').unwrap();
        let mut flipped = URL_SAFE_NO_PAD.decode(signature).unwrap();
        for at in [0, flipped.len() / 2, flipped.len() - 1] {
            flipped[at] ^= 1;
            forged.push(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(&flipped)));
        }
        let statuses = join_all(forged.iter().map(|token| status(&server, token.clone()))).await;
        for (token, status) in forged.iter().zip(statuses) {
            assert_eq!(status, 401, "{algorithm:?} {token}");
        }
        assert_eq!(status(&server, good).await, 200);
        assert_eq!((keys.requests(), foreign_keys.requests()), (1, 1));
        server.stop().await;
    }
    assert!(trap.accept().is_err(), "the server asked the attacker for a key");
}

/// Header and claims of a token, without a signature.
fn good_parts(header: &Value, claims: &Value) -> String {
    let encode = |part: &Value| URL_SAFE_NO_PAD.encode(part.to_string());
    format!("{}.{}", encode(header), encode(claims))
}

/// R29.
#[tokio::test(flavor = "multi_thread")]
async fn an_issuer_that_is_away_is_missed_by_new_keys_only() {
    let (trap, trap_url) = trap();
    let key = KeyPair::generate(Algorithm::RS256, "1");
    let good = Answer::Text(key_set(&[&key]));
    let keys = KeySetServer::start(good.clone()).await;
    let server = server_of(&keys).await;
    assert_eq!(status(&server, token(&server, &key)).await, 200);
    for (number, answer) in [
        Answer::Text("<html>Bad gateway</html>".to_owned()),
        Answer::Text(r#"{"keys":[{"kty":"oct","kid":"1","k":"AAAA"}]}"#.to_owned()),
        Answer::Large(10 << 20),
        Answer::Redirect(trap_url),
        Answer::Status(500),
        Answer::Status(204),
        Answer::Closed,
        Answer::Silence,
    ]
    .into_iter()
    .enumerate()
    {
        let what = format!("{answer:?}").chars().take(60).collect::<String>();
        keys.answer(answer);
        server.advance(MINUTE);
        let bad: Vec<String> = (0..20).map(|_| stranger(&server, &key)).collect();
        let all = join_all(bad.into_iter().map(|token| status(&server, token)));
        // Those who wait for the issuer hold up nobody.
        let (bad, known) = tokio::join!(all, status(&server, token(&server, &key)));
        assert_eq!((bad, known), (vec![401; 20], 200), "{what}");
        assert_eq!(keys.requests(), 2 + number, "{what}");
    }
    // Within the same minute nobody waits for it again.
    let again = tokio::time::timeout(Duration::from_secs(2), status(&server, stranger(&server, &key)));
    assert_eq!(again.await.expect("in time"), 401);

    // The keys count for a day from the last good answer on, which came before the first minute.
    keys.answer(Answer::Status(503));
    server.advance(DAY - 9 * MINUTE);
    assert_eq!(status(&server, token(&server, &key)).await, 200);
    server.advance(MINUTE);
    assert_eq!(status(&server, token(&server, &key)).await, 401);
    keys.answer(good);
    server.advance(MINUTE);
    assert_eq!(status(&server, token(&server, &key)).await, 200);
    assert!(trap.accept().is_err(), "a redirect was followed");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_key_counts_from_its_first_token_on() {
    for algorithm in ALGORITHMS {
        let [old, new] = ["old", "new"].map(|kid| KeyPair::generate(algorithm, kid));
        let keys = KeySetServer::start(Answer::Text(key_set(&[&old]))).await;
        let server = server_of(&keys).await;
        assert_eq!(status(&server, token(&server, &old)).await, 200);
        keys.answer(Answer::Text(key_set(&[&old, &new])));
        server.advance(MINUTE);
        let both = [&old, &new, &new, &new].map(|key| status(&server, token(&server, key)));
        assert_eq!(join_all(both).await, [200; 4]);
        assert_eq!(keys.requests(), 2);

        // What the issuer takes back is gone with the next look in the background.
        keys.answer(Answer::Text(key_set(&[&new])));
        server.advance(5 * MINUTE);
        let services = &server.app.services;
        services.papers.refresh_key_sets(services.clock.now_ms()).await;
        services.papers.refresh_key_sets(services.clock.now_ms()).await;
        assert_eq!(keys.requests(), 3);
        assert_eq!(status(&server, token(&server, &old)).await, 401);
        assert_eq!(status(&server, token(&server, &new)).await, 200);
        server.stop().await;
    }
}

/// B163.
#[tokio::test(flavor = "multi_thread")]
async fn bad_tokens_do_not_become_requests() {
    let key = KeyPair::generate(Algorithm::EdDSA, "1");
    let keys = KeySetServer::start(Answer::Text(key_set(&[&key]))).await;
    let server = server_of(&keys).await;
    assert_eq!(status(&server, token(&server, &key)).await, 200);
    for second in 0..180 {
        // Ten replies of the issuer are bad, then good ones again.
        keys.answer(match second % 20 {
            0..10 => Answer::Status(500),
            _ => Answer::Text(key_set(&[&key])),
        });
        let papers = &server.app.services.papers;
        let now_ms = server.app.services.clock.now_ms();
        let tokens: Vec<String> = (0..5).map(|_| stranger(&server, &key)).collect();
        let refused = join_all(tokens.iter().map(|token| papers.authenticate(token, now_ms))).await;
        assert!(refused.iter().all(Result::is_err));
        papers.refresh_key_sets(now_ms).await;
        assert!(keys.requests() <= 1 + second / 60, "{second} s: {}", keys.requests());
        server.advance(Duration::from_secs(1));
    }
    let tokens: Vec<String> = (0..500).map(|_| stranger(&server, &key)).collect();
    let before = keys.requests();
    let statuses = join_all(tokens.into_iter().map(|token| status(&server, token))).await;
    assert_eq!(statuses, [401; 500]);
    assert!(keys.requests() <= before + 1);
    assert_eq!(status(&server, token(&server, &key)).await, 200);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_starts_while_its_issuer_is_away() {
    let key = KeyPair::generate(Algorithm::ES256, "1");
    let keys = KeySetServer::start(Answer::Closed).await;
    let server = server_of(&keys).await;
    assert_eq!(status(&server, token(&server, &key)).await, 401);
    keys.answer(Answer::Text(key_set(&[&key])));
    assert_eq!(status(&server, token(&server, &key)).await, 401, "not so soon");
    server.advance(MINUTE);
    assert_eq!(status(&server, token(&server, &key)).await, 200);
    assert_eq!(keys.requests(), 2);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_does_not_take_the_fetch_along() {
    let [old, new] = ["old", "new"].map(|kid| KeyPair::generate(Algorithm::EdDSA, kid));
    let keys = KeySetServer::start(Answer::Text(key_set(&[&old]))).await;
    let server = server_of(&keys).await;
    assert_eq!(status(&server, token(&server, &old)).await, 200);
    keys.answer(Answer::Text(key_set(&[&new])));
    server.advance(MINUTE);
    let (papers, now_ms) = (&server.app.services.papers, server.app.services.clock.now_ms());
    let token = token(&server, &new);
    let mut gone = Box::pin(papers.authenticate(&token, now_ms));
    // Only on a very busy machine is the fetch through already.
    polled(&mut gone, 0).await;
    drop(gone);
    papers.authenticate(&token, now_ms).await.unwrap();
    assert_eq!(keys.requests(), 2);
    server.stop().await;
}

/// The real client, twice at once: runs of the same id and repository, of two issuers, and artifacts of the same names.
#[tokio::test(flavor = "multi_thread")]
async fn two_issuers_share_nothing() {
    for backend in Backend::ALL {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str, text: String| {
            let path = directory.path().join(name);
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
            path
        };
        let key = KeyPair::generate(Algorithm::RS256, "1");
        let keys = KeySetServer::start(Answer::Text(key_set(&[&key]))).await;
        let data_dir = directory.path().join("data");
        let root_secret = file(
            "root.secret",
            "the root secret of two issuers' test, no other".to_owned(),
        );
        let s3 = (backend == Backend::PostgresS3).then(S3Server::start);
        let mut environment = match &s3 {
            None => Environment::embedded(&data_dir),
            Some(s3) => Environment::production(&data_dir, &postgres_database().await, s3, &root_secret),
        };
        let secret_file = file("forge.secret", issuer::secret("forge"));
        let issuers = format!(
            "[[issuers]]\nname = 'ghes'\nkind = 'jwks'\niss = 'https://ghes.example'\njwks_url = '{}'\n\
             [[issuers]]\nname = 'forge'\nkind = 'hs256'\niss = 'https://forge.example'\nsecret_file = '{}'\n",
            keys.url,
            secret_file.display()
        );
        environment.set("WHARFINGER_CONFIG", file("wharfinger.toml", issuers).display());
        let server = Process::start(&environment);

        let now_ms = Clock::System.now_ms();
        let [ghes, forge] = ["ghes", "forge"].map(|name| issuer::claims(name, "octo/demo", "1", "build", now_ms));
        let forge_token = issuer::sign(issuer::secret("forge").as_bytes(), issuer::HEADER, &forge.to_string());
        let meeting = directory.path().join("meeting");
        std::fs::create_dir(&meeting).unwrap();
        let clients = [key.sign(&key.header(), &ghes), forge_token].map(|token| {
            let runner = Runner {
                url: server.url.clone(),
                token,
                variables: vec![("WHARFINGER_TEST_MEETING", meeting.display().to_string())],
            };
            tokio::task::spawn_blocking(move || run_client(&runner, "artifact-6.2.1", "beside"))
        });
        for client in clients {
            let outcomes = client.await.unwrap();
            assert!(
                outcomes.iter().all(|outcome| outcome.status == Status::Ok),
                "{backend:?} {outcomes:?}"
            );
        }
    }
}
