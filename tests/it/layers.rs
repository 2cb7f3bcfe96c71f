//! The floors of the house: imports go down only, and each of them keeps its own secret (HTTP, SQL, the object store,
//! the configuration). Reads the sources as text; ARCHITECTURE.md has the picture.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Each module at the root of the crate, with the others that it may name.
const MAY_NAME: [(&str, &[&str]); 15] = [
    ("error", &[]),
    ("clock", &[]),
    ("authorities", &[]),
    ("duration", &[]),
    ("failpoint", &[]),
    ("model", &["error"]),
    ("db", &BELOW_THE_MIDDLE),
    ("storage", &BELOW_THE_MIDDLE),
    ("papers", &BELOW_THE_MIDDLE),
    (
        "service",
        &[
            "db",
            "storage",
            "papers",
            "model",
            "error",
            "clock",
            "duration",
            "failpoint",
        ],
    ),
    (
        "api",
        &[
            "service",
            "db",
            "storage",
            "papers",
            "model",
            "error",
            "clock",
            "duration",
            "authorities",
        ],
    ),
    // Beside the floors: it names the settings of those that have some.
    ("config", &["api", "service", "db", "storage", "papers", "duration"]),
    (
        "app",
        &[
            "config", "api", "service", "db", "storage", "papers", "model", "error", "clock", "duration",
        ],
    ),
    (
        "cli",
        &[
            "app", "config", "api", "service", "db", "storage", "papers", "model", "error", "clock", "duration",
        ],
    ),
    // The table of contents names nothing; its `mod` lines are no paths.
    ("lib", &[]),
];
const BELOW_THE_MIDDLE: [&str; 6] = ["model", "error", "clock", "duration", "authorities", "failpoint"];

/// Crates that only one floor may know.
const SECRETS: [(&str, &[&str]); 7] = [
    ("axum", &["api"]),
    ("prost", &["api"]),
    ("hyper", &["api"]),
    ("hyper_util", &["api"]),
    ("sqlx", &["db"]),
    ("rusqlite", &["db"]),
    ("object_store", &["storage"]),
];

/// What a file names that its floor must not know.
fn broken_rules(floor: &str, source: &str) -> Vec<String> {
    let code = without_comments_and_texts(source);
    let mut broken = Vec::new();
    if let Some(allowed) = floor_named(floor) {
        let foreign = |name: &&str| *name != floor && !allowed.contains(name);
        let foreign = modules_named(&code).into_iter().filter(foreign);
        broken.extend(foreign.map(|name| format!("{floor} names {name}")));
    } else if floor != "main" {
        broken.push(format!("{floor} is on no floor: give it one in tests/it/layers.rs"));
    }
    let crates = crates_named(&code);
    for (secret, knowing) in SECRETS {
        if crates.contains(secret) && !knowing.contains(&floor) {
            broken.push(format!("{floor} names {secret}"));
        }
    }
    broken
}

/// The modules of this crate that stand in paths: `crate::db::Db`, `use crate::{db, api::serve}`, `wharfinger::cli`.
fn modules_named(code: &[String]) -> BTreeSet<&str> {
    let mut named = BTreeSet::new();
    for (at, root) in code.windows(2).enumerate().filter(|(_, pair)| pair[1] == "::") {
        let heads = match code.get(at + 2).map(String::as_str) {
            Some("{") => heads_of_group(&code[at + 3..]),
            Some(head) => vec![head],
            None => Vec::new(),
        };
        match root[0].as_str() {
            "crate" | "wharfinger" => named.extend(heads),
            // Mostly a neighbour on the same floor, but it can lead to the root.
            "super" => named.extend(heads.into_iter().filter(|head| floor_named(head).is_some())),
            _ => {}
        }
    }
    named
}

fn floor_named(name: &str) -> Option<&'static [&'static str]> {
    let (_, allowed) = MAY_NAME.iter().find(|(floor, _)| *floor == name)?;
    Some(allowed)
}

