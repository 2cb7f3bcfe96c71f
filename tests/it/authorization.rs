//! Who may do what, as one table: every kind of caller on every route, on both backends.
//!
//! Each route of the URL map has at least one sample here, or the test fails. A sample says what the run's own job gets,
//! what another run of the repository gets, and what a stranger gets whose repository or issuer is another one and whose
//! ids are the same. Whoever has no good papers gets the same refusal everywhere.

use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::FutureExt;
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use wharfinger::api::{self, Caller, Context};
use wharfinger::model::{Access, BlobId, BlobKind, Repositories};
use wharfinger::papers::{MintRequest, Permission};
use wharfinger::service::credentials::NewApiToken;

use super::artifacts_v3::V3;
use super::cache_api::{CacheJob, VERSION};
use super::common::raw::{Reply, exchange, request};
use super::common::{Backend, Job, TestServer, blob_of, issuer};

const DAY: Duration = Duration::from_secs(24 * 3600);

/// Callers whose papers are no good for a runtime-token route, and what they get.
const REFUSED_RUNTIME: [(&str, u16); 11] = [
    ("nobody", 401),
    ("garbage", 401),
    ("basic", 401),
    ("link", 401),
    ("expired", 401),
    ("not yet valid", 401),
    ("forged", 401),
    ("unknown issuer", 401),
    ("closed job", 401),
    ("retired key", 401),
    ("API token", 403),
];

/// The same for routes that take an API token.
const REFUSED_API: [(&str, u16); 9] = [
    ("nobody", 401),
    ("garbage", 401),
    ("basic", 401),
    ("link", 401),
    ("expired API token", 401),
    ("revoked API token", 401),
    ("mistaken API token", 401),
    ("closed job", 401),
    ("own", 403),
];

/// A request of a route. In target and body, `{…}` stands for what the world has.
struct Sample {
    pattern: &'static str,
    method: &'static str,
    target: &'static str,
    body: Value,
    own: u16,
    other_run: u16,
    stranger: u16,
}

const fn sample(
    pattern: &'static str,
    method: &'static str,
    target: &'static str,
    body: Value,
    [own, other_run, stranger]: [u16; 3],
) -> Sample {
    Sample {
        pattern,
        method,
        target,
        body,
        own,
        other_run,
        stranger,
    }
}

