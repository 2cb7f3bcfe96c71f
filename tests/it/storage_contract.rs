//! What every block store must keep, tried on memory, disk and S3; then what is special about each.

use std::convert::Infallible;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use crc_fast::{CrcAlgorithm, checksum};
use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use http::{Method, Request, Response, StatusCode};
use http_body_util::StreamBody;
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::time::timeout;
use wharfinger::error::{Error, Result};
use wharfinger::model::{BlobId, Block, ObjectKey};
use wharfinger::storage::{BlockStore, Durability, Piece, Settings, window};

use crate::common::s3::S3Server;

/// A store under test and where its objects are files, if they are.
struct Place {
    name: &'static str,
    store: BlockStore,
    files: Option<PathBuf>,
    _directory: Option<TempDir>,
    _server: Option<S3Server>,
}

impl Place {
    async fn memory() -> Self {
        let settings = Settings {
            url: "memory://".into(),
            ..disk_settings()
        };
        let store = BlockStore::open(&settings, Path::new("unused"), None).await.unwrap();
        Self {
            name: "memory",
            store,
            files: None,
            _directory: None,
            _server: None,
        }
    }

    async fn disk() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = BlockStore::open(&disk_settings(), directory.path(), None)
            .await
            .unwrap();
        let files = Some(directory.path().join("objects"));
        Self {
            name: "disk",
            store,
            files,
            _directory: Some(directory),
            _server: None,
        }
    }

    async fn s3() -> Self {
        Self::s3_at(S3Server::start()).await
    }

    async fn s3_at(server: S3Server) -> Self {
        let store = BlockStore::open(&s3_settings(&server), Path::new("unused"), None)
            .await
            .unwrap();
        let files = server.bucket_directory().map(|bucket| bucket.join("some/prefix"));
        Self {
            name: "s3",
            store,
            files,
            _directory: None,
            _server: Some(server),
        }
    }

    async fn all() -> [Self; 3] {
        [Self::memory().await, Self::disk().await, Self::s3().await]
    }

    async fn put(&self, key: &ObjectKey, bytes: &Bytes) -> Result<u64> {
        self.store.put(key, bytes.len() as u64, odd_frames(bytes)).await
    }

    /// Stores bytes as a block of their own.
    async fn block(&self, blob: BlobId, bytes: &Bytes) -> Block {
        let object_key = ObjectKey::fresh(blob);
        let crc64 = self.put(&object_key, bytes).await.unwrap();
        Block {
            object_key,
            object_offset: 0,
            size_bytes: bytes.len() as u64,
            crc64,
        }
    }

    async fn read(&self, pieces: Vec<Piece>) -> Result<Vec<u8>> {
        let chunks: Vec<Bytes> = self.store.read(pieces).await?.try_collect().await?;
        Ok(chunks.concat())
    }

    /// A dropped upload is cleaned up behind the scenes.
    async fn becomes_empty(&self, blob: BlobId) {
        for _ in 0..100 {
            if self.store.list(blob).await.unwrap().is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("{}: objects are left", self.name);
    }
}

fn disk_settings() -> Settings {
    Settings {
        url: String::new(),
        endpoint: String::new(),
        region: "us-east-1".into(),
        path_style: true,
        access_key_id: String::new(),
        secret_access_key: "".into(),
        session_token: "".into(),
        durability: Durability::Full,
    }
}

fn s3_settings(server: &S3Server) -> Settings {
    Settings {
        url: format!("s3://{}/some/prefix", server.bucket),
        endpoint: server.endpoint.clone(),
        access_key_id: server.access_key_id.into(),
        secret_access_key: server.secret_access_key.into(),
        ..disk_settings()
    }
}