/// The first word of each entry of a group, from behind its brace: `a, b::{c, d}, e as f}`.
fn heads_of_group(code: &[String]) -> Vec<&str> {
    let (mut depth, mut at_head, mut heads) = (1, true, Vec::new());
    for word in code {
        match word.as_str() {
            "{" => depth += 1,
            "}" => depth -= 1,
            "," if depth == 1 => at_head = true,
            word if at_head && is_name(word) => {
                heads.push(word);
                at_head = false;
            }
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    heads
}

/// Every word that may be a crate's name: it begins a path, or is imported as it is.
fn crates_named(code: &[String]) -> BTreeSet<&str> {
    let word = |at: usize| code.get(at).map_or("", String::as_str);
    let mut named = BTreeSet::new();
    for at in 0..code.len() {
        let (before, after) = (if at > 0 { word(at - 1) } else { "" }, word(at + 1));
        let begins_path = after == "::" && !(before == "::" && at > 1 && is_name(word(at - 2)));
        let imported = before == "use" || before == "crate" && word(at) != "::";
        if begins_path || imported {
            named.insert(word(at));
        }
        if before == "use" && word(at) == "{" {
            named.extend(heads_of_group(&code[at + 1..]));
        }
    }
    named
}

fn is_name(word: &str) -> bool {
    word.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// The words and signs of a source, `::` as one sign, without comments, texts and characters.
fn without_comments_and_texts(source: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut rest = source;
    while let Some(first) = rest.chars().next() {
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment(rest)
        } else if let Some(length) = text(rest) {
            length
        } else if is_name(rest) {
            let length = rest
                .find(|c: char| !c.is_alphanumeric() && c != '_')
                .unwrap_or(rest.len());
            words.push(rest[..length].to_owned());
            length
        } else if rest.starts_with("::") {
            words.push("::".to_owned());
            2
        } else {
            if !first.is_whitespace() {
                words.push(first.to_string());
            }
            first.len_utf8()
        };
        rest = &rest[length..];
    }
    words
}

/// Comments of this kind nest.
fn block_comment(source: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < source.len() {
        let rest = &source.as_bytes()[at..];
        if rest.starts_with(b"/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if rest.starts_with(b"*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    source.len()
}

/// The length of a text or character that begins here: `"…"`, `b"…"`, `r#"…"#`, `'x'`, `'\''`; a lifetime is none.
fn text(source: &str) -> Option<usize> {
    let bytes = source.as_bytes();
    let prefix = ["br", "cr", "b", "c", "r", ""].into_iter().find(|prefix| {
        source.strip_prefix(prefix).is_some_and(|rest| {
            // Only a raw text has hashes before its quote; `r#type` is a name.
            let rest = if prefix.ends_with('r') {
                rest.trim_start_matches('#')
            } else {
                rest
            };
            rest.starts_with('"')
        })
    });
    if let Some(prefix) = prefix {
        let rest = &source[prefix.len()..];
        if prefix.ends_with('r') {
            let hashes = rest.len() - rest.trim_start_matches('#').len();
            let end = format!("\"{}", "#".repeat(hashes));
            let body = prefix.len() + hashes + 1;
            return Some(
                source[body..]
                    .find(&end)
                    .map_or(source.len(), |at| body + at + end.len()),
            );
        }
        return Some(quoted(bytes, prefix.len(), b'"'));
    }
    let start = usize::from(source.starts_with("b'"));
    if bytes.get(start) != Some(&b'\'') {
        return None;
    }
    let mut inner = source[start + 1..].chars();
    match (inner.next(), inner.next()) {
        (Some('\\'), _) | (Some(_), Some('\'')) => Some(quoted(bytes, start, b'\'')),
        _ => None,
    }
}

/// Where a text that begins with its quote at `start` has ended.
fn quoted(bytes: &[u8], start: usize, quote: u8) -> usize {
    let mut at = start + 1;
    while at < bytes.len() && bytes[at] != quote {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(bytes.len())
}

/// Every source with the module at the root that it belongs to.
fn sources(directory: &Path, floor: Option<&str>, found: &mut Vec<(String, String, String)>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let floor = floor.unwrap_or(&stem);
        if path.is_dir() {
            sources(&path, Some(floor), found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let source = fs::read_to_string(&path).unwrap();
            found.push((path.display().to_string(), floor.to_owned(), source));
        }
    }
}

#[test]
fn imports_go_down_only() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    sources(&root, None, &mut found);
    let floors: BTreeSet<_> = found.iter().map(|(_, floor, _)| floor.as_str()).collect();
    for (floor, _) in MAY_NAME {
        assert!(floors.contains(floor), "{floor} is gone: take it off the list");
    }
    let broken: Vec<_> = found
        .iter()
        .flat_map(|(path, floor, source)| {
            broken_rules(floor, source)
                .into_iter()
                .map(move |what| format!("{path}: {what}"))
        })
        .collect();
    assert_eq!(broken, [""; 0], "imports go down only, and each floor keeps its secret");
}

#[test]
fn what_breaks_the_rules_is_found() {
    for (floor, source, broken) in [
        ("service", "use crate::api::reply;", "service names api"),
        ("service", "use crate::{db::Db, api};", "service names api"),
        (
            "service",
            "use crate::{error::{Error, Result}, db, api::{serve, twirp}};",
            "service names api",
        ),
        (
            "db",
            "fn f() -> crate :: storage :: BlockStore { loop {} }",
            "db names storage",
        ),
        ("storage", "pub use crate::papers::*;", "storage names papers"),
        ("papers", "type X = crate::db::Db;", "papers names db"),
        ("api", "use crate::config::Config;", "api names config"),
        ("service", "use crate::config::{Config};", "service names config"),
        ("api", "use crate::app::App;", "api names app"),
        ("app", "use crate::cli::Cli;", "app names cli"),
        ("model", "use crate::clock::Clock;", "model names clock"),
        ("model", "use super::db::Db;", "model names db"),
        ("db", "use super::super::{api::reply, model};", "db names api"),
        ("service", "use axum::Router;", "service names axum"),
        ("service", "fn f(_: ::axum::Router) {}", "service names axum"),
        ("app", "fn f() { hyper::rt(); }", "app names hyper"),
        ("app", "use hyper_util as util;", "app names hyper_util"),
        ("service", "use sqlx;", "service names sqlx"),
        ("service", "use {bytes::Bytes, sqlx};", "service names sqlx"),
        ("service", "extern crate sqlx;", "service names sqlx"),
        ("api", "/* // */ sqlx::query(\"/*\"); /* */", "api names sqlx"),
        (
            "db",
            "let c = '\"'; object_store::path(); // \"",
            "db names object_store",
        ),
        ("db", "r#\"\"\"#; object_store::path();", "db names object_store"),
        ("ledger", "", "ledger is on no floor: give it one in tests/it/layers.rs"),
    ] {
        assert_eq!(broken_rules(floor, source), [broken], "{source}");
    }
}

#[test]
fn what_keeps_the_rules_is_not() {
    for (floor, source) in [
        (
            "service",
            "//! Called by crate::api, never sqlx::query.\nuse crate::{db, error::Result};",
        ),
        (
            "service",
            "/* use axum::Router; /* nested */ use sqlx; */ use crate::db::Db;",
        ),
        (
            "service",
            "let s = \"use axum::Router; \\\" sqlx::query\"; let r = r##\"axum::\"# sqlx::\"##;",
        ),
        ("service", "fn f<'axum>(x: &'axum str) { self.sqlx(); let c = '\\''; }"),
        ("service", "use crate::db::{Created, api_like, config};"),
        ("service", "use tower::axum::Thing; let sqlx = 1;"),
        ("config", "use crate::api::serve; use crate::{db, storage};"),
        ("cli", "use crate::config::Config; use crate::app;"),
        (
            "main",
            "use wharfinger::cli::{self, Cli}; use wharfinger::config::Config;",
        ),
        ("api", "use axum::Router; use crate::service::Services;"),
        ("db", "use sqlx::PgPool; use super::Db; use crate::model::BlobId;"),
    ] {
        assert_eq!(broken_rules(floor, source), [""; 0], "{source}");
    }
}
