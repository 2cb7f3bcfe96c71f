//! `fsck` and the scrub: what they find, what they mend, and that they leave the rest alone.

use std::time::Duration;

use futures_util::TryStreamExt;
use uuid::Uuid;
use wharfinger::model::{BlobId, ObjectKey};
use wharfinger::service::fsck::{Kind, Options, Summary};

use crate::common::{Backend, TestServer};

const DAY: Duration = Duration::from_secs(24 * 3600);

/// What fsck says: the kinds of problems, and whether each was repaired.
async fn check(server: &TestServer, options: Options) -> (Vec<(Kind, bool)>, Summary) {
    let mut told = Vec::new();
    let summary = server
        .app
        .services
        .fsck(options, &mut |problem| told.push((problem.kind, problem.repaired)))
        .await
        .unwrap();
    assert_eq!(summary.problems, told.len() as u64);
    (told, summary)
}

const LOOK: Options = Options {
    deep: false,
    repair: false,
};
const DEEP: Options = Options {
    deep: true,
    repair: false,
};
const MEND: Options = Options {
    deep: true,
    repair: true,
};

/// The only object in the store.
async fn only_object(server: &TestServer) -> ObjectKey {
    let objects: Vec<_> = server.app.services.store.list_all().try_collect().await.unwrap();
    assert_eq!(objects.len(), 1);
    objects[0].key.clone()
}

/// Puts other bytes in an object's place, as no server would.
async fn replace(server: &TestServer, key: &ObjectKey, bytes: Vec<u8>) {
    let store = &server.app.services.store;
    store.delete(key).await.unwrap();
    let size_bytes = bytes.len() as u64;
    let body = futures_util::stream::iter([Ok(bytes::Bytes::from(bytes))]);
    store.put(key, size_bytes, body).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_healthy_server_has_no_problems_at_any_stage() {
    for backend in Backend::ALL {
        let server = TestServer::start(backend).await;
        let job = server.job();
        assert_eq!(check(&server, DEEP).await.0, []);
        job.upload("finished", &[7; 300_000]).await;
        job.upload("empty", &[]).await;
        let link = job.create("pending").await;
        job.put(&link, vec![1; 1000]).await;
        let (problems, summary) = check(&server, MEND).await;
        assert_eq!(
            (problems, summary.blobs, summary.objects),
            (vec![], 2, 2),
            "{backend:?}"
        );
        assert_eq!(job.download("finished").await, [7; 300_000]);
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_nobody_knows_is_deleted_once_it_is_old() {
    for backend in Backend::ALL {
        let server = TestServer::start(backend).await;
        server.job().upload("kept", b"kept").await;
        let stray = ObjectKey::fresh(BlobId::fresh());
        let body = futures_util::stream::iter([Ok(bytes::Bytes::from_static(b"stray"))]);
        server.app.services.store.put(&stray, 5, body).await.unwrap();
        assert_eq!(check(&server, MEND).await.0, [], "it may belong to a request under way");
        server.advance(DAY);
        assert_eq!(check(&server, LOOK).await.0, [(Kind::Orphan, false)], "{backend:?}");
        assert_eq!(check(&server, MEND).await.0, [(Kind::Orphan, true)]);
        assert_eq!(check(&server, DEEP).await.0, []);
        assert_eq!(server.job().download("kept").await, b"kept");
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_artifact_without_its_bytes_is_lost_and_its_name_free() {
    for backend in Backend::ALL {
        let server = TestServer::start(backend).await;
        let job = server.job();
        let old_id = job.upload("broken", &[1; 1000]).await;
        let link = job.link("broken").await;
        let object = only_object(&server).await;
        job.upload("whole", &[2; 1000]).await;
        server.app.services.store.delete(&object).await.unwrap();

        assert_eq!(check(&server, LOOK).await.0, [(Kind::Lost, false)], "{backend:?}");
        assert_eq!(job.names().await.len(), 2, "looking changes nothing");
        assert_eq!(check(&server, MEND).await.0, [(Kind::Lost, true)]);
        assert_eq!(check(&server, DEEP).await.0, []);
        assert_eq!(job.names().await, ["whole"]);
        assert_eq!(server.http.get(link).send().await.unwrap().status(), 410);
        assert_eq!(job.download("whole").await, [2; 1000]);

        let new_id = job.upload("broken", &[3; 1000]).await;
        assert_ne!(new_id, old_id);
        assert_eq!(job.download("broken").await, [3; 1000]);
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_byte_is_found_by_reading_deep_and_by_the_scrub() {
    for backend in Backend::ALL {
        let server = TestServer::start(backend).await;
        let (job, services) = (server.job(), &server.app.services);
        job.upload("rotten", &[1; 3_000_000]).await;
        let mut rotten = vec![1; 3_000_000];
        rotten[1_500_000] ^= 1;
        replace(&server, &only_object(&server).await, rotten).await;
        job.upload("sound", &[2; 1000]).await;
        assert_eq!(check(&server, LOOK).await.0, [], "its length is right");
        assert_eq!(check(&server, DEEP).await.0, [(Kind::Lost, false)], "{backend:?}");

        let holder = Uuid::new_v4();
        assert!(!services.scrub_next(holder).await.unwrap(), "nothing is due yet");
        server.advance(40 * DAY);
        while services.scrub_next(holder).await.unwrap() {}
        let job = server.job();
        assert_eq!(job.names().await, ["sound"]);
        assert_eq!(job.download("sound").await, [2; 1000]);
        assert!(
            !services.scrub_next(Uuid::new_v4()).await.unwrap(),
            "another replica holds the lease"
        );
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_cleaner_forgot_is_overdue_until_it_comes() {
    for backend in Backend::ALL {
        let server = TestServer::start_with(backend, |config| config.cleaner.interval = 2 * DAY).await;
        let job = server.job();
        let link = job.create("pending").await;
        job.put(&link, vec![1; 1000]).await;
        server.advance(20 * DAY);
        assert_eq!(check(&server, LOOK).await.0, [], "the cleaner has ten intervals");
        server.advance(2 * DAY);
        assert_eq!(check(&server, MEND).await.0, [(Kind::Overdue, false)], "{backend:?}");
        server.app.services.clean().await.unwrap();
        assert_eq!(check(&server, DEEP).await.0, []);
        server.stop().await;
    }
}
