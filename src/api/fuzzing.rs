//! Ways to the parsers that are private to this floor, for the targets in `fuzz/`. In no build but theirs.

pub use super::block_list::parse as block_list;
pub use super::content_range::parse as content_range;
pub use super::range::parse as range;

use std::net::IpAddr;

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use ipnet::IpNet;

use super::artifacts_v4::{CreateArtifactRequest, FinalizeArtifactRequest, ListArtifactsRequest, NamedArtifactRequest};
use super::cache_v2::{CreateCacheEntryRequest, FinalizeCacheEntryUploadRequest, GetCacheEntryDownloadUrlRequest};
use super::client::Client;
use super::{item_path, twirp};

/// Who called, as far as the peer may be believed.
pub fn client(peer: IpAddr, header: &'static str, value: &str, trusted_proxies: &[IpNet]) -> IpAddr {
    let value = HeaderValue::from_str(value).into_iter();
    let headers: HeaderMap = value.map(|value| (HeaderName::from_static(header), value)).collect();
    Client::of(peer, &headers, trusted_proxies).0
}

/// Reads a query's `itemPath`: the artifact, and what is below it.
pub fn item_path(query: &str) -> Option<(String, String)> {
    let path = item_path::form_value(query, "itemPath").ok()??;
    item_path::parse(&path).ok().map(|path| (path.artifact, path.below))
}

/// Reads a body as each message that a request may be.
pub fn twirp_json(body: &[u8]) {
    drop(twirp::parse::<CreateArtifactRequest>(body));
    drop(twirp::parse::<FinalizeArtifactRequest>(body));
    drop(twirp::parse::<ListArtifactsRequest>(body));
    drop(twirp::parse::<NamedArtifactRequest>(body));
    drop(twirp::parse::<CreateCacheEntryRequest>(body));
    drop(twirp::parse::<FinalizeCacheEntryUploadRequest>(body));
    drop(twirp::parse::<GetCacheEntryDownloadUrlRequest>(body));
}

/// Reads a body as each message that a request may be in protobuf; what could be read must survive being written.
pub fn twirp_protobuf(body: &[u8]) {
    fn read_and_write<T: prost::Message + Default + PartialEq + std::fmt::Debug>(body: &[u8]) {
        if let Ok(message) = T::decode(body) {
            assert_eq!(T::decode(message.encode_to_vec().as_slice()), Ok(message));
        }
    }
    read_and_write::<CreateCacheEntryRequest>(body);
    read_and_write::<FinalizeCacheEntryUploadRequest>(body);
    read_and_write::<GetCacheEntryDownloadUrlRequest>(body);
}
