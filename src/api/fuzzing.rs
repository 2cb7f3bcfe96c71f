//! Ways to the parsers that are private to this floor, for the targets in `fuzz/`. In no build but theirs.

pub use super::block_list::parse as block_list;
pub use super::range::parse as range;

use super::artifacts_v4::{CreateArtifactRequest, FinalizeArtifactRequest, ListArtifactsRequest, NamedArtifactRequest};
use super::twirp;

/// Reads a body as each message that a request may be.
pub fn twirp_json(body: &[u8]) {
    drop(twirp::parse::<CreateArtifactRequest>(body));
    drop(twirp::parse::<FinalizeArtifactRequest>(body));
    drop(twirp::parse::<ListArtifactsRequest>(body));
    drop(twirp::parse::<NamedArtifactRequest>(body));
}