fn runtime_samples() -> Vec<Sample> {
    const ARTIFACTS: &str = "/twirp/github.actions.results.api.v1.ArtifactService/";
    const CACHE: &str = "/twirp/github.actions.results.api.v1.CacheService/";
    const V3_LIST: &str = "/_apis/pipelines/workflows/{run_id}/artifacts";
    const V3_CONTAINER: &str = "/_apis/resources/Containers/{id}";
    let twirp = |service: &str, method: &str, mut fields: Value, statuses| {
        if service == ARTIFACTS {
            fields["workflow_run_backend_id"] = json!("1");
            fields["workflow_job_run_backend_id"] = json!("build");
        }
        let path: &'static str = format!("{service}{method}").leak();
        sample(path, "POST", path, fields, statuses)
    };
    // An artifact is its run's; what it is called says nothing to others.
    let artifact = |method, fields, statuses| twirp(ARTIFACTS, method, fields, statuses);
    // A cache entry is its scope's, but a reservation is its run's.
    let cache = |method, mut fields: Value, statuses| {
        fields["version"] = json!(VERSION);
        twirp(CACHE, method, fields, statuses)
    };
    vec![
        artifact(
            "CreateArtifact",
            json!({ "name": "new", "version": 4 }),
            [200, 403, 200],
        ),
        artifact(
            "FinalizeArtifact",
            json!({ "name": "harbour", "size": "5" }),
            [200, 403, 404],
        ),
        artifact("ListArtifacts", json!({}), [200, 403, 200]),
        artifact("GetSignedArtifactURL", json!({ "name": "harbour" }), [200, 403, 404]),
        artifact("DeleteArtifact", json!({ "name": "doomed" }), [200, 403, 404]),
        artifact("MigrateArtifact", json!({ "name": "harbour" }), [501; 3]),
        artifact("FinalizeMigratedArtifact", json!({ "name": "harbour" }), [501; 3]),
        cache("CreateCacheEntry", json!({ "key": "new-{caller}" }), [200; 3]),
        cache(
            "FinalizeCacheEntryUpload",
            json!({ "key": "reserved", "size_bytes": "5" }),
            [200, 404, 404],
        ),
        cache("GetCacheEntryDownloadURL", json!({ "key": "deps" }), [200; 3]),
        sample(
            V3_LIST,
            "GET",
            "/_apis/pipelines/workflows/1/artifacts",
            json!({}),
            [200, 403, 200],
        ),
        sample(
            V3_LIST,
            "POST",
            "/_apis/pipelines/workflows/1/artifacts",
            json!({ "Type": "actions_storage", "Name": "open" }),
            [201, 403, 201],
        ),
        sample(
            V3_CONTAINER,
            "PUT",
            "{container}?itemPath=v3%2Fmore",
            json!("bytes"),
            [201, 403, 403],
        ),
        sample(
            V3_LIST,
            "PATCH",
            "/_apis/pipelines/workflows/1/artifacts?artifactName=v3",
            json!({ "Size": 9 }),
            [200, 403, 404],
        ),
        sample(
            V3_CONTAINER,
            "GET",
            "{container}?itemPath=v3",
            json!({}),
            [200, 403, 403],
        ),
        sample(
            "/_apis/resources/Containers/{id}/file",
            "GET",
            "{container}/file?itemPath=v3%2Ff",
            json!({}),
            [200, 403, 403],
        ),
        sample(
            "/_apis/artifactcache/cache",
            "GET",
            "/_apis/artifactcache/cache?keys=deps&version={version}",
            json!({}),
            [200, 200, 204],
        ),
        sample(
            "/_apis/artifactcache/caches",
            "GET",
            "/_apis/artifactcache/caches?key=deps",
            json!({}),
            [200; 3],
        ),
        sample(
            "/_apis/artifactcache/caches",
            "POST",
            "/_apis/artifactcache/caches",
            json!({ "key": "old-{caller}", "version": VERSION }),
            [201; 3],
        ),
        sample(
            "/_apis/artifactcache/caches/{id}",
            "PATCH",
            "/_apis/artifactcache/caches/{cache_id}",
            json!("bytes"),
            [204, 404, 404],
        ),
        sample(
            "/_apis/artifactcache/caches/{id}",
            "POST",
            "/_apis/artifactcache/caches/{cache_id}",
            json!({ "size": 5 }),
            [204, 404, 404],
        ),
    ]
}

