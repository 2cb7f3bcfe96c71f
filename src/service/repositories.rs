//! Repositories for people and automation: what they have, across runs, and what is deleted of it.
//!
//! Called by `api/rest.rs` and `cli/`. Never changes what a job sees in any other way than by deleting it.

use std::time::Duration;

use super::{Services, millis};
use crate::db::{Filter, NewestArtifact, Page, RepositoryArtifact, RepositoryRun, RunJob, Usage, View};
use crate::error::{Error, Result};
use crate::model::{ArtifactId, BlobKind};
use crate::papers::Permission;

/// How long a link lives that somebody is sent on to at once. Source: GitHub's REST API, "Download an artifact".
const REDIRECT_TTL: Duration = Duration::from_secs(60);
/// So many rows at a time are looked for to be deleted.
const BATCH: i64 = 500;

/// Rows of a list, and how many it has in all.
#[derive(Debug)]
pub struct Listed<T> {
    pub rows: Vec<T>,
    pub total: u64,
}

impl Services {
    /// The finalized artifacts of a repository, of all runs and attempts, the newest first.
    pub async fn repository_artifacts(
        &self,
        view: &View,
        filter: Filter<'_>,
        page: Page,
    ) -> Result<Listed<RepositoryArtifact>> {
        let now_ms = self.clock.now_ms();
        Ok(Listed {
            rows: self.db.repository_artifacts(view, filter, page, now_ms).await?,
            total: self.db.count_repository_artifacts(view, filter, now_ms).await?,
        })
    }

    /// # Errors
    /// [`Error::NotFound`].
    pub async fn repository_artifact(&self, view: &View, id: ArtifactId) -> Result<RepositoryArtifact> {
        let filter = Filter {
            id: Some(id),
            ..Filter::default()
        };
        let mut found = self
            .db
            .repository_artifacts(view, filter, Page::ALL, self.clock.now_ms())
            .await?;
        found.pop().ok_or_else(|| not_found("artifact"))
    }

    /// A link to an artifact's bytes for whoever is sent on to it at once.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn redirect_to_artifact(&self, view: &View, id: ArtifactId) -> Result<String> {
        let artifact = self.repository_artifact(view, id).await?;
        let link_ends_ms = self.clock.now_ms() + millis(REDIRECT_TTL);
        let papers = &self.papers;
        Ok(papers.sign_link(BlobKind::Artifact, Permission::Read, artifact.blob, link_ends_ms / 1000))
    }

    /// Deletes an artifact of any run; its links end at once.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn delete_repository_artifact(&self, view: &View, id: ArtifactId) -> Result<()> {
        let artifact = self.repository_artifact(view, id).await?;
        if self.bury_artifact(&artifact).await? {
            Ok(())
        } else {
            Err(not_found("artifact"))
        }
    }

    /// Deletes all artifacts that the filter takes. Returns how many.
    pub async fn delete_repository_artifacts(&self, view: &View, filter: Filter<'_>) -> Result<u64> {
        let mut deleted = 0;
        let first = Page {
            limit: BATCH,
            offset: 0,
        };
        loop {
            let found = self
                .db
                .repository_artifacts(view, filter, first, self.clock.now_ms())
                .await?;
            if found.is_empty() {
                return Ok(deleted);
            }
            for artifact in &found {
                deleted += u64::from(self.bury_artifact(artifact).await?);
            }
        }
    }

    async fn bury_artifact(&self, artifact: &RepositoryArtifact) -> Result<bool> {
        let (id, blob) = (artifact.id, artifact.blob);
        self.db
            .delete_artifact(&NewestArtifact { id, blob }, self.clock.now_ms())
            .await
    }

    /// The runs of a repository that have artifacts, the newest first.
    pub async fn repository_runs(&self, view: &View, page: Page) -> Result<Listed<RepositoryRun>> {
        let (filter, now_ms) = (Filter::default(), self.clock.now_ms());
        Ok(Listed {
            rows: self.db.repository_runs(view, filter, page, now_ms).await?,
            total: self.db.count_repository_runs(view, filter, now_ms).await?,
        })
    }

    /// The run that a filter takes.
    ///
    /// # Errors
    /// [`Error::NotFound`] if it has no artifacts.
    pub async fn repository_run(&self, view: &View, filter: Filter<'_>) -> Result<RepositoryRun> {
        let now_ms = self.clock.now_ms();
        let mut found = self.db.repository_runs(view, filter, Page::ALL, now_ms).await?;
        found.pop().ok_or_else(|| not_found("run"))
    }

    /// The jobs of the run that a filter takes, as far as they have artifacts.
    pub async fn run_jobs(&self, view: &View, filter: Filter<'_>) -> Result<Vec<RunJob>> {
        self.db.run_jobs(view, filter, self.clock.now_ms()).await
    }

    /// What one repository takes, by each issuer and key that it is kept under.
    pub async fn repository_usage(&self, view: &View) -> Result<Vec<Usage>> {
        self.db.repository_usage(view, self.clock.now_ms()).await
    }

    /// What each repository takes, the largest first.
    pub async fn usage(&self) -> Result<Vec<Usage>> {
        self.db.usage(self.clock.now_ms()).await
    }
}

fn not_found(what: &str) -> Error {
    Error::NotFound(format!("there is no such {what}"))
}
