//! The goals, and where this run stands: nothing in the third column is written here.

use crate::report::{Report, number};

const OWN: &str = "wharfinger-process";
const FULL: &str = "wharfinger-full";
const TLS: &str = "wharfinger-tls";

/// Is more better, or less?
#[derive(Clone, Copy)]
enum Must {
    AtLeast(f64),
    AtMost(f64),
}

/// A Markdown table of goals. What this run did not measure says so.
pub fn table(report: &Report) -> String {
    let mut text = "| # | goal | must | measured | met |\n|---|---|--:|--:|---|\n".to_owned();
    let mut row = |id: &str, goal: &str, must: Must, measured: Option<f64>| {
        let (sign, limit, met) = match must {
            Must::AtLeast(limit) => ("≥", limit, measured.map(|value| value >= limit)),
            Must::AtMost(limit) => ("≤", limit, measured.map(|value| value <= limit)),
        };
        let measured = measured.map_or_else(|| "–".to_owned(), number);
        let met = met.map_or("not measured", |met| if met { "yes" } else { "**no**" });
        text += &format!("| {id} | {goal} | {sign} {} | {measured} | {met} |\n", number(limit));
    };
    let ratio = |step: &str, figure, other_step: &str, other| {
        report.paired((step, OWN, figure), (other_step, other, figure), |own, other| {
            own / other
        })
    };
    let same = |step: &str, figure, other| ratio(step, figure, step, other);
    let own = |step: &str, figure| report.median(step, OWN, figure);
    use Must::{AtLeast, AtMost};

    let (c1, c5) = ("Ingest, 1 at once", "Ingest, 5 at once");
    row(
        "G1",
        "ingest, 5 at once: × nginx",
        AtLeast(0.8),
        same(c5, "MiB/s", "nginx"),
    );
    row(
        "G2",
        "ingest, 5 at once: × act 1 at once, its only correct mode",
        AtLeast(1.0),
        ratio(c5, "MiB/s", c1, "act"),
    );
    row(
        "G3",
        "ingest, 5 at once: × Azurite",
        AtLeast(5.0),
        same(c5, "MiB/s", "azurite"),
    );
    row(
        "G3",
        "ingest, 5 at once: × SeaweedFS",
        AtLeast(6.0),
        same(c5, "MiB/s", "seaweedfs"),
    );
    let unverified = report.paired(
        (c5, OWN, "unverified CPU-s/GiB"),
        (c5, "nginx", "CPU-s/GiB"),
        |own, other| own / other,
    );
    row("G4", "ingest CPU before the hash: × nginx", AtMost(1.2), unverified);
    let verified = report.paired((c5, OWN, "CPU-s/GiB"), (c5, "nginx", "CPU-s/GiB"), |own, other| {
        own - other
    });
    row(
        "G4",
        "ingest CPU with the hash verified: CPU-s/GiB above nginx",
        AtMost(0.95),
        verified,
    );
    row(
        "G5",
        "bytes written per byte uploaded",
        AtMost(1.01),
        own(c5, "written/byte"),
    );
    row(
        "G6",
        "Put Block List of 128 blocks, p99 ms",
        AtMost(10.0),
        own("Put Block List of 128 blocks", "p99 ms"),
    );
    row(
        "G6",
        "Finalize of 256 MiB, s",
        AtMost(0.3),
        own("Finalize of 256 MiB, hash verified", "s"),
    );
    let x8 = "Download, 8 at once";
    row(
        "G7",
        "download, 8 at once: × nginx",
        AtLeast(0.85),
        same(x8, "MiB/s", "nginx"),
    );
    row(
        "G7",
        "download, 8 at once: CPU × nginx",
        AtMost(2.2),
        same(x8, "CPU-s/GiB", "nginx"),
    );
    row(
        "G8",
        "download, 8 at once: × act",
        AtLeast(2.0),
        same(x8, "MiB/s", "act"),
    );
    row(
        "G8",
        "download, 8 at once: × Azurite",
        AtLeast(5.0),
        same(x8, "MiB/s", "azurite"),
    );
    let life = "64 KiB artifacts, whole life";
    row(
        "G9",
        "64 KiB lives per second: × act",
        AtLeast(0.8),
        same(life, "artifacts/s", "act"),
    );
    row(
        "G9",
        "64 KiB lives per second: × SeaweedFS",
        AtLeast(3.0),
        same(life, "artifacts/s", "seaweedfs"),
    );
    row(
        "G9",
        "64 KiB lives per second: × Azurite",
        AtLeast(6.0),
        same(life, "artifacts/s", "azurite"),
    );
    row("G9", "64 KiB life, CPU ms", AtMost(2.5), own(life, "CPU ms each"));
    let floor = "floor-discard";
    row(
        "G10",
        "signed links per second: × floor",
        AtLeast(0.5),
        same("Sign a link", "calls/s", floor),
    );
    row(
        "G10",
        "one name listed per second: × floor",
        AtLeast(0.4),
        same("List one name of 1,000", "calls/s", floor),
    );
    row(
        "G10",
        "creates per second: × floor",
        AtLeast(0.25),
        same("Create", "calls/s", floor),
    );
    for (call, goal) in [("List one name", "list one name"), ("Sign a link", "sign a link")] {
        let grown = ratio(
            &format!("{call}, 1000000 in all"),
            "p50 ms",
            &format!("{call}, 1,000 in all"),
            OWN,
        );
        row(
            "G11",
            &format!("{goal}, p50 with 1,000,000 artifacts: × with 1,000"),
            AtMost(1.5),
            grown,
        );
    }
    row(
        "G12",
        "anonymous memory, idle, MiB",
        AtMost(25.0),
        own("Idle", "anon MiB"),
    );
    let crowd = |step| own(step, "anon MiB");
    row(
        "G12",
        "anonymous memory, 64 uploads, 1 block each, MiB",
        AtMost(64.0),
        crowd("64 uploads, 1 block at once each"),
    );
    row(
        "G12",
        "anonymous memory, 64 uploads, 5 blocks each, MiB",
        AtMost(160.0),
        crowd("64 uploads, 5 blocks at once each"),
    );
    let gc = "Cleaner: 10000 expired of 1000000";
    row(
        "G13",
        "10,000 expired among 1,000,000 cleaned, s",
        AtMost(20.0),
        own(gc, "s"),
    );
    let (meanwhile, before) = ("list one p99 ms meanwhile", "list one p99 ms before");
    let slower = report.paired((gc, OWN, meanwhile), (gc, OWN, before), |busy, quiet| busy / quiet);
    row("G13", "list one name, p99 meanwhile: × before", AtMost(2.0), slower);
    let upload = "@actions/artifact 6.2.1, upload";
    row(
        "G14",
        "real client, 512 MiB, time: × floor",
        AtMost(1.1),
        same(upload, "s", floor),
    );
    let share = report.paired(
        (upload, OWN, "server CPU-s"),
        (upload, OWN, "client CPU-s"),
        |server, client| server / client,
    );
    row("G14", "real client: server CPU per client CPU", AtMost(0.25), share);
    let synced = report.paired((c5, FULL, "MiB/s"), (c5, OWN, "MiB/s"), |full, process| full / process);
    row("G15", "ingest, 5 at once, synced: × not synced", AtLeast(0.4), synced);
    // Before the hash: it costs both the same, and its noise is as large as what TLS adds.
    let stored = "unverified CPU-s/GiB";
    let encrypted = report.paired((c5, TLS, stored), (c5, OWN, stored), |tls, plain| tls - plain);
    row(
        "G16",
        "ingest CPU over TLS: CPU-s/GiB above plain HTTP",
        AtMost(0.7),
        encrypted,
    );
    let wrong = report
        .corrupted()
        .filter(|(_, server)| server.starts_with("wharfinger"))
        .count();
    row(
        "–",
        "uploads of Wharfinger that came back wrong",
        AtMost(0.0),
        Some(wrong as f64),
    );
    text
}
