-- Same tables and columns as migrations/sqlite; times are milliseconds since the epoch.

-- What jobs upload through version 3 of the artifact protocol. A container is a blob of kind 'container' whose blocks
-- are never placed: they are the chunks of its files. It lives as long as its artifact. Publishing makes another blob
-- of ranges of the same objects, a zip, which is what the artifact shows; the container is 'committed' from then on.
CREATE TABLE containers (
    blob_id UUID PRIMARY KEY REFERENCES blobs (id),
    -- Rows in files.
    file_count BIGINT NOT NULL,
    -- The lengths of all files that were ever complete, also of those that others replaced since.
    received_bytes BIGINT NOT NULL,
    -- How often a complete file was replaced.
    replaced_count BIGINT NOT NULL,
    -- The blob's revision up to which files are in the zip; NULL before there is one.
    published_revision BIGINT,
    -- The lengths of the files in the zip.
    published_bytes BIGINT NOT NULL
);

CREATE TABLE files (
    id UUID PRIMARY KEY,
    container_id UUID NOT NULL REFERENCES containers (blob_id),
    -- Below the artifact, `/` between its parts. Ordered byte by byte.
    path TEXT COLLATE "C" NOT NULL,
    -- The job that is sending it; empty once it is complete.
    uploader TEXT NOT NULL,
    encoding TEXT NOT NULL CHECK (encoding IN ('identity', 'gzip')),
    -- What it is when it is unpacked, as its client says.
    length_bytes BIGINT NOT NULL,
    -- What is stored when it is complete, and what came so far.
    total_bytes BIGINT NOT NULL,
    received_bytes BIGINT NOT NULL,
    chunk_count BIGINT NOT NULL,
    -- Of gzip: how long its header is; NULL if it has none that can be read.
    header_bytes BIGINT,
    -- The container's revision that completed it.
    revision BIGINT,
    completed_at_ms BIGINT,
    CONSTRAINT files_key UNIQUE (container_id, path, uploader)
);

-- What a chunk is besides a block of its container.
CREATE TABLE chunks (
    file_id UUID NOT NULL REFERENCES files (id) ON DELETE CASCADE,
    file_offset BIGINT NOT NULL,
    block_id TEXT NOT NULL,
    crc32 BIGINT NOT NULL,
    -- Its last bytes, at most 8, and the CRC-64 of what is before them; both without a gzip header.
    tail BYTEA NOT NULL,
    core_crc64 BIGINT NOT NULL,
    PRIMARY KEY (file_id, file_offset)
);

ALTER TABLE artifacts ADD COLUMN container_id UUID REFERENCES containers (blob_id);
CREATE INDEX artifacts_by_container ON artifacts (container_id) WHERE container_id IS NOT NULL;

-- A published container is no unfinished upload.
DROP INDEX blobs_unfinished;
CREATE INDEX blobs_unfinished ON blobs (created_at_ms)
    WHERE state = 'staging' OR (state = 'committed' AND kind <> 'container');

-- Published containers whose leftovers were not swept since: their chunks go on coming.
CREATE INDEX blobs_unswept_containers ON blobs (changed_at_ms)
    WHERE kind = 'container' AND state = 'committed' AND cleaned_at_ms IS NULL;
