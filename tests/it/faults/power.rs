//! A power cut: what a disk holds at some moment is all that is left of it.
//!
//! The data directory lies on a file system in an image file. A copy of that file, made while it is mounted, is what
//! the machine would find when the power comes back.

use std::fs;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use super::client::Client;
use super::mount::{Mount, run};
use super::{content, skipped};
use crate::common::process::{Environment, Process};

const MIB: usize = 1 << 20;
const ROUNDS: u64 = 4;

fn environment(data_dir: &Path, durability: &str) -> Environment {
    let mut environment = Environment::embedded(data_dir);
    environment.set("WHARFINGER_STORAGE__DURABILITY", durability);
    environment
}

fn formatted(directory: &TempDir) -> Result<Mount, String> {
    let image = directory.path().join("image");
    fs::File::create(&image).unwrap().set_len(512 << 20).unwrap();
    run(Command::new("mkfs.ext4").arg("-q").arg(&image))?;
    Mount::image(&image, &directory.path().join("disk"))
}

/// Starts a server on what the disk of `directory` holds now, as a machine would after a power cut.
fn revive(directory: &TempDir, copy: &TempDir, durability: &str) -> (Mount, Process) {
    let image = copy.path().join("image");
    fs::copy(directory.path().join("image"), &image).unwrap();
    let disk = Mount::image(&image, &copy.path().join("disk")).unwrap();
    let server = Process::start(&environment(&disk.path.join("data"), durability));
    (disk, server)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_survives_a_power_cut() {
    let directory = tempfile::tempdir().unwrap();
    let disk = match formatted(&directory) {
        Ok(disk) => disk,
        Err(reason) => return skipped("what_was_acknowledged_survives_a_power_cut", &reason),
    };
    let server = Process::start(&environment(&disk.path.join("data"), "full"));
    let mut client = Client::of_process(&server);
    for round in 0..ROUNDS {
        // Blocks and a list, small and large; then, in one request, a blob.
        client
            .upload(&format!("large-{round}"), &content(round, 30 * MIB), 8 * MIB)
            .await
            .unwrap();
        client
            .upload(&format!("small-{round}"), &content(round, 1000), 100)
            .await
            .unwrap();
        let link = client.create(&format!("whole-{round}")).await.unwrap();
        assert_eq!(client.put(&link, content(round, 10 * MIB)).await.status, 201);
        client
            .finalize(&format!("whole-{round}"), &content(round, 10 * MIB))
            .await
            .unwrap();
        // A deletion that was acknowledged does not come undone either.
        if round > 0 {
            assert_eq!(client.delete(&format!("small-{}", round - 1)).await.status, 200);
        }

        let copy = tempfile::tempdir().unwrap();
        let (copied, revived) = revive(&directory, &copy, "full");
        client = client.handed_over_to(Client::of_process(&revived));
        client.check_ledger().await;
        revived.environment.output(&["fsck", "--deep"]);
        assert_eq!(revived.terminate(), Some(0));
        drop(copied);
        client = client.handed_over_to(Client::of_process(&server));
    }
}

/// What shows that the test above would notice.
#[tokio::test(flavor = "multi_thread")]
async fn without_syncs_a_power_cut_loses_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let disk = match formatted(&directory) {
        Ok(disk) => disk,
        Err(reason) => return skipped("without_syncs_a_power_cut_loses_bytes", &reason),
    };
    // What store and database know each other by is not what may be lost here: without it nothing would start.
    let founder = Process::start(&environment(&disk.path.join("data"), "full"));
    assert_eq!(founder.terminate(), Some(0));
    let server = Process::start(&environment(&disk.path.join("data"), "process"));
    let client = Client::of_process(&server);
    let mut lost = 0;
    for round in 0..ROUNDS {
        let (name, bytes) = (format!("large-{round}"), content(round, 30 * MIB));
        client.upload(&name, &bytes, 8 * MIB).await.unwrap();
        let copy = tempfile::tempdir().unwrap();
        let (_copied, revived) = revive(&directory, &copy, "process");
        let reply = Client::of_process(&revived).download(&name).await;
        lost += usize::from(!(reply.is_success() && reply.body == bytes));
    }
    assert!(
        lost > 0,
        "nothing was lost {ROUNDS} times: the test of power cuts shows nothing"
    );
}
