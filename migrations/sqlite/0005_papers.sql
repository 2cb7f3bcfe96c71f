-- Same tables and columns as migrations/postgres; times are milliseconds since the epoch.

-- Generations of the keys that sign links and minted tokens. The keys are derived from the root secret and the id.
CREATE TABLE signing_keys (
    id TEXT PRIMARY KEY,
    created_at_ms INTEGER NOT NULL,
    -- From then on it signs, until a newer one does: every replica knows it before.
    signs_from_ms INTEGER NOT NULL,
    -- From then on nothing that it signed counts.
    retired_at_ms INTEGER
) STRICT;
INSERT INTO signing_keys (id, created_at_ms, signs_from_ms) VALUES ('1', 0, 0);

-- API tokens of people and automation. Of the secret only a hash is kept.
CREATE TABLE api_tokens (
    id TEXT PRIMARY KEY,
    secret_sha256 BLOB NOT NULL,
    name TEXT NOT NULL,
    -- NULL: the repositories of every issuer.
    issuer TEXT,
    -- Each owner/name in lower case or id:<number>, divided by spaces. NULL: all.
    repositories TEXT,
    access TEXT NOT NULL CHECK (access IN ('read', 'write', 'admin')),
    created_at_ms INTEGER NOT NULL,
    expires_at_ms INTEGER NOT NULL,
    last_used_at_ms INTEGER,
    revoked_at_ms INTEGER
) STRICT;

-- Runs and jobs whose runtime tokens ended before their time. Kept as long as such a token could live.
CREATE TABLE closed_runs (
    -- Empty: of every issuer.
    issuer TEXT NOT NULL,
    repository TEXT NOT NULL,
    run TEXT NOT NULL,
    -- Empty: all jobs of the run.
    job TEXT NOT NULL,
    closed_at_ms INTEGER NOT NULL,
    ends_issued_until_ms INTEGER NOT NULL,
    PRIMARY KEY (issuer, repository, run, job)
) STRICT;
CREATE INDEX closed_runs_by_age ON closed_runs (closed_at_ms);