/// Bytes without a period that a shifted chunk could hide in.
fn pattern(len: usize) -> Bytes {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn odd_frames(bytes: &Bytes) -> impl Stream<Item = Result<Bytes>> + Send + use<> {
    let mut left = bytes.clone();
    let mut sizes = [1, 7, 4096, 0, 65_537, 300_001, 3].into_iter().cycle();
    stream::iter(std::iter::from_fn(move || {
        let size = sizes.next()?.min(left.len());
        (!left.is_empty()).then(|| Ok(left.split_to(size)))
    }))
}

fn whole(block: &Block) -> Vec<Piece> {
    vec![Piece {
        block: block.clone(),
        from: 0,
        to: block.size_bytes,
    }]
}

fn crc64(bytes: &[u8]) -> u64 {
    checksum(CrcAlgorithm::Crc64Nvme, bytes)
}

/// Like a client whose connection breaks.
fn broken_after(bytes: Bytes) -> impl Stream<Item = Result<Bytes>> + Send + use<> {
    odd_frames(&bytes).chain(stream::iter([Err(Error::Malformed("the client is gone".into()))]))
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_come_back_as_they_went_in() {
    for place in Place::all().await {
        for len in [0, 1, 300 * 1024, 20 * 1024 * 1024 + 5] {
            let (blob, bytes) = (BlobId::fresh(), pattern(len));
            let block = place.block(blob, &bytes).await;
            assert_eq!(block.crc64, crc64(&bytes), "{}: {len} B", place.name);
            let listed = place.store.list(blob).await.unwrap();
            assert_eq!(listed.len(), 1, "{}: {len} B", place.name);
            assert_eq!((&listed[0].key, listed[0].size_bytes), (&block.object_key, len as u64));
            place
                .store
                .make_durable(blob, &[(block.object_key.clone(), len as u64)])
                .await
                .unwrap();
            assert!(
                place.read(whole(&block)).await.unwrap() == bytes,
                "{}: {len} B",
                place.name
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_put_leaves_nothing() {
    for place in Place::all().await {
        let (blob, bytes) = (BlobId::fresh(), pattern(700_000));
        let put = async |size_bytes, body| place.store.put(&ObjectKey::fresh(blob), size_bytes, body).await;
        let broken = put(800_000, broken_after(bytes.clone()).boxed()).await;
        assert!(
            matches!(&broken, Err(Error::Malformed(text)) if text == "the client is gone"),
            "{broken:?}"
        );
        // Broken at the very end: every byte came and yet the body is not whole.
        let broken = put(700_000, broken_after(bytes.clone()).boxed()).await;
        assert!(matches!(broken, Err(Error::Malformed(_))), "{}: {broken:?}", place.name);
        for size_bytes in [0, 1, 699_999, 700_001, 90_000_000] {
            let result = put(size_bytes, odd_frames(&bytes).boxed()).await;
            assert!(
                matches!(result, Err(Error::Invalid(_))),
                "{}: {size_bytes}: {result:?}",
                place.name
            );
        }
        let short = put(5, stream::empty().boxed()).await;
        assert!(matches!(short, Err(Error::Invalid(_))), "{}: {short:?}", place.name);
        assert_eq!(place.store.list(blob).await.unwrap(), [], "{}", place.name);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_put_leaves_nothing() {
    for place in Place::all().await {
        let (blob, bytes) = (BlobId::fresh(), pattern(3_000_000));
        let puts = (0..8).map(|_| {
            let stuck = odd_frames(&bytes).chain(stream::pending());
            let (store, key) = (place.store.clone(), ObjectKey::fresh(blob));
            async move { store.put(&key, 4_000_000, stuck).await }
        });
        assert!(
            timeout(Duration::from_millis(300), futures_util::future::join_all(puts))
                .await
                .is_err()
        );
        place.becomes_empty(blob).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn puts_run_side_by_side() {
    for place in Place::all().await {
        let (blob, bytes) = (BlobId::fresh(), pattern(1024 * 1024 + 1));
        let blocks: Vec<Block> = stream::iter(0..24)
            .map(|_| place.block(blob, &bytes))
            .buffer_unordered(24)
            .collect()
            .await;
        let names: Vec<_> = blocks
            .iter()
            .map(|block| (block.object_key.clone(), block.size_bytes))
            .collect();
        place.store.make_durable(blob, &names).await.unwrap();
        // Nothing is remembered now, as after a restart.
        place.store.make_durable(blob, &names).await.unwrap();
        for block in &blocks {
            assert!(place.read(whole(block)).await.unwrap() == bytes, "{}", place.name);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn windows_run_over_several_blocks() {
    for place in Place::all().await {
        let (blob, bytes) = (BlobId::fresh(), pattern(5_000_000));
        let (mut rows, mut start) = (Vec::new(), 0);
        for len in [0, 1, 2_500_000, 0, 99, 2_499_900] {
            let block = place.block(blob, &bytes.slice(start..start + len)).await;
            rows.push((start as u64, block));
            start += len;
        }
        for range in [
            0..5_000_000,
            0..1,
            1..2,
            0..0,
            4_999_999..5_000_000,
            700_000..2_500_050,
            2_500_001..2_500_100,
        ] {
            let read = place.read(window(rows.clone(), range.clone()).unwrap()).await.unwrap();
            assert!(
                read == bytes[range.start as usize..range.end as usize],
                "{}: {range:?}",
                place.name
            );
        }
        // A row may be a part of an object.
        let shared = Block {
            object_offset: 1000,
            size_bytes: 500,
            crc64: crc64(&bytes[1001..1501]),
            ..rows[2].1.clone()
        };
        assert!(
            place.read(whole(&shared)).await.unwrap() == bytes[1001..1501],
            "{}",
            place.name
        );
        let part = vec![Piece {
            block: shared,
            from: 10,
            to: 20,
        }];
        assert!(place.read(part).await.unwrap() == bytes[1011..1021], "{}", place.name);
    }
}

/// All the bytes that come before the error, which must come.
async fn read_until_damage(place: &Place, pieces: Vec<Piece>) -> usize {
    let mut reader = match place.store.read(pieces).await {
        Ok(reader) => reader,
        Err(Error::Gone(_)) => return 0,
        Err(error) => panic!("{}: {error}", place.name),
    };
    let mut got = 0;
    loop {
        match reader.next().await {
            Some(Ok(chunk)) => got += chunk.len(),
            Some(Err(Error::Gone(_))) => return got,
            end => panic!("{}: {end:?}", place.name),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_is_never_a_clean_end() {
    for place in Place::all().await {
        let (blob, bytes) = (BlobId::fresh(), pattern(3_000_000));
        let good = place.block(blob, &bytes).await;
        let both = |bad: &Block| [whole(&good), whole(bad)].concat();

        let other_crc = Block {
            crc64: good.crc64 ^ 1,
            ..good.clone()
        };
        assert!(read_until_damage(&place, both(&other_crc)).await < 6_000_000);
        let longer = Block {
            size_bytes: 3_000_001,
            ..good.clone()
        };
        assert!(read_until_damage(&place, both(&longer)).await <= 6_000_000);
        let behind = Block {
            object_offset: 9_000_000,
            ..good.clone()
        };
        assert_eq!(read_until_damage(&place, both(&behind)).await, 3_000_000);

        let missing = place.block(blob, &bytes).await;
        place.store.delete(&missing.object_key).await.unwrap();
        assert_eq!(read_until_damage(&place, both(&missing)).await, 3_000_000);
        // The first block's loss is known before there is a reply to cut off.
        assert!(place.store.read(both(&missing)).await.is_ok());
        assert!(matches!(
            place.store.read(whole(&missing)).await.err(),
            Some(Error::Gone(_))
        ));
        assert!(matches!(
            place.store.read(whole(&behind)).await.err(),
            Some(Error::Gone(_))
        ));
        let small = place.block(blob, &bytes.slice(..1000)).await;
        let bad_small = Block {
            crc64: small.crc64 ^ 1,
            ..small
        };
        assert!(matches!(
            place.store.read(whole(&bad_small)).await.err(),
            Some(Error::Gone(_))
        ));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rot_in_files_is_seen() {
    for place in [Place::disk().await, Place::s3_at(S3Server::inside()).await] {
        let (blob, bytes) = (BlobId::fresh(), pattern(3_000_000));
        let path = |block: &Block| place.files.as_ref().unwrap().join(block.object_key.as_str());

        let flipped = place.block(blob, &bytes).await;
        let mut rotten = bytes.to_vec();
        rotten[2_999_999] ^= 0x10;
        fs::write(path(&flipped), rotten).unwrap();
        assert!(
            read_until_damage(&place, whole(&flipped)).await < 3_000_000,
            "{}",
            place.name
        );

        let truncated = place.block(blob, &bytes).await;
        fs::OpenOptions::new()
            .write(true)
            .open(path(&truncated))
            .unwrap()
            .set_len(1_500_000)
            .unwrap();
        assert_eq!(read_until_damage(&place, whole(&truncated)).await, 0, "{}", place.name);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_reader_stops() {
    for place in Place::all().await {
        let block = place.block(BlobId::fresh(), &pattern(5_000_000)).await;
        for _ in 0..50 {
            let mut reader = place.store.read([whole(&block), whole(&block)].concat()).await.unwrap();
            assert!(reader.next().await.unwrap().is_ok());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn deleting_twice_is_fine() {
    for place in Place::all().await {
        let blob = BlobId::fresh();
        let block = place.block(blob, &pattern(10)).await;
        for _ in 0..2 {
            place.store.delete(&block.object_key).await.unwrap();
        }
        place.store.delete(&ObjectKey::fresh(BlobId::fresh())).await.unwrap();
        assert_eq!(place.store.list(blob).await.unwrap(), []);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listing_shows_our_objects_only() {
    for place in Place::all().await {
        let (blob, other) = (BlobId::fresh(), BlobId::fresh());
        let mut keys = Vec::new();
        for _ in 0..3 {
            keys.push(place.block(blob, &pattern(10)).await.object_key);
            place.block(other, &pattern(20)).await;
        }
        place.store.write_marker("a store").await.unwrap();
        if let Some(files) = &place.files {
            let directory = directory(files, blob);
            fs::write(directory.join("foreign"), "?").unwrap();
            fs::write(directory.join(format!("{blob}.foreign")), "?").unwrap();
            fs::write(files.join("blobs/foreign"), "?").unwrap();
            // Named as ours, at another's place.
            let elsewhere = files.join("blobs/elsewhere");
            fs::create_dir(&elsewhere).unwrap();
            fs::write(elsewhere.join(format!("{blob}.{blob}")), "?").unwrap();
        }
        let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_millis() as i64;
        let listed = place.store.list(blob).await.unwrap();
        assert!(
            listed
                .iter()
                .all(|object| object.size_bytes == 10 && (now - object.modified_ms).abs() < 60_000)
        );
        let mut found: Vec<_> = listed.into_iter().map(|object| object.key).collect();
        found.sort();
        keys.sort();
        assert_eq!(found, keys, "{}", place.name);
        let all: Vec<_> = place.store.list_all().try_collect().await.unwrap();
        assert_eq!(all.len(), 6, "{}: {all:?}", place.name);
        assert_eq!(place.store.list(BlobId::fresh()).await.unwrap(), []);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_marker_is_kept() {
    for place in Place::all().await {
        place.store.check().await.unwrap();
        assert_eq!(place.store.read_marker().await.unwrap(), None);
        for marker in ["first", "a second one"] {
            place.store.write_marker(marker).await.unwrap();
            assert_eq!(place.store.read_marker().await.unwrap().as_deref(), Some(marker));
        }
        assert!(place.store.write_marker(&"x".repeat(5000)).await.is_err());
        place.store.check().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_misses_lost_blocks_before_they_are_acknowledged_for_good() {
    let place = Place::disk().await;
    let (blob, bytes) = (BlobId::fresh(), pattern(1000));
    let block = place.block(blob, &bytes).await;
    let named = |size_bytes| [(block.object_key.clone(), size_bytes)];
    assert!(matches!(
        place.store.make_durable(blob, &named(999)).await,
        Err(Error::Gone(_))
    ));
    place.store.make_durable(blob, &named(1000)).await.unwrap();
    place.store.delete(&block.object_key).await.unwrap();
    assert!(matches!(
        place.store.make_durable(blob, &named(1000)).await,
        Err(Error::Gone(_))
    ));
    place.store.make_durable(BlobId::fresh(), &[]).await.unwrap();
}

/// Where a disk keeps the objects of a blob and of others of the same moment.
fn directory(files: &Path, blob: BlobId) -> PathBuf {
    files.join("blobs").join(&blob.to_string()[..11])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_gives_back_empty_directories() {
    let place = Place::disk().await;
    let blob = BlobId::fresh();
    let other = BlobId(uuid::Uuid::from_u128(blob.0.as_u128() ^ 1));
    let block = place.block(blob, &pattern(1000)).await;
    let others = place.block(other, &pattern(10)).await;
    let directory = directory(place.files.as_ref().unwrap(), blob);
    assert_eq!(fs::metadata(&directory).unwrap().permissions().mode() & 0o777, 0o700);
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 2);
    place.store.remove_prefix(blob).await.unwrap();
    assert!(directory.exists(), "it was not empty");
    place.store.delete(&block.object_key).await.unwrap();
    place.store.remove_prefix(blob).await.unwrap();
    assert_eq!(place.store.list(blob).await.unwrap(), []);
    assert_eq!(place.store.list(other).await.unwrap().len(), 1, "what it shared stays");
    place.store.delete(&others.object_key).await.unwrap();
    place.store.remove_prefix(other).await.unwrap();
    assert!(!directory.exists());
    place.store.remove_prefix(blob).await.unwrap();
    place.block(blob, &pattern(1000)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_never_overwrites() {
    let place = Place::disk().await;
    let block = place.block(BlobId::fresh(), &pattern(1000)).await;
    assert!(matches!(
        place.put(&block.object_key, &pattern(5)).await,
        Err(Error::Internal(_))
    ));
    assert!(place.read(whole(&block)).await.unwrap() == pattern(1000));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unmounted_disk_is_noticed() {
    let place = Place::disk().await;
    fs::remove_dir_all(place.files.as_ref().unwrap()).unwrap();
    assert!(matches!(place.store.check().await, Err(Error::Busy(_))));
    assert!(matches!(
        place.put(&ObjectKey::fresh(BlobId::fresh()), &pattern(5)).await,
        Err(Error::Internal(_))
    ));
}

async fn why_not(settings: &Settings, data_dir: &Path) -> String {
    BlockStore::open(settings, data_dir, None)
        .await
        .unwrap_err()
        .to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_others_could_redirect_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (linked, elsewhere) = (directory.path().join("linked"), directory.path().join("elsewhere"));
    fs::create_dir(&linked).unwrap();
    symlink(&elsewhere, linked.join("objects")).unwrap();
    for _ in 0..2 {
        let text = why_not(&disk_settings(), &linked).await;
        assert!(text.contains("is a symbolic link"), "{text}");
        // Dangling at first.
        let _ = fs::create_dir(&elsewhere);
    }
    let open = directory.path().join("open/objects");
    fs::create_dir_all(&open).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
    let text = why_not(&disk_settings(), open.parent().unwrap()).await;
    assert!(text.contains("chmod o-w"), "{text}");
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    let text = why_not(&disk_settings(), &file).await;
    assert!(text.contains("can't make the directory"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_cannot_be_used_says_why() {
    let server = S3Server::start();
    let good = s3_settings(&server);
    let cases = [
        (
            Settings {
                url: "s3://no-such-bucket".into(),
                ..good.clone()
            },
            "`no-such-bucket` does not exist",
        ),
        (
            Settings {
                secret_access_key: "wrong".into(),
                ..good.clone()
            },
            "refused the credentials",
        ),
        (
            Settings {
                endpoint: "http://127.0.0.1:1".into(),
                ..good.clone()
            },
            "can't be reached",
        ),
        (
            Settings {
                endpoint: "127.0.0.1:1".into(),
                ..good.clone()
            },
            "begin it with http",
        ),
        (
            Settings {
                url: "s3://".into(),
                ..good.clone()
            },
            "names no bucket",
        ),
        (
            Settings {
                url: "ftp://x".into(),
                ..good.clone()
            },
            "s3://bucket",
        ),
    ];
    for (settings, words) in cases {
        let text = why_not(&settings, Path::new("unused")).await;
        assert!(text.contains(words), "{text}");
    }
    let ca_file = Path::new("/nowhere/missing.pem");
    let error = BlockStore::open(&good, Path::new("unused"), Some(ca_file))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("can't read the ca_file"), "{error}");
}

/// An S3 server that answers uploads as it is told and breaks every download off halfway.
async fn hostile(put_status: StatusCode, put_reply: &'static str) -> BlockStore {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            let service = service_fn(move |request| hostile_reply(request, put_status, put_reply));
            tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(socket), service));
        }
    });
    let settings = Settings {
        url: "s3://b".into(),
        endpoint,
        access_key_id: "key".into(),
        secret_access_key: "secret".into(),
        ..disk_settings()
    };
    BlockStore::open(&settings, Path::new("unused"), None).await.unwrap()
}

type HostileBody = StreamBody<stream::BoxStream<'static, std::result::Result<Frame<Bytes>, std::io::Error>>>;

async fn hostile_reply(
    request: Request<Incoming>,
    put_status: StatusCode,
    put_reply: &'static str,
) -> std::result::Result<Response<HostileBody>, Infallible> {
    const EMPTY_LISTING: &str = "<ListBucketResult><Name>b</Name><IsTruncated>false</IsTruncated></ListBucketResult>";
    let text = |text: &'static str| StreamBody::new(stream::iter([Ok(Frame::data(text.into()))]).boxed());
    let range = request
        .headers()
        .get("range")
        .map(|range| range.to_str().unwrap().to_owned());
    let reply = match range {
        _ if request.method() == Method::PUT => {
            let _ = http_body_util::BodyExt::collect(request.into_body()).await;
            Response::builder().status(put_status).body(text(put_reply))
        }
        None => Response::builder().body(text(EMPTY_LISTING)),
        Some(range) => {
            let (from, to) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
            let (from, to): (usize, usize) = (from.parse().unwrap(), to.parse::<usize>().unwrap() + 1);
            let half = if to - from < 50_000 { to } else { from.midpoint(to) };
            let first = stream::iter([Ok(Frame::data(pattern(1_000_000).slice(from..half)))]);
            // What was sent before the cut needs a moment to get out.
            let cut = stream::once(async move {
                tokio::time::sleep(Duration::from_millis(50)).await;
                Err(std::io::Error::other("cut"))
            });
            let parts = first.chain(cut.take(usize::from(half < to)));
            Response::builder()
                .status(StatusCode::PARTIAL_CONTENT)
                .header("content-range", format!("bytes {from}-{}/1000000", to - 1))
                .header("content-length", to - from)
                .header("last-modified", "Sat, 01 Nov 2025 10:00:00 GMT")
                .body(StreamBody::new(parts.boxed()))
        }
    };
    Ok(reply.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_refuses_an_upload_is_believed() {
    let busy = "<Error><Code>SlowDown</Code></Error>";
    let no_bucket = "<Error><Code>NoSuchBucket</Code></Error>";
    for (status, reply, is_busy) in [
        (StatusCode::OK, busy, true),
        (StatusCode::SERVICE_UNAVAILABLE, busy, true),
        (StatusCode::TOO_MANY_REQUESTS, "", true),
        (
            StatusCode::BAD_REQUEST,
            "<Error><Code>RequestTimeout</Code></Error>",
            true,
        ),
        (StatusCode::NOT_FOUND, no_bucket, false),
        (StatusCode::FORBIDDEN, "<Error><Code>AccessDenied</Code></Error>", false),
        (StatusCode::TEMPORARY_REDIRECT, "", false),
    ] {
        let store = hostile(status, reply).await;
        let bytes = pattern(100_000);
        let error = store
            .put(&ObjectKey::fresh(BlobId::fresh()), 100_000, odd_frames(&bytes))
            .await
            .unwrap_err();
        assert_eq!(matches!(error, Error::Busy(_)), is_busy, "{status} {reply}: {error}");
        assert_eq!(
            matches!(error, Error::Internal(_)),
            !is_busy,
            "{status} {reply}: {error}"
        );
        assert!(!error.to_string().contains("X-Amz"), "{error}");
    }
    let store = hostile(StatusCode::OK, "").await;
    store
        .put(&ObjectKey::fresh(BlobId::fresh()), 1, odd_frames(&pattern(1)))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_goes_on_where_the_bucket_broke_it_off() {
    let store = hostile(StatusCode::OK, "").await;
    let bytes = pattern(1_000_000);
    let object_key = ObjectKey::fresh(BlobId::fresh());
    let block = Block {
        object_key,
        object_offset: 0,
        size_bytes: 1_000_000,
        crc64: crc64(&bytes),
    };
    let chunks: Vec<Bytes> = store.read(whole(&block)).await.unwrap().try_collect().await.unwrap();
    assert!(chunks.concat() == bytes);
}