/// Each may be done for octo/demo; for octo/other it is as if that were not there. In the place of another run's stands
/// what comes the second time.
fn api_samples() -> Vec<(Sample, Access)> {
    let run = json!({ "repository": "{repository}", "run_id": "77" });
    let mint = json!({
        "repository": "{repository}", "run_id": "77", "job_id": "build", "ref": "refs/heads/main",
        "default_ref": "refs/heads/main",
    });
    let post = |path, body, own| sample(path, "POST", path, body, [own, own, 404]);
    let rest = |method, pattern: &'static str, statuses| {
        let target = pattern
            .replace("{owner}/{repo}", "{repository}")
            .replace("{run_id}", "1");
        let target: &'static str = target.replace("{id}", "{artifact_id}").leak();
        (sample(pattern, method, target, json!({}), statuses), Access::Write)
    };
    const ARTIFACTS: &str = "/api/v3/repos/{owner}/{repo}/actions/artifacts";
    const ARTIFACT: &str = "/api/v3/repos/{owner}/{repo}/actions/artifacts/{id}";
    const RUN: &str = "/api/v3/repos/{owner}/{repo}/actions/runs/{run_id}";
    vec![
        (post("/api/v1/run/close", run, 204), Access::Write),
        (post("/api/v1/runtime-token", mint, 201), Access::Admin),
        rest("GET", "/api/v1/repos/{owner}/{repo}/usage", [200, 200, 404]),
        rest("GET", ARTIFACTS, [200, 200, 404]),
        rest("GET", ARTIFACT, [200, 200, 404]),
        rest(
            "GET",
            "/api/v3/repos/{owner}/{repo}/actions/artifacts/{id}/zip",
            [302, 302, 404],
        ),
        rest("GET", "/api/v3/repos/{owner}/{repo}/actions/runs", [200, 200, 404]),
        rest("GET", RUN, [200, 200, 404]),
        rest(
            "GET",
            "/api/v3/repos/{owner}/{repo}/actions/runs/{run_id}/artifacts",
            [200, 200, 404],
        ),
        rest(
            "GET",
            "/api/v3/repos/{owner}/{repo}/actions/runs/{run_id}/jobs",
            [200, 200, 404],
        ),
        rest("DELETE", ARTIFACT, [204, 404, 404]),
        rest("DELETE", RUN, [204, 404, 404]),
        rest("DELETE", "/api/v1/repos/{owner}/{repo}/artifacts", [204, 404, 404]),
    ]
}

