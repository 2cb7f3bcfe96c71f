//! Runs and jobs whose runtime tokens ended before their time.
//!
//! Asked by `Papers::verify_token` for every token. Which there are is written in the database and handed in; they are
//! kept in memory, because every request asks.

use std::collections::HashMap;

use super::tokens;
use crate::model::{ClosedRun, Principal};

#[derive(Debug, Default)]
pub(super) struct ClosedRuns {
    /// By repository and run, as they were named.
    named: HashMap<(String, String), Vec<ClosedRun>>,
    known_until_ms: i64,
}

impl ClosedRuns {
    /// Takes in what was closed; what is known already is replaced.
    pub fn add(&mut self, closed: impl IntoIterator<Item = ClosedRun>) {
        for run in closed {
            self.known_until_ms = self.known_until_ms.max(run.closed_at_ms);
            let known = self.named.entry((run.repository.clone(), run.run.clone())).or_default();
            known.retain(|known| (&known.issuer, &known.job) != (&run.issuer, &run.job));
            known.push(run);
        }
    }

    /// Forgets what was closed before `since_ms`: no token is left that it could end.
    pub fn forget(&mut self, since_ms: i64) {
        self.named.retain(|_, closed| {
            closed.retain(|run| run.closed_at_ms >= since_ms);
            !closed.is_empty()
        });
    }

    /// When the last of them was closed.
    pub fn known_until_ms(&self) -> i64 {
        self.known_until_ms
    }

    /// Whether the token that `principal` stands for has ended. One that does not say when it was made has.
    pub fn include(&self, principal: &Principal) -> bool {
        if self.named.is_empty() {
            return false;
        }
        let run = &principal.run;
        let name = principal.repository_name.as_deref().map(tokens::repository_key);
        let repositories = [Some(&run.repository), name.as_ref()];
        let runs = [
            Some(run.run_backend_id.clone()),
            principal.run_id.map(|id| id.to_string()),
        ];
        let closed = repositories.into_iter().flatten().flat_map(|repository| {
            let at = runs.iter().flatten().map(|run| (repository.clone(), run.clone()));
            at.filter_map(|at| self.named.get(&at)).flatten()
        });
        closed.into_iter().any(|closed| {
            closed.issuer.as_ref().is_none_or(|issuer| *issuer == run.issuer)
                && closed.job.as_ref().is_none_or(|job| *job == principal.job_backend_id)
                && principal
                    .issued_at_ms
                    .is_none_or(|issued_at_ms| issued_at_ms <= closed.ends_issued_until_ms)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::RunKey;

    fn principal() -> Principal {
        Principal {
            run: RunKey {
                issuer: "forge".into(),
                repository: "id:5".into(),
                run_backend_id: "run-7".into(),
            },
            repository_name: Some("Octo/Demo".into()),
            run_id: Some(7),
            run_attempt: 1,
            job_backend_id: "build".into(),
            cache_scopes: Vec::new(),
            issued_at_ms: Some(1000),
            expires_at_ms: 9000,
        }
    }

    fn closed(repository: &str, run: &str) -> ClosedRun {
        ClosedRun {
            issuer: None,
            repository: repository.into(),
            run: run.into(),
            job: None,
            closed_at_ms: 1500,
            ends_issued_until_ms: 1500,
        }
    }

    fn ends(run: ClosedRun) -> bool {
        let mut runs = ClosedRuns::default();
        runs.add([run]);
        runs.include(&principal())
    }

    #[test]
    fn a_run_is_closed_by_any_of_its_names() {
        assert!(!ClosedRuns::default().include(&principal()));
        for repository in ["id:5", "name:octo/demo"] {
            for run in ["run-7", "7"] {
                assert!(ends(closed(repository, run)), "{repository} {run}");
            }
        }
        for (repository, run) in [
            ("id:6", "7"),
            ("name:octo/other", "7"),
            ("", "7"),
            ("id:5", "8"),
            ("id:5", "run-77"),
            ("id:5", ""),
        ] {
            assert!(!ends(closed(repository, run)), "{repository} {run}");
        }
    }

    #[test]
    fn issuer_job_and_time_count() {
        let one = || closed("id:5", "7");
        let of_issuer = |issuer: &str| ClosedRun {
            issuer: Some(issuer.into()),
            ..one()
        };
        assert!(ends(of_issuer("forge")) && !ends(of_issuer("gitea")));
        let of_job = |job: &str| ClosedRun {
            job: Some(job.into()),
            ..one()
        };
        assert!(ends(of_job("build")) && !ends(of_job("test")));
        let until = |ends_issued_until_ms| ClosedRun {
            ends_issued_until_ms,
            ..one()
        };
        assert!(ends(until(1000)) && !ends(until(999)));

        let mut runs = ClosedRuns::default();
        runs.add([until(999)]);
        let undated = Principal {
            issued_at_ms: None,
            ..principal()
        };
        assert!(runs.include(&undated) && !runs.include(&principal()));
        // Closed once more, later.
        runs.add([until(1000)]);
        assert!(runs.include(&principal()));
        runs.forget(1500);
        assert!(runs.include(&principal()));
        runs.forget(1501);
        assert!(!runs.include(&undated));
    }
}
