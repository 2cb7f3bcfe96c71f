-- Same tables and columns as migrations/postgres; times are milliseconds since the epoch.

-- Repositories that have, or had, cache entries. What they hold is counted here, so that nobody need add it up.
CREATE TABLE cache_repositories (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    issuer TEXT NOT NULL,
    repository TEXT NOT NULL,
    -- The bytes of its entries that are not reserved.
    size_bytes INTEGER NOT NULL,
    CONSTRAINT cache_repositories_key UNIQUE (issuer, repository)
) STRICT;
CREATE INDEX cache_repositories_by_size ON cache_repositories (size_bytes);

CREATE TABLE cache_entries (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    repository_id INTEGER NOT NULL REFERENCES cache_repositories (id),
    -- Compared byte by byte: a prefix is a range of keys.
    scope TEXT NOT NULL,
    version TEXT NOT NULL,
    key TEXT NOT NULL,
    -- Lost: finalized, and its bytes turned out missing or changed.
    state TEXT NOT NULL CHECK (state IN ('reserved', 'finalized', 'lost')),
    blob_id BLOB NOT NULL REFERENCES blobs (id),
    -- 0 while it is reserved.
    size_bytes INTEGER NOT NULL,
    -- Whose it is until it is finalized; later for people.
    run_backend_id TEXT NOT NULL,
    job_backend_id TEXT NOT NULL,
    repository_name TEXT,
    created_at_ms INTEGER NOT NULL,
    finalized_at_ms INTEGER,
    last_used_at_ms INTEGER NOT NULL,
    CONSTRAINT cache_entries_key UNIQUE (repository_id, scope, version, key)
) STRICT;
CREATE INDEX cache_entries_by_blob ON cache_entries (blob_id);
CREATE INDEX cache_entries_reserved ON cache_entries (created_at_ms) WHERE state = 'reserved';
-- The condition on time always holds. Who asks for one repository's entries leaves it out, so that they are not looked
-- for in this index, among everybody's.
CREATE INDEX cache_entries_by_use ON cache_entries (last_used_at_ms) WHERE state <> 'reserved' AND last_used_at_ms >= 0;
CREATE INDEX cache_entries_by_repository_and_use ON cache_entries (repository_id, last_used_at_ms) WHERE state <> 'reserved';