/// A server with something in it, and every kind of caller.
struct World {
    server: TestServer,
    /// `Authorization`, by the caller's name.
    callers: Vec<(&'static str, Option<String>)>,
    artifact_id: String,
    /// Of an artifact of octo/other.
    other_id: String,
    container: String,
    cache_id: String,
    /// What nobody but run 1 may ever be shown.
    blobs: Vec<String>,
}

impl World {
    async fn new(backend: Backend) -> Self {
        let server = TestServer::start_with(backend, |config| {
            issuer::add(config, "forge", None);
            issuer::add(config, "gitea", None);
        })
        .await;
        let now_ms = server.clock.load(Ordering::Relaxed);
        let claims = |issuer: &str, repository: &str, run: &str, job: &str| {
            let mut claims = issuer::claims(issuer, repository, run, job, now_ms);
            claims["iat"] = json!(now_ms / 1000 - 1);
            claims["run_id"] = json!(run.parse::<i64>().unwrap());
            claims["ac"] = json!(r#"[{"Scope":"refs/heads/main","Permission":3}]"#);
            claims
        };
        let sign = |issuer: &str, claims: &Value| {
            issuer::sign(issuer::secret(issuer).as_bytes(), issuer::HEADER, &claims.to_string())
        };
        let good =
            |issuer: &str, repository: &str, run: &str, job: &str| sign(issuer, &claims(issuer, repository, run, job));
        let edited = |edit: fn(&mut Value, i64)| {
            let mut claims = claims("forge", "octo/demo", "1", "build");
            edit(&mut claims, now_ms / 1000);
            sign("forge", &claims)
        };
        let own = good("forge", "octo/demo", "1", "build");
        let services = &server.app.services;
        let mint = || {
            let request = MintRequest {
                repository: "octo/demo".to_owned(),
                repository_id: None,
                run_id: "1".to_owned(),
                job_id: "build".to_owned(),
                attempt: 1,
                git_ref: "refs/heads/main".to_owned(),
                default_ref: "refs/heads/main".to_owned(),
                event: None,
                ttl: DAY,
            };
            services.papers.mint(&request, now_ms).unwrap()
        };
        let retired = mint();
        services.papers.verify_token(&retired, now_ms).unwrap();
        services.rotate_keys(Duration::ZERO).await.unwrap();
        services.retire_key("1", true).await.unwrap();
        services.papers.verify_token(&mint(), now_ms).unwrap();

        let api = async |repositories: &[&str], access, lives_for| {
            let new = NewApiToken {
                name: "test".to_owned(),
                issuer: None,
                repositories: match repositories {
                    [] => Repositories::All,
                    listed => Repositories::Some(listed.iter().map(|name| (*name).to_owned()).collect()),
                },
                access,
                lives_for,
            };
            let (token, text) = services.create_api_token(new).await.unwrap();
            (token.id, text.expose_secret().to_owned())
        };
        let admin = api(&[], Access::Admin, DAY).await.1;
        let (revoked_id, revoked) = api(&[], Access::Admin, DAY).await;
        services.revoke_api_token(&revoked_id).await.unwrap();
        let short = api(&[], Access::Admin, Duration::from_secs(1)).await.1;
        server.advance(Duration::from_secs(1));
        // Well formed, and nobody's.
        let mistaken = wharfinger::papers::ApiTokenText::fresh().1.expose_secret().to_owned();

        let closed = good("forge", "octo/demo", "1", "closed");
        let reply = exchange(
            &server.url,
            &request(
                "POST",
                "/api/v1/job/close",
                &[("authorization", &format!("Bearer {closed}"))],
                b"",
            ),
        )
        .await;
        assert_eq!(reply.status, 204, "{reply:?}");

        let job = Job {
            server: &server,
            token: own.clone(),
            run: "1".to_owned(),
            job: "build".to_owned(),
        };
        let artifact_id = job.upload("harbour", b"there").await;
        // In another run, and in a repository that no API token here is for.
        let elsewhere = |token: String, run: &str| Job {
            server: &server,
            token,
            run: run.to_owned(),
            job: "build".to_owned(),
        };
        let run_2 = good("forge", "octo/demo", "2", "build");
        elsewhere(run_2.clone(), "2").upload("late", b"late").await;
        let other = good("forge", "octo/other", "1", "build");
        let other_id = elsewhere(other.clone(), "1").upload("secret", b"secret").await;
        job.upload("doomed", b"doomed").await;
        let mut blobs = vec![blob_of(&job.link("harbour").await), blob_of(&job.link("doomed").await)];
        let v3 = V3(job);
        let container = v3.open("v3").await;
        v3.put(&container, "v3/f", b"file", None).await;
        let cache = CacheJob {
            server: &server,
            token: own.clone(),
        };
        cache.save("deps", b"deps").await;
        let link = cache.create("reserved").await;
        assert_eq!(cache.put(&link, *b"cache").await, 201);
        blobs.push(blob_of(&link));
        let cache_id = cache.v1_reserve("chunks").await;

        let bearer = |token: &str| Some(format!("Bearer {token}"));
        let link = services
            .papers
            .sign_link(BlobKind::Artifact, Permission::Read, blobs[0], now_ms / 1000 + 600);
        let callers = vec![
            ("own", bearer(&own)),
            ("other run", bearer(&run_2)),
            ("other repository", bearer(&other)),
            ("other issuer", bearer(&good("gitea", "octo/demo", "1", "build"))),
            ("nobody", None),
            ("garbage", bearer("garbage")),
            ("basic", Some("Basic b2N0bzpjYXQ=".to_owned())),
            ("link", bearer(link.rsplit('=').next().unwrap())),
            (
                "expired",
                bearer(&edited(|claims, now_s| claims["exp"] = json!(now_s - 61))),
            ),
            (
                "not yet valid",
                bearer(&edited(|claims, now_s| claims["nbf"] = json!(now_s + 90))),
            ),
            (
                "forged",
                bearer(&issuer::sign(
                    issuer::secret("gitea").as_bytes(),
                    issuer::HEADER,
                    &claims("forge", "octo/demo", "1", "build").to_string(),
                )),
            ),
            (
                "unknown issuer",
                bearer(&edited(|claims, _| claims["iss"] = json!("https://other.example"))),
            ),
            ("closed job", bearer(&closed)),
            ("retired key", bearer(&retired)),
            ("API token", bearer(&admin)),
            ("expired API token", bearer(&short)),
            ("revoked API token", bearer(&revoked)),
            ("mistaken API token", bearer(&mistaken)),
            ("read", bearer(&api(&[], Access::Read, DAY).await.1)),
            ("write", bearer(&api(&["octo/demo"], Access::Write, DAY).await.1)),
            ("admin", bearer(&api(&["octo/demo"], Access::Admin, DAY).await.1)),
        ];
        let container = container.strip_prefix(&server.url).unwrap().to_owned();
        Self {
            artifact_id,
            other_id,
            container,
            cache_id: cache_id.to_string(),
            blobs: blobs.iter().map(ToString::to_string).collect(),
            callers,
            server,
        }
    }

    async fn send(&self, sample: &Sample, caller: &str, repository: &str) -> Reply {
        let id = match repository {
            "octo/other" => &self.other_id,
            _ => &self.artifact_id,
        };
        let fill = |text: &str| {
            text.replace("{container}", &self.container)
                .replace("{artifact_id}", id)
                .replace("{cache_id}", &self.cache_id)
                .replace("{version}", VERSION)
                .replace("{caller}", &caller.replace(' ', "-"))
                .replace("{repository}", repository)
        };
        let (_, authorization) = self.callers.iter().find(|(name, _)| *name == caller).unwrap();
        let mut headers = vec![("content-type", "application/json")];
        if let Some(authorization) = authorization {
            headers.push(("authorization", authorization));
        }
        // What is no JSON object is bytes of a file.
        let body = match &sample.body {
            Value::String(bytes) => {
                headers.retain(|(name, _)| *name != "content-type");
                headers.push(("content-type", "application/octet-stream"));
                headers.push(match sample.method {
                    "PUT" => ("content-range", "bytes 0-4/5"),
                    _ => ("content-range", "bytes 0-4/*"),
                });
                bytes.clone()
            }
            body => fill(&body.to_string()),
        };
        let body = if sample.method == "GET" { "" } else { &body };
        exchange(
            &self.server.url,
            &request(sample.method, &fill(sample.target), &headers, body.as_bytes()),
        )
        .await
    }

    /// Sends a sample for a caller and checks the status, and that nothing of others is shown.
    async fn check(&self, sample: &Sample, caller: &str, status: u16) {
        let reply = self.send(sample, caller, "octo/demo").await;
        let what = format!("{} {} as {caller}: {reply:?}", sample.method, sample.target);
        assert_eq!(reply.status, status, "{what}");
        if !["own", "other run", "read", "write", "admin"].contains(&caller) {
            let text = String::from_utf8_lossy(&reply.body);
            assert!(!self.blobs.iter().any(|blob| text.contains(blob)), "{what}");
            // A name that was asked for may come back.
            let asked = sample.body.to_string();
            for name in ["harbour", "doomed"] {
                assert!(asked.contains(name) || !text.contains(name), "{what}");
            }
        }
        if status == 401 && !sample.pattern.starts_with("/_apis/") {
            assert_eq!(reply.header("www-authenticate"), Some("Bearer"), "{what}");
        }
    }
}

async fn matrix(backend: Backend) {
    let world = World::new(backend).await;
    let (runtime, api_routes) = (runtime_samples(), api_samples());
    let close_job = sample("/api/v1/job/close", "POST", "/api/v1/job/close", json!({}), [204; 3]);

    let map = api::public(Context {
        services: world.server.app.services.clone(),
        upstream: None,
        patience: world.server.config.server.patience(),
    });
    for (pattern, caller, _) in map.routes() {
        let has_sample = match caller {
            Caller::RuntimeToken => runtime
                .iter()
                .chain([&close_job])
                .any(|sample| sample.pattern == *pattern),
            Caller::ApiToken(access) => api_routes
                .iter()
                .any(|(sample, needed)| (sample.pattern, needed) == (pattern, access)),
            Caller::SignedLink => *pattern == "/blob/{kind}/{id}",
            // In `pass_through`, and not here, where nothing is passed on.
            Caller::Upstream => false,
            Caller::Anyone => true,
        };
        assert!(has_sample, "no sample of {pattern}");
    }

    for sample in runtime.iter().chain([&close_job]) {
        for (caller, status) in REFUSED_RUNTIME {
            world.check(sample, caller, status).await;
        }
    }
    for sample in &runtime {
        for (caller, status) in [
            ("other run", sample.other_run),
            ("other repository", sample.stranger),
            ("other issuer", sample.stranger),
            // Last: it deletes and finalizes.
            ("own", sample.own),
        ] {
            world.check(sample, caller, status).await;
        }
    }
    for (sample, access) in &api_routes {
        for (caller, status) in REFUSED_API {
            world.check(sample, caller, status).await;
        }
        // What it is not for, and what there is not.
        let unseen = world.send(sample, "admin", "octo/other").await;
        let missing = world.send(sample, "admin", "octo/nothing").await;
        assert_eq!(unseen.status, sample.stranger, "{}: {unseen:?}", sample.target);
        assert_eq!((missing.status, missing.body), (unseen.status, unseen.body));
        let needed = if sample.method == "GET" { Access::Read } else { *access };
        let mut done = 0;
        for (caller, has) in [
            ("read", Access::Read),
            ("write", Access::Write),
            ("admin", Access::Admin),
        ] {
            let status = match (has >= needed, done) {
                (false, _) => 403,
                (true, 0) => sample.own,
                (true, _) => sample.other_run,
            };
            world.check(sample, caller, status).await;
            done += usize::from(has >= needed);
        }
    }
    // What no API token here is for is there still.
    let (_, authorization) = world
        .callers
        .iter()
        .find(|(name, _)| *name == "other repository")
        .unwrap();
    let others = Job {
        server: &world.server,
        token: authorization.as_ref().unwrap().replace("Bearer ", ""),
        run: "1".to_owned(),
        job: "build".to_owned(),
    };
    assert_eq!(others.download("secret").await, b"secret");
    for caller in ["other run", "other repository", "other issuer", "own"] {
        world.check(&close_job, caller, 204).await;
        world.check(&close_job, caller, 401).await;
    }
    world.server.stop().await;
}

#[tokio::test]
async fn every_caller_on_every_route_on_sqlite_and_disk() {
    matrix(Backend::SqliteDisk).boxed().await;
}

#[tokio::test]
async fn every_caller_on_every_route_on_postgres_and_s3() {
    matrix(Backend::PostgresS3).boxed().await;
}

/// Every kind of caller, and every kind of link, at one blob that is there.
async fn links(backend: Backend) {
    let world = World::new(backend).await;
    let services = &world.server.app.services;
    let now_s = services.clock.now_ms() / 1000;
    let blob = BlobId(world.blobs[0].parse().unwrap());
    let doomed = BlobId(world.blobs[1].parse().unwrap());
    let path_of = |link: String| link.strip_prefix(&world.server.url).unwrap().to_owned();
    let sign = |kind, permission, blob, until_s| path_of(services.papers.sign_link(kind, permission, blob, until_s));
    let art = BlobKind::Artifact;
    let read = sign(art, Permission::Read, blob, now_s + 600);
    let write = sign(art, Permission::Write, blob, now_s + 600);
    let bare = read.split('?').next().unwrap().to_owned();
    let get = async |path: &str, authorization: Option<&str>| {
        let headers: Vec<_> = authorization
            .map(|value| ("authorization", value))
            .into_iter()
            .collect();
        exchange(&world.server.url, &request("GET", path, &headers, b"")).await
    };
    assert_eq!(get(&read, None).await.body, b"there");

    // No token is worth a link, and none makes a link better or worse.
    for (caller, authorization) in &world.callers {
        let reply = get(&bare, authorization.as_deref()).await;
        assert_eq!(reply.status, 403, "{caller}: {reply:?}");
        assert_eq!(
            reply.header("x-ms-error-code"),
            Some("AuthenticationFailed"),
            "{caller}"
        );
        assert_eq!(get(&read, authorization.as_deref()).await.status, 200, "{caller}");
    }
    let other = sign(art, Permission::Read, BlobId::fresh(), now_s + 600);
    let signature = |link: &str| link.split("sig=").nth(1).unwrap().to_owned();
    for (what, path, status) in [
        ("expired", sign(art, Permission::Read, blob, now_s), 403),
        ("to write", write.clone(), 403),
        ("of nothing", other.clone(), 404),
        (
            "with another's signature",
            read.replace(&signature(&read), &signature(&other)),
            403,
        ),
        ("of another kind", read.replace("/art/", "/cache/"), 403),
        (
            "for longer",
            read.replace(&format!("se={}", now_s + 600), &format!("se={}", now_s + 601)),
            403,
        ),
        ("of another key", read.replace("sk=2", "sk=1"), 403),
        ("of no key", read.replace("sk=2", "sk=3"), 403),
    ] {
        let reply = get(&path, None).await;
        assert_eq!(reply.status, status, "a link {what}: {reply:?}");
    }
    let put = |path: &str| request("PUT", path, &[("x-ms-blob-type", "BlockBlob")], b"theirs");
    let reply = exchange(&world.server.url, &put(&read)).await;
    assert_eq!(
        reply.header("x-ms-error-code"),
        Some("AuthorizationPermissionMismatch"),
        "{reply:?}"
    );
    // What is finalized is final, and what is deleted is gone, whatever is signed.
    assert_eq!(exchange(&world.server.url, &put(&write)).await.status, 409);
    let to_doomed = sign(art, Permission::Read, doomed, now_s + 600);
    assert_eq!(get(&to_doomed, None).await.status, 200);
    let delete = runtime_samples()
        .into_iter()
        .find(|sample| sample.body["name"] == "doomed")
        .unwrap();
    world.check(&delete, "own", 200).await;
    assert_eq!(get(&to_doomed, None).await.status, 404);
    assert_eq!(get(&read, None).await.body, b"there");
    world.server.stop().await;
}

#[tokio::test]
async fn every_link_at_a_blob_on_sqlite_and_disk() {
    links(Backend::SqliteDisk).boxed().await;
}

#[tokio::test]
async fn every_link_at_a_blob_on_postgres_and_s3() {
    links(Backend::PostgresS3).boxed().await;
}

/// A run that is not the token's is refused before anything is looked at: what exists, what is a good name, and whether
/// there is a database at all.
#[tokio::test]
async fn a_run_that_does_not_match_is_refused_first() {
    let world = World::new(Backend::SqliteDisk).await;
    let refusals = async || {
        let mut bodies = std::collections::BTreeSet::new();
        for known in runtime_samples() {
            // Whose a container is stands in the database.
            if known.other_run != 403 || known.target.contains("{container}") {
                continue;
            }
            for name in ["harbour", "missing", "../x", ""] {
                let mut sample = sample(known.pattern, known.method, known.target, known.body.clone(), [0; 3]);
                for field in ["name", "Name"] {
                    if sample.body.get(field).is_some() {
                        sample.body[field] = json!(name);
                    }
                }
                let reply = world.send(&sample, "other run", "octo/demo").await;
                assert_eq!(reply.status, 403, "{} {name:?}: {reply:?}", sample.target);
                bodies.insert((sample.pattern.starts_with("/twirp/"), reply.text()));
            }
        }
        bodies
    };
    let bodies = refusals().await;
    assert_eq!(bodies.len(), 2, "one text in each dialect: {bodies:?}");
    world.server.app.services.db.close().await;
    assert_eq!(refusals().await, bodies);
    world.server.stop().await;
}
