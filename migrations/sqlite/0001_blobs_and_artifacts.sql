-- Same tables and columns as migrations/postgres; times are milliseconds since the epoch.

CREATE TABLE properties (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT;

CREATE TABLE leases (
    name TEXT PRIMARY KEY,
    holder BLOB NOT NULL,
    expires_at_ms INTEGER NOT NULL
) STRICT;

CREATE TABLE blobs (
    id BLOB PRIMARY KEY,
    kind TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('staging', 'committed', 'sealed', 'deleting')),
    -- Why it is being deleted: superseded, deleted, expired, abandoned or mismatch.
    tombstone TEXT,
    -- Grows with every commit, so that Finalize seals the content that it hashed.
    revision INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL,
    content_type TEXT,
    sha256 BLOB,
    verification TEXT NOT NULL CHECK (verification IN ('none', 'pending', 'verified', 'failed')),
    verify_lease_until_ms INTEGER NOT NULL,
    created_at_ms INTEGER NOT NULL,
    -- When it entered its state or got new content.
    changed_at_ms INTEGER NOT NULL,
    -- Sealed: leftovers were swept. Deleting: its objects are gone.
    cleaned_at_ms INTEGER,
    -- When all its bytes were last read and found right; 0 for never.
    scrubbed_at_ms INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX blobs_unfinished ON blobs (created_at_ms) WHERE state IN ('staging', 'committed');
CREATE INDEX blobs_unswept ON blobs (changed_at_ms) WHERE state = 'sealed' AND cleaned_at_ms IS NULL;
CREATE INDEX blobs_to_scrub ON blobs (scrubbed_at_ms) WHERE state = 'sealed';
CREATE INDEX blobs_dead ON blobs (changed_at_ms) WHERE state = 'deleting';
CREATE INDEX blobs_unverified ON blobs (verify_lease_until_ms) WHERE verification = 'pending';

-- A row is a range of an object. Placed rows (start_offset set) are the blob's content.
CREATE TABLE blocks (
    blob_id BLOB NOT NULL REFERENCES blobs (id),
    block_id TEXT NOT NULL,
    object_key TEXT NOT NULL,
    object_offset INTEGER NOT NULL DEFAULT 0,
    size_bytes INTEGER NOT NULL,
    crc64 INTEGER NOT NULL,
    start_offset INTEGER
) STRICT;
CREATE UNIQUE INDEX blocks_staged ON blocks (blob_id, block_id) WHERE start_offset IS NULL;
CREATE INDEX blocks_placed ON blocks (blob_id, start_offset);
CREATE INDEX blocks_by_object ON blocks (object_key);

-- Objects that no row names any more, for the cleaner.
CREATE TABLE garbage (
    object_key TEXT PRIMARY KEY,
    blob_id BLOB NOT NULL,
    created_at_ms INTEGER NOT NULL
) STRICT;
CREATE INDEX garbage_by_age ON garbage (created_at_ms);
CREATE INDEX garbage_by_blob ON garbage (blob_id);

CREATE TABLE artifacts (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    issuer TEXT NOT NULL,
    repository TEXT NOT NULL,
    run_backend_id TEXT NOT NULL,
    name TEXT NOT NULL,
    run_attempt INTEGER NOT NULL,
    job_backend_id TEXT NOT NULL,
    -- For people and REST; not part of the key.
    repository_name TEXT,
    run_id INTEGER,
    version INTEGER NOT NULL,
    mime_type TEXT,
    -- Lost: finalized, and its bytes turned out missing or changed.
    state TEXT NOT NULL CHECK (state IN ('pending', 'finalized', 'lost')),
    blob_id BLOB NOT NULL REFERENCES blobs (id),
    created_at_ms INTEGER NOT NULL,
    finalized_at_ms INTEGER,
    expires_at_ms INTEGER NOT NULL,
    CONSTRAINT artifacts_key UNIQUE (issuer, repository, run_backend_id, name, run_attempt)
) STRICT;
CREATE INDEX artifacts_by_blob ON artifacts (blob_id);
CREATE INDEX artifacts_by_expiry ON artifacts (expires_at_ms) WHERE state <> 'pending';
CREATE INDEX artifacts_by_run ON artifacts (issuer, repository, run_backend_id, id);
