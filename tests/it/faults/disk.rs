//! Disks that are full, read-only or rotten, and a server with too few file descriptors.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::client::{Client, Reply};
use super::mount::{Mount, run};
use super::{content, skipped, until};
use crate::common::process::{Environment, Process};
use crate::common::{Backend, TestServer};

const MIB: usize = 1 << 20;

/// The files below a directory, with their sizes.
fn files(directory: &Path) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_dir() {
            found.extend(files(&entry.path()));
        } else {
            // One that is gone meanwhile is none.
            found.extend(entry.metadata().ok().map(|metadata| (entry.path(), metadata.len())));
        }
    }
    found
}

/// Uploads until one is refused, which must be for now only.
async fn fill(client: &Client, size_bytes: usize) -> (usize, Reply) {
    for i in 0.. {
        let bytes = content(i as u64, size_bytes);
        if let Err(refused) = client.upload(&format!("fill-{size_bytes}-{i}"), &bytes, 8 * MIB).await {
            assert!(refused.is_busy(), "{size_bytes} bytes: {refused}");
            return (i, refused);
        }
    }
    unreachable!("the disk is never full")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_puts_uploads_off_and_deleting_makes_room() {
    let directory = tempfile::tempdir().unwrap();
    let disk = match Mount::small(&directory.path().join("disk")) {
        Ok(disk) => disk,
        Err(reason) => return skipped("a_full_disk_puts_uploads_off_and_deleting_makes_room", &reason),
    };
    let data_dir = disk.path.join("data");
    let mut environment = Environment::embedded(&data_dir);
    environment.set("WHARFINGER_CLEANER__DELETE_GRACE", "0s");
    let server = Process::start(&environment);
    let client = Client::of_process(&server);

    client.upload("kept", &content(99, MIB), MIB).await.unwrap();
    let (large, _) = fill(&client, 8 * MIB).await;
    assert!(large >= 4, "only {large} artifacts of 8 MiB on a disk of 64 MiB");
    until("what was refused is removed", || {
        let sizes = files(&data_dir.join("objects/blobs")).into_iter().map(|(_, size)| size);
        sizes
            .filter(|size| ![8 * MIB as u64, MIB as u64].contains(size))
            .count()
            == 0
    })
    .await;
    for size_bytes in [MIB, 64 * 1024, 4096, 1] {
        fill(&client, size_bytes).await;
    }
    client.check_ledger().await;
    let readiness = format!("{}/readyz", server.internal_url);
    let ready = async || reqwest::get(&readiness).await.unwrap().text().await.unwrap();
    assert!(ready().await.contains("store: "), "{}", ready().await);
    for i in 0..large {
        let reply = client.delete(&format!("fill-{}-{i}", 8 * MIB)).await;
        assert_eq!(reply.status, 200, "deleting on a full disk: {reply}");
    }
    environment.output(&["clean"]);
    assert!(ready().await.contains("\"ready\":true"), "{}", ready().await);
    client.upload("again", &content(7, 20 * MIB), 8 * MIB).await.unwrap();
    client.check_ledger().await;
    environment.output(&["fsck", "--deep"]);
    assert_eq!(server.terminate(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_others_fill_to_the_last_byte_puts_all_writing_off() {
    let directory = tempfile::tempdir().unwrap();
    let disk = match Mount::small(&directory.path().join("disk")) {
        Ok(disk) => disk,
        Err(reason) => {
            return skipped("a_disk_that_others_fill_to_the_last_byte_puts_all_writing_off", &reason);
        }
    };
    let environment = Environment::embedded(&disk.path.join("data"));
    let server = Process::start(&environment);
    let client = Client::of_process(&server);
    client.upload("kept", &content(1, MIB), MIB).await.unwrap();
    let link = client.create("during").await.unwrap();

    let ballast = disk.path.join("ballast");
    let mut file = fs::File::create(&ballast).unwrap();
    while file.write(&[0; 4096]).is_ok_and(|written| written > 0) {}
    drop(file);
    // The database goes on in what it has taken already, and then refuses.
    let mut refused = 0;
    for i in 0..1000 {
        let reply = client.put(&link, vec![1; 1000]).await;
        assert!(reply.is_busy(), "{reply}");
        match client.create(&format!("full-{i}")).await {
            Ok(_) => assert_eq!(refused, 0, "room came from nowhere"),
            Err(reply) => {
                assert!(reply.is_busy(), "{reply}");
                refused += 1;
            }
        }
        if refused == 20 {
            break;
        }
    }
    assert_eq!(refused, 20, "the database found room on a full disk");
    let reply = client.delete("kept").await;
    assert!(reply.is_busy(), "{reply}");
    client.check_ledger().await;

    fs::remove_file(ballast).unwrap();
    assert_eq!(client.put(&link, content(2, 3 * MIB)).await.status, 201);
    client.finalize("during", &content(2, 3 * MIB)).await.unwrap();
    client.upload("after", &content(3, 3 * MIB), MIB).await.unwrap();
    client.check_ledger().await;
    environment.output(&["fsck", "--deep"]);
    assert_eq!(server.terminate(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_becomes_read_only_serves_on_and_takes_uploads_once_it_can() {
    let directory = tempfile::tempdir().unwrap();
    let data_dir = directory.path().join("data");
    // Only the objects lie on it: a disk with an open database can't be made read-only.
    let disk = match Mount::small(&data_dir.join("objects")) {
        Ok(disk) => disk,
        Err(reason) => {
            return skipped(
                "a_disk_that_becomes_read_only_serves_on_and_takes_uploads_once_it_can",
                &reason,
            );
        }
    };
    let environment = Environment::embedded(&data_dir);
    let server = Process::start(&environment);
    let client = Client::of_process(&server);
    client.upload("before", &content(1, 3 * MIB), MIB).await.unwrap();
    let link = client.create("during").await.unwrap();

    // Files that are synced in the background are open for a while.
    until("nobody writes", || disk.remount("ro").is_ok()).await;
    for _ in 0..5 {
        let reply = client.put(&link, content(2, MIB)).await;
        assert!(reply.is_busy(), "{reply}");
    }
    assert!(client.delete("nothing").await.status == 404);
    client.check_ledger().await;

    disk.remount("rw").unwrap();
    assert_eq!(client.put(&link, content(2, MIB)).await.status, 201);
    client.finalize("during", &content(2, MIB)).await.unwrap();
    client.check_ledger().await;
    environment.output(&["fsck", "--deep"]);
    assert_eq!(server.terminate(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn too_few_file_descriptors_put_requests_off_and_lose_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let environment = Environment::embedded(&directory.path().join("data"));
    let server = Process::start(&environment);
    let client = Client::of_process(&server);
    client.upload("before", &content(1, 3 * MIB), MIB).await.unwrap();

    let limit = |files: usize| {
        let pid = server.pid().to_string();
        run(Command::new("prlimit").args(["--pid", &pid, &format!("--nofile={files}:")])).unwrap();
    };
    let open = fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap().count();
    limit(open + 6);
    let uploads = async {
        let uploads = (0..32u64).map(async |i| {
            client
                .upload_patiently(&format!("tight-{i}"), &content(i, 300_000))
                .await
        });
        futures_util::future::join_all(uploads).await
    };
    let relief = async {
        until("the limit is felt", || {
            let log = server.log.lock().unwrap();
            log.iter().filter(|line| line.contains("os error 24")).count() >= 20
        })
        .await;
        limit(4096);
    };
    tokio::join!(uploads, relief);
    client.upload("after", &content(2, 3 * MIB), MIB).await.unwrap();
    client.check_ledger().await;
    environment.output(&["fsck", "--deep"]);
    assert_eq!(server.terminate(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_file_is_never_served_whole_and_the_others_are() {
    let server = TestServer::start(Backend::SqliteDisk).await;
    let client = Client::of(&server);
    client.upload("sound", &content(0, 3 * MIB), MIB).await.unwrap();
    let blobs = server.config.data_dir.join("objects/blobs");
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 4] = [
        ("truncated", |file| {
            fs::OpenOptions::new()
                .write(true)
                .open(file)
                .unwrap()
                .set_len(1000)
                .unwrap();
        }),
        ("emptied", |file| fs::write(file, []).unwrap()),
        ("flipped", |file| {
            let mut bytes = fs::read(file).unwrap();
            *bytes.last_mut().unwrap() ^= 0x80;
            fs::write(file, bytes).unwrap();
        }),
        ("removed", |file| fs::remove_file(file).unwrap()),
    ];
    for (name, damage) in damages {
        // The first block, one in the middle and the last.
        for place in 0..3 {
            let name = format!("{name}-{place}");
            let there = files(&blobs);
            client.upload(&name, &content(5, 3 * MIB), MIB).await.unwrap();
            // Block i of the content is the file that has its bytes.
            let wanted = content(5, 3 * MIB)[place * MIB..(place + 1) * MIB].to_vec();
            let new = files(&blobs).into_iter().filter(|file| !there.contains(file));
            let file = new
                .map(|(path, _)| path)
                .find(|path| fs::read(path).unwrap() == wanted)
                .unwrap();
            damage(&file);
            let reply = client.download(&name).await;
            assert!(!reply.is_success(), "{name}: {reply}");
            let delivered = reply.status == 200;
            assert!(
                !delivered || content(5, 3 * MIB).starts_with(&reply.body),
                "{name}: other bytes went out"
            );
            client.forget(&name).await;
            assert!(client.download("sound").await.body == content(0, 3 * MIB), "{name}");
        }
    }
    server.stop().await;
}
