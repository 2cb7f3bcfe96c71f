-- Same indexes as migrations/sqlite. By the name that people know a repository by: for REST, newest first.
CREATE INDEX artifacts_by_repository_name ON artifacts (lower(repository_name), id) WHERE state <> 'pending';
CREATE INDEX artifacts_by_run_number ON artifacts (lower(repository_name), run_id, id) WHERE state <> 'pending';
