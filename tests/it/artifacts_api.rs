//! Artifacts of version 4 as their clients see them, by hand-made requests on both pairs of database and store.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, stream};
use reqwest::{Method, Response};
use serde_json::{Value, json};
use sha2::Digest;
use wharfinger::clock::Clock;
use wharfinger::config::Config;
use wharfinger::model::{BlobId, BlobKind, ObjectKey, Sha256};
use wharfinger::papers::{MintRequest, Permission};
use wharfinger::service::Services;
use wharfinger::storage::Listed;

use super::common::{Backend, Job, TestServer, block_link, block_list, issuer, raw};
use super::db_contract::Raw;

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

async fn on_both(test: impl AsyncFn(&TestServer)) {
    on_both_with(|_| {}, test).await;
}

async fn on_both_with(edit: impl Fn(&mut Config), test: impl AsyncFn(&TestServer)) {
    for backend in Backend::ALL {
        println!("on {backend:?}");
        let server = TestServer::start_with(backend, &edit).await;
        test(&server).await;
        server.stop().await;
    }
}

fn sha256(bytes: &[u8]) -> Sha256 {
    Sha256(sha2::Sha256::digest(bytes).into())
}

fn blob_of(link: &str) -> BlobId {
    let (_, rest) = link.split_once("/blob/art/").unwrap();
    BlobId(rest.split('?').next().unwrap().parse().unwrap())
}

/// A link that lasts, whatever the clock says until then.
fn lasting_link(server: &TestServer, permission: Permission, blob: BlobId) -> String {
    let papers = &server.app.services.papers;
    papers.sign_link(BlobKind::Artifact, permission, blob, 9_999_999_999)
}

/// Bytes that differ everywhere.
fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 31 + i / 251) as u8).collect()
}

async fn get(server: &TestServer, link: &str, headers: &[(&str, &str)]) -> Response {
    request(server, Method::GET, link, headers).await
}

async fn request(server: &TestServer, method: Method, link: &str, headers: &[(&str, &str)]) -> Response {
    let request = server.http.request(method, link);
    let request = headers
        .iter()
        .fold(request, |request, (name, value)| request.header(*name, *value));
    request.send().await.unwrap()
}

fn header<'a>(reply: &'a Response, name: &str) -> Option<&'a str> {
    reply.headers().get(name).map(|value| value.to_str().unwrap())
}

/// Status and error code of a reply.
fn refusal(reply: &Response) -> (u16, Option<&str>) {
    (reply.status().as_u16(), header(reply, "x-ms-error-code"))
}

async fn stage(job: &Job<'_>, link: &str, id: &str, bytes: &[u8]) {
    assert_eq!(job.put(&block_link(link, id), bytes.to_vec()).await.0, 201);
}

async fn commit(job: &Job<'_>, link: &str, ids: &[&str]) -> (u16, Option<String>) {
    job.put(&format!("{link}&comp=blocklist"), block_list(ids)).await
}

async fn finalize(job: &Job<'_>, name: &str, size: usize) -> (u16, Value) {
    job.call("FinalizeArtifact", json!({ "name": name, "size": size.to_string() }))
        .await
}

async fn objects(server: &TestServer) -> Vec<Listed> {
    let services = &server.app.services;
    services.store.list_all().try_collect().await.unwrap()
}

async fn clean(server: &TestServer) {
    server.app.services.clean().await.unwrap().expect("nobody else cleans");
}

/// Moves the clock until the cleaner may take all that is dead, and lets it.
async fn clean_to_the_end(server: &TestServer) {
    for span in [server.config.cleaner.delete_grace, server.config.cleaner.sweep_after] {
        server.advance(span);
        clean(server).await;
    }
}

