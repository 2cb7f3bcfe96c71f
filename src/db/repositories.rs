//! What a repository has, across its runs: for people and automation, by the name that they know it by.
//!
//! Called by `service/repositories.rs`. Every look-up carries a [`View`], so that what an API token does not see is as
//! what does not exist.

use uuid::Uuid;

use super::blobs::digest;
use super::sql::{ALL_OF_A_TABLE, query};
use super::{Db, on, unsigned};
use crate::error::Result;
use crate::model::{ApiToken, ArtifactId, BlobId, Repositories, Sha256};

/// A repository as one API token sees it.
#[derive(Clone, Debug)]
pub struct View {
    /// `owner/name`, lower case.
    name: String,
    /// `None`: of every issuer.
    issuer: Option<String>,
    /// The keys under which it may be kept, each between spaces. `None`: whichever.
    keys: Option<String>,
}

impl View {
    /// `name`: `owner/name`.
    pub fn new(token: &ApiToken, name: &str) -> Self {
        let key = |listed: &String| match listed.strip_prefix("id:") {
            Some(_) => listed.clone(),
            None => format!("name:{listed}"),
        };
        Self {
            name: name.to_ascii_lowercase(),
            issuer: token.issuer.clone(),
            keys: match &token.repositories {
                Repositories::All => None,
                Repositories::Some(listed) => {
                    Some(format!(" {} ", listed.iter().map(key).collect::<Vec<_>>().join(" ")))
                }
            },
        }
    }
}

impl View {
    /// All that goes by a name, for who may see everything.
    pub fn of_operator(name: &str, issuer: Option<String>) -> Self {
        Self {
            name: name.to_ascii_lowercase(),
            issuer,
            keys: None,
        }
    }
}

/// An artifact as REST shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepositoryArtifact {
    pub id: ArtifactId,
    pub blob: BlobId,
    pub name: String,
    pub size_bytes: u64,
    pub sha256: Option<Sha256>,
    /// The run's number, if its tokens said it.
    pub run_id: Option<i64>,
    pub run_attempt: i32,
    pub created_at_ms: i64,
    pub finalized_at_ms: i64,
    pub expires_at_ms: i64,
}

/// Which of them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Filter<'a> {
    pub id: Option<ArtifactId>,
    pub run_id: Option<i64>,
    pub name: Option<&'a str>,
}

/// A run of a repository, as far as its artifacts tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepositoryRun {
    pub id: i64,
    /// The newest that made an artifact.
    pub attempt: i32,
    /// When its first artifact was begun.
    pub created_at_ms: i64,
    /// When its last one was finalized.
    pub updated_at_ms: i64,
}

/// A job of a run, as far as its artifacts tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunJob {
    pub backend_id: String,
    pub attempt: i32,
    pub created_at_ms: i64,
    pub updated_at_ms: i64,
}

/// What a repository takes, in bytes as its users count them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    pub issuer: String,
    pub repository: String,
    /// The name that it had last; a key of names is one itself.
    pub name: Option<String>,
    pub artifacts: u64,
    pub artifact_bytes: u64,
    pub cache_entries: u64,
    pub cache_bytes: u64,
}

type ArtifactRow = (i64, Uuid, String, i64, Option<Vec<u8>>, Option<i64>, i32, i64, i64, i64);
type UsageRow = (String, String, Option<String>, i64, i64, i64, i64);

/// What a view shows of the artifacts, narrowed by one more condition on $6. A text for each condition, so that each is
/// planned for itself. The keys are compared as words of a text, because the two databases have no lists in common.
macro_rules! shown {
    ($columns:literal, $condition:literal, $rest:literal) => {
        concat!(
            "SELECT ",
            $columns,
            " FROM artifacts a JOIN blobs b ON b.id = a.blob_id
             WHERE lower(a.repository_name) = $1 AND (CAST($2 AS TEXT) IS NULL OR a.issuer = $2)
                 AND (CAST($3 AS TEXT) IS NULL OR replace($3, ' ' || a.repository || ' ', '') <> $3)
                 AND a.state = 'finalized' AND a.state <> 'pending' AND a.expires_at_ms > $4
                 AND (CAST($5 AS TEXT) IS NULL OR a.name = $5) ",
            $condition,
            $rest
        )
    };
}

