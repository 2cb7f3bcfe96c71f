-- Tombstones whose objects are still there, and emptied ones: each is looked for without reading the other.
DROP INDEX blobs_dead;
CREATE INDEX blobs_to_empty ON blobs (changed_at_ms) WHERE state = 'deleting' AND cleaned_at_ms IS NULL;
CREATE INDEX blobs_to_drop ON blobs (changed_at_ms) WHERE state = 'deleting' AND cleaned_at_ms IS NOT NULL;

-- From now on scrubbed_at_ms begins as the time of Finalize. What has 0 from before is read first.

-- artifacts_key leads to a run as well, and to a name in it without the rest of the run.
DROP INDEX artifacts_by_run;