/// Another replica's services, over the same database and store.
async fn second_replica(server: &TestServer) -> Services {
    let clock = Clock::Fixed(std::sync::Arc::clone(&server.clock));
    wharfinger::app::open(&server.config, clock).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_create_wins() {
    on_both(async |server| {
        let (build, test) = (server.job(), server.job_of("octo/demo", "1", "test"));
        let old = build.create("image").await;
        stage(&build, &old, "QQ==", b"old").await;
        let new = test.create("image").await;
        assert_ne!(blob_of(&old), blob_of(&new));
        let immutable = (409, Some("BlobImmutableDueToPolicy".to_owned()));
        assert_eq!(build.put(&old, b"old".to_vec()).await, immutable);
        assert_eq!(build.put(&block_link(&old, "QQ=="), b"old".to_vec()).await, immutable);
        assert_eq!(commit(&build, &old, &["QQ=="]).await, immutable);
        let (status, reply) = finalize(&build, "image", 3).await;
        assert_eq!((status, &reply["code"]), (409, &json!("aborted")), "{reply}");

        assert_eq!(test.put(&new, b"new".to_vec()).await.0, 201);
        assert_eq!(finalize(&test, "image", 3).await.0, 200);
        assert_eq!(build.download("image").await, b"new");

        let old = lasting_link(server, Permission::Write, blob_of(&old));
        server.advance(server.config.cleaner.delete_grace);
        clean(server).await;
        assert_eq!(build.put(&old, b"old".to_vec()).await, immutable);
        server.advance(server.config.cleaner.sweep_after);
        clean(server).await;
        let gone = (404, Some("BlobNotFound".to_owned()));
        assert_eq!(build.put(&old, b"old".to_vec()).await, gone);
        assert_eq!(objects(server).await.len(), 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_uploading_job_finalizes() {
    on_both(async |server| {
        let (build, test) = (server.job(), server.job_of("octo/demo", "1", "test"));
        let link = build.create("a").await;
        assert_eq!(build.put(&link, b"abc".to_vec()).await.0, 201);
        let (status, reply) = finalize(&test, "a", 3).await;
        assert_eq!((status, &reply["code"]), (409, &json!("aborted")), "{reply}");
        // The ids of a request count for nothing but the comparison with the token's.
        let posing = Job {
            job: "build".to_owned(),
            ..server.job_of("octo/demo", "1", "test")
        };
        let (status, reply) = finalize(&posing, "a", 3).await;
        assert_eq!((status, &reply["code"]), (403, &json!("permission_denied")));
        assert_eq!(build.names().await, [""; 0]);
        assert_eq!(finalize(&build, "a", 3).await.0, 200);
        assert_eq!(finalize(&test, "a", 3).await.0, 409);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn finalize_and_the_block_list_may_be_repeated() {
    on_both(async |server| {
        let job = server.job();
        let link = job.create("a").await;
        stage(&job, &link, "QQ==", b"abc").await;
        stage(&job, &link, "Qg==", b"de").await;
        for _ in 0..2 {
            assert_eq!(commit(&job, &link, &["QQ==", "Qg=="]).await.0, 201);
        }
        let hash = sha256(b"abcde").to_string();
        let fields = json!({ "name": "a", "size": "5", "hash": hash });
        let first = job.call("FinalizeArtifact", fields.clone()).await;
        assert_eq!(first.0, 200, "{}", first.1);
        assert_eq!(job.call("FinalizeArtifact", fields).await, first);
        // A client that sends no hash means the same.
        assert_eq!(finalize(&job, "a", 5).await, first);
        assert_eq!(commit(&job, &link, &["QQ==", "Qg=="]).await.0, 201);
        for other in [&["Qg==", "QQ=="][..], &["QQ=="], &["Qw=="], &[]] {
            assert_eq!(commit(&job, &link, other).await.0, 409, "{other:?}");
        }
        for (size, hash) in [("4", hash.clone()), ("5", sha256(b"other").to_string())] {
            let fields = json!({ "name": "a", "size": size, "hash": hash });
            assert_eq!(job.call("FinalizeArtifact", fields).await.0, 409);
        }
        assert_eq!(job.download("a").await, b"abcde");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_kept_as_they_are() {
    on_both(async |server| {
        let job = server.job();
        let longest = "ü".repeat(127) + "x";
        let good = [
            "small art",
            "größe 🚢",
            "100%",
            "a#b",
            "..%2f..%2fx",
            ".hidden",
            "...",
            "a'b;--",
            &longest,
        ];
        for name in good {
            job.upload(name, name.as_bytes()).await;
            assert_eq!(job.download(name).await, name.as_bytes());
        }
        assert_eq!(job.names().await, good.into_iter().rev().collect::<Vec<_>>());
        for name in good {
            assert_eq!(
                job.call("DeleteArtifact", json!({ "name": name })).await.0,
                200,
                "{name}"
            );
        }
        let too_long = "ü".repeat(128);
        for name in [
            "",
            ".",
            "..",
            "a/b",
            "a\\b",
            "a\u{0}b",
            "a\u{7f}b",
            "a\u{9b}b",
            "a\u{202a}b",
            "a\u{202e}b",
            "a\u{2066}b",
            "a\u{2069}b",
            "\u{feff}a",
            &too_long,
        ] {
            let (status, reply) = job.call("CreateArtifact", json!({ "name": name })).await;
            assert_eq!((status, &reply["code"]), (400, &json!("invalid_argument")), "{name:?}");
        }
        assert_eq!(job.names().await, [""; 0]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_list_is_the_runs() {
    on_both(async |server| {
        let (build, test) = (server.job(), server.job_of("octo/demo", "1", "test"));
        let mut ids = vec![build.upload("first", b"1").await];
        server.advance(Duration::from_millis(1234));
        ids.push(test.upload("second", b"22").await);
        ids.push(build.upload("third", b"333").await);
        build.create("pending").await;
        let committed = build.create("committed").await;
        assert_eq!(build.put(&committed, b"x".to_vec()).await.0, 201);
        server.job_of("octo/demo", "2", "build").upload("elsewhere", b"x").await;

        for job in [&build, &test] {
            assert_eq!(job.names().await, ["third", "second", "first"]);
        }
        let numbers: Vec<i64> = ids.iter().map(|id| id.parse().unwrap()).collect();
        assert!(numbers.is_sorted_by(|one, next| one < next), "{numbers:?}");
        assert!(numbers.iter().all(|id| (1..1 << 53).contains(id)), "{numbers:?}");

        let (_, by_name) = build.call("ListArtifacts", json!({ "name_filter": "second" })).await;
        let (_, by_id) = build.call("ListArtifacts", json!({ "id_filter": ids[1] })).await;
        assert_eq!(by_name, by_id);
        let created_at = by_name["artifacts"][0]["created_at"].as_str().unwrap();
        let expected = json!({ "artifacts": [{
            "workflow_run_backend_id": "1",
            "workflow_job_run_backend_id": "test",
            "database_id": ids[1],
            "name": "second",
            "size": "2",
            "created_at": created_at,
            "digest": sha256(b"22").to_string(),
        }]});
        assert_eq!(by_name, expected);
        assert_eq!(
            (created_at.len(), &created_at[19..20], &created_at[23..]),
            (24, ".", "Z")
        );
        let created_ms = humantime::parse_rfc3339(created_at).unwrap();
        let created_ms = created_ms.duration_since(std::time::UNIX_EPOCH).unwrap().as_millis();
        assert_eq!(i64::try_from(created_ms).unwrap(), server.app.services.clock.now_ms());
        for filter in [json!({ "name_filter": "nope" }), json!({ "id_filter": "999999" })] {
            assert_eq!(
                build.call("ListArtifacts", filter).await,
                (200, json!({ "artifacts": [] }))
            );
        }

        let (status, reply) = test.call("DeleteArtifact", json!({ "name": "first" })).await;
        assert_eq!((status, reply), (200, json!({ "ok": true, "artifact_id": ids[0] })));
        for method in ["DeleteArtifact", "GetSignedArtifactURL"] {
            let (status, reply) = test.call(method, json!({ "name": "first" })).await;
            assert_eq!((status, &reply["code"]), (404, &json!("not_found")));
        }
        assert_eq!(build.names().await, ["third", "second"]);
        let again: i64 = build.upload("first", b"again").await.parse().unwrap();
        assert!(again > numbers[2]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_later_attempt_sees_what_was_not_run_again() {
    on_both(async |server| {
        let job = |name: &str, attempt| {
            let request = MintRequest {
                repository: "octo/demo".to_owned(),
                repository_id: None,
                run_id: "1".to_owned(),
                job_id: name.to_owned(),
                attempt,
                git_ref: "refs/heads/main".to_owned(),
                default_ref: "refs/heads/main".to_owned(),
                event: None,
                ttl: HOUR,
            };
            let services = &server.app.services;
            Job {
                token: services.papers.mint(&request, services.clock.now_ms()).unwrap(),
                ..server.job_of("octo/demo", "1", name)
            }
        };
        let (build, test) = (job("build", 1), job("test", 1));
        build.upload("image", b"1").await;
        build.upload("log", b"1").await;
        test.upload("report", b"1").await;
        let (rebuild, reader) = (job("build", 2), job("use", 2));
        // Who is run again begins anew; the others see what there is until it makes something.
        assert_eq!(rebuild.names().await, ["report"]);
        assert_eq!(reader.names().await, ["report", "log", "image"]);
        assert_eq!(reader.download("image").await, b"1");
        // A name of an earlier attempt is free in a later one, which then sees its own.
        rebuild.upload("image", b"2").await;
        for later in [&rebuild, &reader, &job("use", 3)] {
            assert_eq!(later.names().await, ["image", "report"]);
            assert_eq!(later.download("image").await, b"2");
            assert_eq!(later.download("report").await, b"1");
            let (status, _) = later.call("GetSignedArtifactURL", json!({ "name": "log" })).await;
            assert_eq!(status, 404);
        }
        // Another job may take it as well.
        let other = job("other", 3);
        other.upload("image", b"3").await;
        assert_eq!(job("use", 3).download("image").await, b"3");
        // Nothing was overwritten, and what comes later is not seen.
        for earlier in [&build, &test] {
            assert_eq!(earlier.names().await, ["report", "log", "image"]);
            assert_eq!(earlier.download("image").await, b"1");
        }
        assert_eq!(reader.download("image").await, b"2");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn artifacts_end_when_their_time_is_up() {
    on_both_with(
        |config| config.artifacts.max_retention = 100 * DAY,
        async |server| {
            let now_ms = server.app.services.clock.now_ms();
            let timestamp = |span: Duration| {
                let at = Duration::from_millis(u64::try_from(now_ms).unwrap()) + span;
                humantime::format_rfc3339_millis(std::time::UNIX_EPOCH + at).to_string()
            };
            let job = server.job();
            let mut links = Vec::new();
            for (name, expires_at, lives) in [
                ("honoured", Some(timestamp(HOUR)), HOUR),
                ("defaulted", None, 90 * DAY),
                ("capped", Some(timestamp(1000 * DAY)), 100 * DAY),
            ] {
                let fields = json!({ "name": name, "version": 7, "expires_at": expires_at });
                let (status, reply) = job.call("CreateArtifact", fields).await;
                assert_eq!(status, 200, "{reply}");
                let link = reply["signed_upload_url"].as_str().unwrap();
                assert_eq!(job.put(link, name.as_bytes().to_vec()).await.0, 201);
                assert_eq!(finalize(&job, name, name.len()).await.0, 200);
                links.push((name, lives, lasting_link(server, Permission::Read, blob_of(link))));
            }
            let (status, reply) = job
                .call(
                    "CreateArtifact",
                    json!({ "name": "past", "expires_at": timestamp(Duration::ZERO) }),
                )
                .await;
            assert_eq!((status, &reply["code"]), (400, &json!("invalid_argument")));

            let mut gone_after = Duration::ZERO;
            for (i, (name, lives, link)) in links.iter().enumerate() {
                server.advance(*lives - gone_after - Duration::from_millis(1));
                let job = server.job();
                assert_eq!(job.download(name).await, name.as_bytes());
                assert!(job.names().await.iter().any(|listed| listed == name));
                server.advance(Duration::from_millis(1));
                gone_after = *lives;
                assert_eq!(refusal(&get(server, link, &[]).await), (404, Some("BlobNotFound")));
                assert!(!job.names().await.iter().any(|listed| listed == name));
                for method in ["GetSignedArtifactURL", "DeleteArtifact"] {
                    assert_eq!(job.call(method, json!({ "name": name })).await.0, 404, "{method}");
                }
                clean(server).await;
                assert_eq!(objects(server).await.len(), links.len() - i, "the grace is not over");
                server.advance(server.config.cleaner.delete_grace);
                gone_after += server.config.cleaner.delete_grace;
                clean(server).await;
                assert_eq!(objects(server).await.len(), links.len() - i - 1);
            }
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_name_is_free_before_the_cleaner_comes() {
    on_both(async |server| {
        server.job().upload("a", b"old").await;
        server.advance(server.config.artifacts.default_retention);
        let job = server.job();
        assert_eq!(finalize(&job, "a", 3).await.0, 404);
        job.upload("a", b"new").await;
        assert_eq!(job.download("a").await, b"new");
        clean_to_the_end(server).await;
        assert_eq!(objects(server).await.len(), 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_spellings_are_read() {
    on_both(async |server| {
        let job = server.job();
        let call = async |method: &str, message: Value| {
            let url = format!(
                "{}/twirp/github.actions.results.api.v1.ArtifactService/{method}",
                server.url
            );
            let request = server.http.post(url).bearer_auth(&job.token);
            let request = request.header("content-type", "Application/JSON; charset=\"UTF-8\"");
            let reply = request.body(message.to_string()).send().await.unwrap();
            assert_eq!(header(&reply, "content-encoding"), None);
            let status = reply.status().as_u16();
            (
                status,
                serde_json::from_slice::<Value>(&reply.bytes().await.unwrap()).unwrap(),
            )
        };
        let ids = json!({ "workflowRunBackendId": "1", "workflowJobRunBackendId": "build" });
        let with = |fields: Value| {
            let mut message = ids.clone();
            message
                .as_object_mut()
                .unwrap()
                .extend(fields.as_object().unwrap().clone());
            message
        };
        let (status, reply) = call(
            "CreateArtifact",
            with(
                json!({ "name": "a", "version": "7", "mimeType": "text/plain", "expiresAt": "2999-01-02T03:04:05Z",
                "unknown": { "deep": [1, 2] }, "workflow_run": null }),
            ),
        )
        .await;
        assert_eq!(status, 200, "{reply}");
        let link = reply["signed_upload_url"].as_str().unwrap();
        assert_eq!(job.put(link, b"abc".to_vec()).await.0, 201);
        let (status, reply) = call(
            "FinalizeArtifact",
            with(json!({ "name": "a", "size": 3, "hash": null })),
        )
        .await;
        assert_eq!(status, 200, "{reply}");
        let id: i64 = reply["artifact_id"].as_str().unwrap().parse().unwrap();
        for filter in [
            json!({ "idFilter": id }),
            json!({ "idFilter": id.to_string() }),
            json!({ "id_filter": id, "nameFilter": "a" }),
            json!({ "idFilter": null, "nameFilter": null }),
        ] {
            let (status, reply) = call("ListArtifacts", with(filter)).await;
            assert_eq!((status, &reply["artifacts"][0]["name"]), (200, &json!("a")), "{reply}");
        }
        let reply = get(server, &job.link("a").await, &[]).await;
        assert_eq!(header(&reply, "content-type"), Some("text/plain"));
        // Both at once say the same thing twice.
        let (status, reply) = call("ListArtifacts", with(json!({ "workflow_run_backend_id": "2" }))).await;
        assert!((400..=403).contains(&status), "{status} {reply}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_says_so() {
    on_both(async |server| {
        let job = server.job();
        for method in ["MigrateArtifact", "FinalizeMigratedArtifact"] {
            let (status, reply) = job.call(method, json!({ "name": "a" })).await;
            assert_eq!((status, &reply["code"]), (501, &json!("unimplemented")));
        }
        for method in ["Nope", "createartifact", "CreateArtifact/", "../CacheService/X"] {
            let (status, reply) = job.call(method, json!({})).await;
            assert_eq!((status, &reply["code"]), (404, &json!("bad_route")), "{method}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn repositories_and_issuers_never_meet() {
    on_both_with(
        |config| {
            for name in ["forge", "other"] {
                issuer::add(config, name, None);
            }
        },
        async |server| {
            let now_ms = server.app.services.clock.now_ms();
            let of_issuer = |name: &str, repository: &str| {
                let claims = issuer::claims(name, repository, "1", "build", now_ms).to_string();
                Job {
                    token: issuer::sign(issuer::secret(name).as_bytes(), issuer::HEADER, &claims),
                    ..server.job()
                }
            };
            let jobs = [
                server.job(),
                server.job_of("octo/two", "1", "build"),
                server.job_of("octo/demo", "2", "build"),
                of_issuer("forge", "octo/demo"),
                of_issuer("forge", "octo/two"),
                of_issuer("other", "octo/demo"),
            ];
            let content = |i: usize| format!("content {i}").into_bytes();
            for (i, job) in jobs.iter().enumerate() {
                assert_eq!(job.names().await, [""; 0]);
                job.upload("same", &content(i)).await;
            }
            for (i, job) in jobs.iter().enumerate() {
                assert_eq!(job.names().await, ["same"]);
                assert_eq!(job.download("same").await, content(i));
            }
            // The case of a repository's name does not count.
            let shouting = server.job_of("Octo/Demo", "1", "test");
            assert_eq!(shouting.download("same").await, content(0));
            for (i, job) in jobs.iter().enumerate() {
                assert_eq!(job.call("DeleteArtifact", json!({ "name": "same" })).await.0, 200);
                for (j, other) in jobs.iter().enumerate() {
                    assert_eq!(other.names().await.len(), usize::from(j > i), "{i} {j}");
                }
            }
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_list_alone_orders_the_blocks() {
    on_both(async |server| {
        let job = server.job();
        let link = job.create("a").await;
        for (id, content) in [
            ("Qw==", &b"ccc"[..]),
            ("QQ==", b"a, first try"),
            ("RA==", b"never listed"),
            ("Qg==", b"bb"),
            ("QQ==", b"a"),
        ] {
            stage(&job, &link, id, content).await;
        }
        let (status, code) = commit(&job, &link, &["QQ==", "RQ=="]).await;
        assert_eq!((status, code.as_deref()), (400, Some("InvalidBlockList")));
        assert_eq!(commit(&job, &link, &["QQ==", "Qg==", "Qw==", "QQ=="]).await.0, 201);
        assert_eq!(finalize(&job, "a", 7).await.0, 200);
        assert_eq!(job.download("a").await, b"abbccca");
        clean(server).await;
        let mut sizes: Vec<u64> = objects(server).await.iter().map(|object| object.size_bytes).collect();
        sizes.sort_unstable();
        assert_eq!(sizes, [1, 2, 3]);
        assert_eq!(job.download("a").await, b"abbccca");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_block_sent_again_waits_for_the_next_list() {
    on_both(async |server| {
        let job = server.job();
        for (name, listed_again, content) in [("kept", false, "one"), ("replaced", true, "two, longer")] {
            let link = job.create(name).await;
            stage(&job, &link, "QQ==", b"one").await;
            assert_eq!(commit(&job, &link, &["QQ=="]).await.0, 201);
            stage(&job, &link, "QQ==", b"two, longer").await;
            clean(server).await;
            if listed_again {
                assert_eq!(commit(&job, &link, &["QQ=="]).await.0, 201);
            }
            assert_eq!(finalize(&job, name, content.len()).await.0, 200);
            assert_eq!(job.download(name).await, content.as_bytes());
            clean(server).await;
            assert_eq!(job.download(name).await, content.as_bytes());
        }
        assert_eq!(objects(server).await.len(), 2);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn put_blob_and_lists_replace_each_other() {
    on_both(async |server| {
        let job = server.job();
        let link = job.create("a").await;
        assert_eq!(job.put(&link, b"first".to_vec()).await.0, 201);
        stage(&job, &link, "QQ==", b"second").await;
        assert_eq!(commit(&job, &link, &["QQ=="]).await.0, 201);
        assert_eq!(job.put(&link, b"the third".to_vec()).await.0, 201);
        assert_eq!(commit(&job, &link, &["QQ=="]).await.0, 400);
        assert_eq!(finalize(&job, "a", 9).await.0, 200);
        assert_eq!(job.download("a").await, b"the third");
        clean(server).await;
        assert_eq!(objects(server).await.len(), 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn five_thousand_blocks() {
    on_both(async |server| {
        let job = server.job();
        let link = job.create("many").await;
        let block = |i: usize| format!("{i:07}");
        let id = |i: usize| format!("{i:08}");
        // 1,999 and 5,000 have no factor in common, so that this is every block once and in no order.
        let puts = stream::iter((0..5000).map(|i| i * 1999 % 5000)).map(|i| {
            let (job, link) = (&job, &link);
            async move { stage(job, link, &id(i), block(i).as_bytes()).await }
        });
        puts.buffer_unordered(32).collect::<Vec<()>>().await;
        let ids: Vec<String> = (0..5000).map(id).collect();
        let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
        assert_eq!(commit(&job, &link, &ids).await.0, 201);
        assert_eq!(finalize(&job, "many", 35_000).await.0, 200);
        let content: String = (0..5000).map(block).collect();
        assert!(job.download("many").await == content.as_bytes());
        let reply = get(server, &job.link("many").await, &[("range", "bytes=17000-17099")]).await;
        assert_eq!(reply.text().await.unwrap(), content[17_000..17_100]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_at_all_is_an_artifact_too() {
    on_both(async |server| {
        let job = server.job();
        for (name, whole) in [("by list", false), ("at once", true)] {
            let link = job.create(name).await;
            let url = if whole { link } else { format!("{link}&comp=blocklist") };
            // A body of no bytes, whose length reqwest would leave out; the SDKs send it.
            let body = if whole { Vec::new() } else { block_list(&[]) };
            let put = raw::request("PUT", url.strip_prefix(&server.url).unwrap(), &[], &body);
            let status = raw::exchange(&server.url, &put).await.status;
            assert_eq!(status, 201);
            // Protobuf leaves a size of 0 out.
            let fields = json!({ "name": name, "hash": sha256(b"").to_string() });
            assert_eq!(job.call("FinalizeArtifact", fields).await.0, 200);
            assert_eq!(job.download(name).await, b"");
            let link = job.link(name).await;
            let reply = get(server, &link, &[("range", "bytes=0-")]).await;
            assert_eq!(refusal(&reply), (416, Some("InvalidRange")));
            assert_eq!(header(&reply, "content-range"), Some("bytes */0"));
            let reply = request(server, Method::HEAD, &link, &[]).await;
            assert_eq!(
                (reply.status().as_u16(), header(&reply, "content-length")),
                (200, Some("0"))
            );
        }
        assert_eq!(objects(server).await, []);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ranges_are_slices() {
    on_both(async |server| {
        let job = server.job();
        let sizes = [1, 70_000, 3, 300_000, 262_144];
        let content = bytes(sizes.iter().sum());
        let link = job.create("a").await;
        let (mut start, mut borders) = (0, Vec::new());
        for (i, size) in sizes.iter().enumerate() {
            stage(&job, &link, &format!("{i:04}"), &content[start..start + size]).await;
            borders.push(start);
            start += size;
        }
        borders.push(content.len());
        assert_eq!(
            commit(&job, &link, &["0000", "0001", "0002", "0003", "0004"]).await.0,
            201
        );
        assert_eq!(finalize(&job, "a", content.len()).await.0, 200);
        let link = job.link("a").await;

        let edges: Vec<usize> = borders
            .iter()
            .flat_map(|border| [border.saturating_sub(1), *border, border + 1])
            .filter(|edge| *edge < content.len())
            .collect();
        for &from in &edges {
            for &to in edges.iter().filter(|to| **to >= from) {
                let reply = get(server, &link, &[("range", &format!("bytes={from}-{to}"))]).await;
                let expected = format!("bytes {from}-{to}/{}", content.len());
                assert_eq!(reply.status(), 206);
                assert_eq!(header(&reply, "content-range"), Some(&expected[..]));
                assert!(reply.bytes().await.unwrap() == content[from..=to], "{expected}");
            }
        }
        let suffix = get(server, &link, &[("range", "bytes=-262150")]).await;
        assert!(suffix.bytes().await.unwrap() == content[content.len() - 262_150..]);

        let both = [("x-ms-range", "bytes=0-4"), ("range", "bytes=7-8")];
        assert!(get(server, &link, &both).await.bytes().await.unwrap() == content[0..5]);
        for (headers, status, length) in [(&both[..], 206, "5"), (&[], 200, "632148")] {
            let reply = request(server, Method::HEAD, &link, headers).await;
            assert_eq!(
                (reply.status().as_u16(), header(&reply, "content-length")),
                (status, Some(length))
            );
        }
        let etag = header(&get(server, &link, &[]).await, "etag").unwrap().to_owned();
        for (headers, status) in [
            ([("if-match", "\"other\""), ("range", "bytes=0-4")], 412),
            ([("if-match", etag.as_str()), ("range", "bytes=0-4")], 206),
            ([("if-none-match", &etag), ("range", "bytes=0-4")], 304),
            ([("if-range", "\"other\""), ("range", "bytes=0-4")], 200),
            ([("if-range", &etag), ("range", "bytes=0-4")], 206),
        ] {
            assert_eq!(get(server, &link, &headers).await.status(), status, "{headers:?}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn downloads_are_files_to_be_saved() {
    on_both(async |server| {
        let job = server.job();
        for (name, mime_type, stored, served, disposition) in [
            (
                "größe \"x\"".replace('"', "'"),
                None,
                Some("zip"),
                "application/zip",
                "attachment; filename=\"gr__e 'x'.zip\"; filename*=UTF-8''gr%C3%B6%C3%9Fe%20%27x%27.zip",
            ),
            (
                "7".to_owned(),
                Some("application/zip"),
                Some("application/zip"),
                "application/zip",
                "attachment; filename=\"7.zip\"; filename*=UTF-8''7.zip",
            ),
            (
                "report 100%.html".to_owned(),
                Some("text/html"),
                Some("text/html"),
                "text/html",
                "attachment; filename=\"report 100_.html\"; filename*=UTF-8''report%20100%25.html",
            ),
            (
                "named by create".to_owned(),
                Some("text/plain"),
                None,
                "text/plain",
                "attachment; filename=\"named by create\"; filename*=UTF-8''named%20by%20create",
            ),
            (
                "unknown".to_owned(),
                None,
                None,
                "application/octet-stream",
                "attachment; filename=\"unknown\"; filename*=UTF-8''unknown",
            ),
        ] {
            let fields = json!({ "name": name, "version": 4, "mime_type": mime_type });
            let (_, reply) = job.call("CreateArtifact", fields).await;
            let link = reply["signed_upload_url"].as_str().unwrap();
            stage(&job, link, "QQ==", b"<html>").await;
            let put = server
                .http
                .put(format!("{link}&comp=blocklist"))
                .body(block_list(&["QQ=="]));
            let put = stored
                .into_iter()
                .fold(put, |put, stored| put.header("x-ms-blob-content-type", stored));
            assert_eq!(put.send().await.unwrap().status(), 201);
            assert_eq!(finalize(&job, &name, 6).await.0, 200);

            let link = job.link(&name).await;
            let path = link.split('?').next().unwrap();
            assert!(!path.ends_with(".zip") && path.split('/').count() >= 6, "{path}");
            let asked = [("accept-encoding", "gzip, br")];
            for method in [Method::GET, Method::HEAD] {
                let reply = request(server, method, &link, &asked).await;
                assert_eq!(reply.status(), 200);
                for (name, value) in [
                    ("content-type", served),
                    ("content-disposition", disposition),
                    ("content-length", "6"),
                    ("x-content-type-options", "nosniff"),
                    ("content-security-policy", "sandbox; default-src 'none'"),
                    ("cache-control", "private, no-store"),
                    ("referrer-policy", "no-referrer"),
                    ("accept-ranges", "bytes"),
                    ("x-ms-blob-type", "BlockBlob"),
                ] {
                    assert_eq!(header(&reply, name), Some(value), "{name}");
                }
                for name in ["etag", "last-modified", "x-ms-request-id", "x-ms-version", "date"] {
                    assert!(header(&reply, name).is_some(), "{name}");
                }
                assert_eq!(header(&reply, "content-encoding"), None);
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_hash_is_found_before_finalize_answers() {
    on_both(async |server| {
        let job = server.job();
        let link = job.create("a").await;
        assert_eq!(job.put(&link, b"wrong".to_vec()).await.0, 201);
        let fields = json!({ "name": "a", "size": "5", "hash": sha256(b"right").to_string() });
        let (status, reply) = job.call("FinalizeArtifact", fields.clone()).await;
        assert_eq!((status, &reply["code"]), (400, &json!("invalid_argument")));
        assert_eq!(job.names().await, [""; 0]);
        for hash in ["sha256:", "sha1:00", "00", &"0".repeat(64)] {
            let fields = json!({ "name": "a", "size": "5", "hash": hash });
            assert_eq!(job.call("FinalizeArtifact", fields).await.0, 400, "{hash}");
        }
        // The upload is open still.
        assert_eq!(job.put(&link, b"right".to_vec()).await.0, 201);
        assert_eq!(job.call("FinalizeArtifact", fields).await.0, 200);
        assert_eq!(job.download("a").await, b"right");
    })
    .await;
}

/// Three blocks of this size each.
const PART: usize = 100 * 1024;

/// Finalizes an artifact that nobody has verified, or will for an hour: the server's own verifier is kept away by the
/// claim of another replica, and is not woken because it is that replica that finalizes. Returns a read link.
async fn unverified(replica: &Services, job: &Job<'_>, name: &str, content: &[u8], hash: Sha256) -> String {
    loop {
        let link = job.create(name).await;
        for (i, part) in content.chunks(PART).enumerate() {
            stage(job, &link, &format!("{i:04}"), part).await;
        }
        assert_eq!(commit(job, &link, &["0000", "0001", "0002"]).await.0, 201);
        let now_ms = replica.clock.now_ms();
        let principal = replica.papers.verify_token(&job.token, now_ms).unwrap();
        let size = content.len() as u64;
        replica
            .finalize_artifact(&principal, name, size, Some(hash))
            .await
            .unwrap();
        let until_ms = now_ms + i64::try_from(HOUR.as_millis()).unwrap();
        if let Some(claim) = replica.db.claim_verification(now_ms, until_ms).await.unwrap() {
            assert_eq!((claim.blob, claim.expected), (blob_of(&link), Some(hash)));
            return lasting_link(job.server, Permission::Read, claim.blob);
        }
        // The server looked for work in just this moment.
        job.call("DeleteArtifact", json!({ "name": name })).await;
    }
}

fn in_the_background(config: &mut Config) {
    config.verification.inline_max_bytes = 0;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_is_held_back_until_the_hash_is_known() {
    on_both_with(in_the_background, async |server| {
        let (job, replica) = (server.job(), second_replica(server).await);
        let content = bytes(3 * PART);
        let link = unverified(&replica, &job, "good", &content, sha256(&content)).await;
        assert_eq!(job.names().await, ["good"]);
        let begin = format!("bytes=0-{}", 2 * PART - 1);
        let reply = get(server, &link, &[("range", &begin)]).await;
        assert_eq!(reply.status(), 206);
        assert!(reply.bytes().await.unwrap() == content[..2 * PART]);
        for end in [
            format!("bytes={}-{}", PART, 2 * PART),
            "bytes=-1".to_owned(),
            "bytes=1-".to_owned(),
        ] {
            let reply = get(server, &link, &[("range", &end)]).await;
            assert_eq!(refusal(&reply), (503, Some("ServerBusy")), "{end}");
            assert!(header(&reply, "retry-after").is_some());
        }
        assert_eq!(replica.db.pending_verifications().await.unwrap(), 1);
        // A whole download finds out by itself.
        assert!(job.download("good").await == content);
        assert_eq!(replica.db.pending_verifications().await.unwrap(), 0);
        let reply = get(server, &link, &[("range", "bytes=-1")]).await;
        assert_eq!(reply.status(), 206);
        assert_eq!(reply.bytes().await.unwrap(), content[3 * PART - 1..]);
        assert!(!replica.verify_next().await.unwrap());
        replica.db.close().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_content_never_leaves_whole() {
    on_both_with(in_the_background, async |server| {
        let (job, replica) = (server.job(), second_replica(server).await);
        let content = bytes(3 * PART);
        let link = unverified(&replica, &job, "bad", &content, sha256(b"other")).await;
        let mut reply = get(server, &link, &[]).await;
        assert_eq!(header(&reply, "content-length"), Some(&(3 * PART).to_string()[..]));
        let mut received = 0;
        let cut = loop {
            match reply.chunk().await {
                Ok(Some(chunk)) => received += chunk.len(),
                Ok(None) => break false,
                Err(_) => break true,
            }
        };
        assert!(cut && received < 3 * PART, "{cut} {received}");
        assert_eq!(job.names().await, [""; 0]);
        assert_eq!(refusal(&get(server, &link, &[]).await), (404, Some("BlobNotFound")));
        job.upload("bad", b"better").await;
        assert_eq!(job.download("bad").await, b"better");
        replica.db.close().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_verifier_finds_wrong_content() {
    on_both_with(in_the_background, async |server| {
        let (job, replica) = (server.job(), second_replica(server).await);
        let content = bytes(3 * PART);
        unverified(&replica, &job, "good", &content, sha256(&content)).await;
        let link = unverified(&replica, &job, "bad", &content, sha256(b"other")).await;
        assert_eq!(job.names().await, ["bad", "good"]);
        assert!(!replica.verify_next().await.unwrap(), "both are claimed");
        // The claims run out, and whoever is first verifies.
        server.advance(HOUR);
        while replica.db.pending_verifications().await.unwrap() > 0 {
            replica.verify_next().await.unwrap();
        }
        assert_eq!(job.names().await, ["good"]);
        assert_eq!(refusal(&get(server, &link, &[]).await), (404, Some("BlobNotFound")));
        assert!(job.download("good").await == content);
        job.create("bad").await;
        replica.db.close().await;
    })
    .await;
}

/// Every file below `directory` that holds an object.
fn object_files(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(object_files(&path));
        } else {
            // On a disk the blob's id and a dot come first.
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let id = name.split_once('.').map_or(name.as_str(), |(_, id)| id);
            if uuid::Uuid::parse_str(id).is_ok() {
                files.push(path);
            }
        }
    }
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_byte_is_never_served_whole() {
    on_both(async |server| {
        let job = server.job();
        let directory = match &server.s3 {
            Some(s3) => s3.bucket_directory(),
            None => Some(server.config.data_dir.clone()),
        };
        let Some(directory) = directory else {
            let _ = writeln!(
                std::io::stderr(),
                "SKIPPED a_flipped_byte_is_never_served_whole: no way to the store's files"
            );
            return;
        };
        let content = bytes(2 * PART);
        for (damaged, name) in ["in the first block", "in the last block"].into_iter().enumerate() {
            let link = job.create(name).await;
            stage(&job, &link, "QQ==", &content[..PART]).await;
            stage(&job, &link, "Qg==", &content[PART..]).await;
            assert_eq!(commit(&job, &link, &["QQ==", "Qg=="]).await.0, 201);
            assert_eq!(finalize(&job, name, content.len()).await.0, 200);
            assert!(job.download(name).await == content);

            let part = &content[damaged * PART..][..PART];
            let is_it = |file: &PathBuf| {
                let of_blob = file.to_string_lossy().contains(&blob_of(&link).to_string());
                of_blob && std::fs::read(file).unwrap() == part
            };
            let file = object_files(&directory).into_iter().find(is_it).unwrap();
            let mut flipped = part.to_vec();
            flipped[PART / 2] ^= 1;
            std::fs::write(&file, flipped).unwrap();

            // The connection may be cut before the reply's head is on its way.
            let received = async {
                let reply = server.http.get(job.link(name).await).send().await?;
                reply.error_for_status()?.bytes().await
            };
            assert!(received.await.is_err(), "{name}");
            // The other block is whole.
            let other = if damaged == 0 { PART..2 * PART } else { 0..PART };
            let range = format!("bytes={}-{}", other.start, other.end - 1);
            let reply = get(server, &job.link(name).await, &[("range", &range)]).await;
            assert!(reply.bytes().await.unwrap() == content[other], "{name}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_none_can_have_is_not_there() {
    on_both(async |server| {
        let job = server.job();
        job.upload("a", b"a").await;
        for method in ["GetSignedArtifactURL", "DeleteArtifact"] {
            let (status, body) = job.call(method, json!({ "name": "a\0" })).await;
            assert_eq!((status, &body["code"]), (404, &json!("not_found")), "{method}");
        }
        let (status, body) = job
            .call("FinalizeArtifact", json!({ "name": "a\0", "size": "1" }))
            .await;
        assert_eq!((status, &body["code"]), (404, &json!("not_found")));
        let (status, body) = job.call("ListArtifacts", json!({ "name_filter": "a\0" })).await;
        assert_eq!((status, &body["artifacts"]), (200, &json!([])));
    })
    .await;
}

/// On a disk, what can't be deleted is a directory.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_deleted_keeps_nothing_else_waiting() {
    let server = TestServer::start(Backend::SqliteDisk).await;
    let job = server.job();
    let objects_of = async |name: &str| {
        let directory = server.config.data_dir.join("objects/blobs");
        let blob = blob_of(&job.link(name).await).to_string();
        let mut files = object_files(&directory);
        files.retain(|file| file.file_name().unwrap().to_str().unwrap().starts_with(&blob));
        files
    };
    // Of a deleted artifact, and one that was replaced before its list.
    job.upload("stuck", b"stuck").await;
    let mut stuck = objects_of("stuck").await;
    job.call("DeleteArtifact", json!({ "name": "stuck" })).await;
    let link = job.create("a").await;
    stage(&job, &link, "QQ==", b"replaced").await;
    let known = object_files(&server.config.data_dir.join("objects/blobs"));
    stage(&job, &link, "QQ==", b"kept").await;
    let replaced: Vec<_> = known.into_iter().filter(|file| !stuck.contains(file)).collect();
    assert_eq!((stuck.len(), replaced.len()), (1, 1));
    stuck.extend(replaced);
    for file in &stuck {
        std::fs::remove_file(file).unwrap();
        std::fs::create_dir(file).unwrap();
    }
    job.upload("gone", b"gone").await;
    let gone = objects_of("gone").await;
    job.call("DeleteArtifact", json!({ "name": "gone" })).await;
    server.advance(server.config.cleaner.delete_grace);
    clean(&server).await;
    assert!(gone.iter().all(|file| !file.exists()), "{gone:?}");
    assert!(stuck.iter().all(|file| file.exists()), "{stuck:?}");
    // Tried again once they can be deleted, and not before their time.
    for file in &stuck {
        std::fs::remove_dir(file).unwrap();
        std::fs::write(file, "").unwrap();
    }
    clean(&server).await;
    assert!(stuck.iter().all(|file| file.exists()), "{stuck:?}");
    server.advance(server.config.cleaner.interval);
    clean(&server).await;
    assert!(stuck.iter().all(|file| !file.exists()), "{stuck:?}");
    server.stop().await;
}

#[tokio::test]
async fn what_cannot_be_forgotten_keeps_nothing_else_waiting() {
    let server = TestServer::start(Backend::SqliteDisk).await;
    let raw = Raw::connect("", &server.config.data_dir).await;
    let job = server.job();
    job.upload("stuck", b"stuck").await;
    let stuck = blob_of(&job.link("stuck").await);
    job.upload("gone", b"gone").await;
    for name in ["stuck", "gone"] {
        job.call("DeleteArtifact", json!({ "name": name })).await;
    }
    // No request leaves such a row; a database that was edited may have one.
    let id = raw.literal(stuck.0.as_bytes());
    raw.execute(&format!(
        "INSERT INTO artifacts (issuer, repository, run_backend_id, name, run_attempt, job_backend_id, version, state,
             blob_id, created_at_ms, expires_at_ms)
         VALUES ('i', 'r', '1', 'n', 1, 'j', 7, 'pending', {id}, 0, 0)"
    ))
    .await;
    server.advance(server.config.cleaner.delete_grace);
    clean(&server).await;
    assert_eq!(raw.number("SELECT count(*) FROM blobs").await, 2);
    server.advance(server.config.cleaner.sweep_after);
    clean(&server).await;
    let left = format!("SELECT count(*) FROM blobs WHERE id = {id}");
    assert_eq!(raw.number("SELECT count(*) FROM blobs").await, 1);
    assert_eq!(raw.number(&left).await, 1);
    raw.execute("DELETE FROM artifacts").await;
    clean(&server).await;
    assert_eq!(raw.number("SELECT count(*) FROM blobs").await, 0);
    server.stop().await;
}

/// One of each thing that the cleaner takes away. Returns a write link to the abandoned upload.
async fn make_a_mess(server: &TestServer) -> String {
    let job = server.job();
    let abandoned = job.create("abandoned").await;
    stage(&job, &abandoned, "QQ==", b"abandoned").await;
    let link = job.create("a").await;
    for (id, content) in [("QQ==", "replaced"), ("QQ==", "kept"), ("Qg==", "unlisted")] {
        stage(&job, &link, id, content.as_bytes()).await;
    }
    assert_eq!(commit(&job, &link, &["QQ=="]).await.0, 201);
    assert_eq!(finalize(&job, "a", 4).await.0, 200);
    job.upload("deleted", b"deleted").await;
    let deleted = blob_of(&job.link("deleted").await);
    assert_eq!(job.call("DeleteArtifact", json!({ "name": "deleted" })).await.0, 200);
    // What a crash leaves: objects that no row names, below a sealed and a dead blob.
    for blob in [blob_of(&link), deleted] {
        let stray = stream::iter([Ok("stray".into())]);
        let store = &server.app.services.store;
        store.put(&ObjectKey::fresh(blob), 5, stray).await.unwrap();
    }
    abandoned
}

async fn assert_only_the_artifact_is_left(server: &TestServer) {
    assert_eq!(server.job().names().await, ["a"]);
    assert_eq!(server.job().download("a").await, b"kept");
    assert_eq!(objects(server).await.len(), 1);
    let counts = server.app.services.db.blob_counts().await.unwrap();
    assert_eq!(counts, [("sealed".to_owned(), 1)]);
}

async fn assert_nothing_is_left_in_the_end(server: &TestServer) {
    let (status, _) = server.job().call("DeleteArtifact", json!({ "name": "a" })).await;
    assert_eq!(status, 200);
    clean_to_the_end(server).await;
    assert_eq!(objects(server).await, []);
    let services = &server.app.services;
    assert_eq!(services.db.blob_counts().await.unwrap(), []);
    assert_eq!(services.db.garbage(i64::MAX, 10).await.unwrap(), []);
    if server.s3.is_none() {
        let blobs = std::fs::read_dir(server.config.data_dir.join("objects/blobs")).unwrap();
        assert_eq!(blobs.count(), 0, "empty directories stay");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cleaner_takes_what_nobody_needs() {
    on_both(async |server| {
        let abandoned = make_a_mess(server).await;
        assert_eq!(objects(server).await.len(), 7);
        // Replaced and unlisted blocks go at once.
        clean(server).await;
        assert_eq!(objects(server).await.len(), 5);
        // The deleted artifact's bytes go after the grace.
        server.advance(server.config.cleaner.delete_grace);
        clean(server).await;
        assert_eq!(objects(server).await.len(), 4);
        // Leftovers go when nothing can be under way any more.
        server.advance(server.config.cleaner.sweep_after);
        clean(server).await;
        assert_eq!(objects(server).await.len(), 2);
        // The abandoned upload goes in its time.
        server.advance(server.config.uploads.abandoned_after);
        clean(server).await;
        let abandoned = lasting_link(server, Permission::Write, blob_of(&abandoned));
        assert_eq!(server.job().put(&abandoned, b"x".to_vec()).await.0, 404);
        clean_to_the_end(server).await;
        assert_only_the_artifact_is_left(server).await;
        assert_nothing_is_left_in_the_end(server).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cleaner_may_be_cut_anywhere() {
    on_both(async |server| {
        make_a_mess(server).await;
        server.advance(server.config.uploads.abandoned_after);
        clean(server).await;
        server.advance(server.config.cleaner.sweep_after + server.config.cleaner.delete_grace);
        let mut cuts = 0;
        loop {
            let turns = async {
                for _ in 0..cuts * cuts {
                    tokio::task::yield_now().await;
                }
            };
            let outcome = tokio::select! {
                biased;
                outcome = server.app.services.clean() => Some(outcome.unwrap()),
                () = turns => None,
            };
            // Only a pass that ran to its end gives the lease back.
            server.advance(server.config.cleaner.lease);
            if outcome.is_some() {
                break;
            }
            cuts += 1;
        }
        println!("{cuts} cuts");
        assert!(cuts > 0);
        assert_only_the_artifact_is_left(server).await;
        assert_nothing_is_left_in_the_end(server).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_replica_cleans_at_a_time() {
    on_both(async |server| {
        make_a_mess(server).await;
        let (services, replica) = (&server.app.services, second_replica(server).await);
        let now_ms = services.clock.now_ms();
        let until_ms = now_ms + i64::try_from(server.config.cleaner.lease.as_millis()).unwrap();
        let other = uuid::Uuid::new_v4();
        assert!(replica.db.take_lease("cleaner", other, now_ms, until_ms).await.unwrap());
        assert_eq!(services.clean().await.unwrap(), None);
        assert_eq!(replica.clean().await.unwrap(), None);
        assert_eq!(objects(server).await.len(), 7);
        replica.db.release_lease("cleaner", other).await.unwrap();
        assert!(services.clean().await.unwrap().is_some());
        assert_eq!(objects(server).await.len(), 5);
        // One that died keeps it for its time only.
        assert!(replica.db.take_lease("cleaner", other, now_ms, until_ms).await.unwrap());
        assert_eq!(services.clean().await.unwrap(), None);
        server.advance(server.config.cleaner.lease);
        assert!(services.clean().await.unwrap().is_some());
        assert!(replica.clean().await.unwrap().is_some());
        replica.db.close().await;
    })
    .await;
}