/// The text for a filter.
macro_rules! filtered {
    ($filter:expr, $columns:literal, $rest:literal) => {
        match $filter {
            Filter { id: Some(_), .. } => shown!($columns, "AND a.id = $6", $rest),
            Filter { run_id: Some(_), .. } => shown!($columns, "AND a.run_id = $6", $rest),
            // Nothing is 0, so that every text takes the same.
            Filter { .. } => shown!($columns, "AND a.id <> $6", $rest),
        }
    };
}

/// Binds what every one of these texts takes.
macro_rules! bound {
    ($text:expr, $view:expr, $filter:expr, $now_ms:expr) => {
        query($text)
            .bind(&$view.name)
            .bind(&$view.issuer)
            .bind(&$view.keys)
            .bind($now_ms)
            .bind($filter.name)
            .bind($filter.id.map(|id| id.0).or($filter.run_id).unwrap_or(0))
            .rows(ALL_OF_A_TABLE)
    };
}

/// What repositories take, narrowed by more conditions on their artifacts and on their cache entries.
macro_rules! used {
    ($artifacts:literal, $entries:literal) => {
        concat!(
            "SELECT issuer, repository, max(name), CAST(sum(artifacts) AS BIGINT), CAST(sum(artifact_bytes) AS BIGINT),
                 CAST(sum(entries) AS BIGINT), CAST(sum(entry_bytes) AS BIGINT)
             FROM (
                 SELECT a.issuer, a.repository, a.repository_name AS name, 1 AS artifacts,
                     b.size_bytes AS artifact_bytes, 0 AS entries, 0 AS entry_bytes
                 FROM artifacts a JOIN blobs b ON b.id = a.blob_id
                 WHERE a.state = 'finalized' AND a.expires_at_ms > $1 ",
            $artifacts,
            " UNION ALL
                 SELECT r.issuer, r.repository, e.repository_name, 0, 0, 1, e.size_bytes
                 FROM cache_entries e JOIN cache_repositories r ON r.id = e.repository_id
                 WHERE e.state = 'finalized' ",
            $entries,
            ") used
             GROUP BY issuer, repository
             ORDER BY sum(artifact_bytes) + sum(entry_bytes) DESC, issuer, repository"
        )
    };
}

/// Which rows of a long list, in its order.
#[derive(Clone, Copy, Debug)]
pub struct Page {
    pub limit: i64,
    pub offset: i64,
}

impl Page {
    pub const ALL: Self = Self {
        limit: i64::MAX,
        offset: 0,
    };
}

impl Db {
    /// The finalized artifacts of a repository that live at `now_ms`, of all attempts, the newest first.
    pub async fn repository_artifacts(
        &self,
        view: &View,
        filter: Filter<'_>,
        page: Page,
        now_ms: i64,
    ) -> Result<Vec<RepositoryArtifact>> {
        let text = filtered!(
            filter,
            "a.id, a.blob_id, a.name, b.size_bytes, b.sha256, a.run_id, a.run_attempt, a.created_at_ms,
             coalesce(a.finalized_at_ms, a.created_at_ms), a.expires_at_ms",
            " ORDER BY a.id DESC LIMIT $7 OFFSET $8"
        );
        let rows: Vec<ArtifactRow> = on!(self, Reading, |conn| {
            bound!(text, view, filter, now_ms)
                .bind(page.limit)
                .bind(page.offset)
                .fetch_all(conn)
                .await?
        });
        let read = |row: ArtifactRow| {
            let (id, blob, name, size, sha256, run_id, run_attempt, created_at_ms, finalized_at_ms, expires_at_ms) =
                row;
            Ok(RepositoryArtifact {
                id: ArtifactId(id),
                blob: BlobId(blob),
                name,
                size_bytes: unsigned(size)?,
                sha256: digest(sha256)?,
                run_id,
                run_attempt,
                created_at_ms,
                finalized_at_ms,
                expires_at_ms,
            })
        };
        rows.into_iter().map(read).collect()
    }

    /// How many there are.
    pub async fn count_repository_artifacts(&self, view: &View, filter: Filter<'_>, now_ms: i64) -> Result<u64> {
        let text = filtered!(filter, "count(*)", "");
        let (count,): (i64,) = on!(self, Reading, |conn| {
            bound!(text, view, filter, now_ms).fetch_one(conn).await?
        });
        unsigned(count)
    }

    /// The runs of a repository that have artifacts, the newest first; with `filter.run_id` that one.
    pub async fn repository_runs(
        &self,
        view: &View,
        filter: Filter<'_>,
        page: Page,
        now_ms: i64,
    ) -> Result<Vec<RepositoryRun>> {
        let text = filtered!(
            filter,
            "a.run_id, max(a.run_attempt), min(a.created_at_ms), max(coalesce(a.finalized_at_ms, a.created_at_ms))",
            " AND a.run_id IS NOT NULL GROUP BY a.run_id ORDER BY a.run_id DESC LIMIT $7 OFFSET $8"
        );
        let rows: Vec<(i64, i32, i64, i64)> = on!(self, Reading, |conn| {
            bound!(text, view, filter, now_ms)
                .bind(page.limit)
                .bind(page.offset)
                .fetch_all(conn)
                .await?
        });
        let read = |(id, attempt, created_at_ms, updated_at_ms)| RepositoryRun {
            id,
            attempt,
            created_at_ms,
            updated_at_ms,
        };
        Ok(rows.into_iter().map(read).collect())
    }

    /// How many there are.
    pub async fn count_repository_runs(&self, view: &View, filter: Filter<'_>, now_ms: i64) -> Result<u64> {
        let text = filtered!(filter, "count(DISTINCT a.run_id)", "");
        let (count,): (i64,) = on!(self, Reading, |conn| {
            bound!(text, view, filter, now_ms).fetch_one(conn).await?
        });
        unsigned(count)
    }

    /// The jobs of the runs that a filter takes.
    pub async fn run_jobs(&self, view: &View, filter: Filter<'_>, now_ms: i64) -> Result<Vec<RunJob>> {
        let text = filtered!(
            filter,
            "a.job_backend_id, a.run_attempt, min(a.created_at_ms), max(coalesce(a.finalized_at_ms, a.created_at_ms))",
            " GROUP BY a.job_backend_id, a.run_attempt ORDER BY 3, 1, 2"
        );
        let rows: Vec<(String, i32, i64, i64)> = on!(self, Reading, |conn| {
            bound!(text, view, filter, now_ms).fetch_all(conn).await?
        });
        let read = |(backend_id, attempt, created_at_ms, updated_at_ms)| RunJob {
            backend_id,
            attempt,
            created_at_ms,
            updated_at_ms,
        };
        Ok(rows.into_iter().map(read).collect())
    }

    /// What each repository takes, the largest first. Reads every artifact's row.
    pub async fn usage(&self, now_ms: i64) -> Result<Vec<Usage>> {
        let rows: Vec<UsageRow> = on!(self, Reading, |conn| {
            query(used!("", ""))
                .bind(now_ms)
                .rows(ALL_OF_A_TABLE)
                .fetch_all(conn)
                .await?
        });
        rows.into_iter().map(usage).collect()
    }

    /// The same for one repository, by each issuer and key that it is kept under.
    pub async fn repository_usage(&self, view: &View, now_ms: i64) -> Result<Vec<Usage>> {
        let rows: Vec<UsageRow> = on!(self, Reading, |conn| {
            query(used!(
                "AND lower(a.repository_name) = $2 AND a.state <> 'pending'
                     AND (CAST($3 AS TEXT) IS NULL OR a.issuer = $3)
                     AND (CAST($4 AS TEXT) IS NULL OR replace($4, ' ' || a.repository || ' ', '') <> $4)",
                // Names of cache entries have no index; those of the repositories' keys do.
                "AND lower(e.repository_name) = $2 AND (r.repository = 'name:' || $2 OR r.repository IN (
                         SELECT repository FROM artifacts WHERE lower(repository_name) = $2 AND state <> 'pending'))
                     AND (CAST($3 AS TEXT) IS NULL OR r.issuer = $3)
                     AND (CAST($4 AS TEXT) IS NULL OR replace($4, ' ' || r.repository || ' ', '') <> $4)"
            ))
            .bind(now_ms)
            .bind(&view.name)
            .bind(&view.issuer)
            .bind(&view.keys)
            .rows(ALL_OF_A_TABLE)
            .fetch_all(conn)
            .await?
        });
        rows.into_iter().map(usage).collect()
    }
}

fn usage(row: UsageRow) -> Result<Usage> {
    let (issuer, repository, name, artifacts, artifact_bytes, cache_entries, cache_bytes) = row;
    Ok(Usage {
        issuer,
        repository,
        name,
        artifacts: unsigned(artifacts)?,
        artifact_bytes: unsigned(artifact_bytes)?,
        cache_entries: unsigned(cache_entries)?,
        cache_bytes: unsigned(cache_bytes)?,
    })
}
