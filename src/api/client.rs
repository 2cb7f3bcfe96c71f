//! Which address a request came from, for its log line and for nothing else.
//!
//! Asked by `serve.rs` for each request. What a proxy says of its client counts only if the proxy is one that the
//! operator named; whatever else stands in these headers is anybody's claim.

use std::net::{IpAddr, SocketAddr};

use axum::http::HeaderMap;
use axum::http::header::FORWARDED;
use ipnet::IpNet;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

/// Where a request came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client(pub IpAddr);

impl Client {
    /// The peer; or, behind trusted proxies, the last address that the innermost of them was called from and that is
    /// not one of theirs.
    pub fn of(peer: IpAddr, headers: &HeaderMap, trusted_proxies: &[IpNet]) -> Self {
        let peer = peer.to_canonical();
        let is_trusted = |address: IpAddr| trusted_proxies.iter().any(|network| network.contains(&address));
        let mut client = peer;
        if is_trusted(peer) {
            // Behind what can't be read anybody may have written anything.
            for hop in hops(headers).into_iter().rev().map_while(address) {
                client = hop;
                if !is_trusted(hop) {
                    break;
                }
            }
        }
        Self(client)
    }
}

/// What proxies wrote down of those that called them, the last one last.
fn hops(headers: &HeaderMap) -> Vec<&str> {
    let lists = |name: &str| {
        let values = headers.get_all(name).iter();
        values.flat_map(|value| value.to_str().unwrap_or_default().split(','))
    };
    let hops: Vec<_> = lists("x-forwarded-for").collect();
    if !hops.is_empty() {
        return hops;
    }
    // Source: RFC 7239 §4.
    lists(FORWARDED.as_str())
        .map(|hop| hop.split(';').find_map(for_parameter).unwrap_or_default())
        .collect()
}

fn for_parameter(pair: &str) -> Option<&str> {
    let (name, value) = pair.split_once('=')?;
    name.trim()
        .eq_ignore_ascii_case("for")
        .then(|| value.trim().trim_matches('"'))
}

/// An address, with or without a port and the brackets that a port needs.
fn address(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    let bare = text
        .strip_prefix('[')
        .and_then(|text| text.strip_suffix(']'))
        .unwrap_or(text);
    let address = bare.parse().ok();
    let address = address.or_else(|| text.parse().ok().map(|address: SocketAddr| address.ip()));
    address.map(|address| address.to_canonical())
}

/// Reads addresses and networks, from a list or, in the environment, from a text with commas. For
/// `#[serde(deserialize_with)]`.
pub fn networks<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpNet>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        List(Vec<String>),
        Text(String),
    }
    let written = match Written::deserialize(deserializer)? {
        Written::List(list) => list,
        Written::Text(text) => text.split(',').map(str::to_owned).collect(),
    };
    let written = written.iter().map(|text| text.trim()).filter(|text| !text.is_empty());
    written
        .map(|text| {
            let address = || text.parse::<IpAddr>().map(IpNet::from);
            text.parse().or_else(|_| address()).map_err(|_| {
                D::Error::custom(format!(
                    "{text:?} is neither an address nor a network: write them as 10.0.0.7 or 10.0.0.0/8"
                ))
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(peer: &str, headers: &[(&'static str, &str)]) -> String {
        let headers = headers
            .iter()
            .map(|(name, value)| (axum::http::HeaderName::from_static(name), value.parse().unwrap()))
            .collect();
        let trusted = ["10.0.0.0/8", "::1/128"].map(|network| network.parse().unwrap());
        Client::of(peer.parse().unwrap(), &headers, &trusted).0.to_string()
    }

    #[test]
    fn who_is_not_trusted_is_who_called() {
        let claims = [("x-forwarded-for", "192.0.2.1"), ("forwarded", "for=192.0.2.1")];
        assert_eq!(client("203.0.113.5", &claims), "203.0.113.5");
        assert_eq!(client("::ffff:203.0.113.5", &claims), "203.0.113.5");
    }

    #[test]
    fn a_trusted_proxy_says_who_called_it() {
        for (header, is) in [
            ("192.0.2.1", "192.0.2.1"),
            ("198.51.100.9, 192.0.2.1", "192.0.2.1"),
            ("198.51.100.9, 192.0.2.1, 10.1.2.3", "192.0.2.1"),
            ("192.0.2.1:4711", "192.0.2.1"),
            ("[2001:db8::1]:4711", "2001:db8::1"),
            ("2001:db8::1", "2001:db8::1"),
            ("10.9.9.9", "10.9.9.9"),
            ("", "10.0.0.1"),
            ("unknown", "10.0.0.1"),
            ("192.0.2.1, <script>", "10.0.0.1"),
            ("192.0.2.1, garbage, 10.1.2.3", "10.1.2.3"),
        ] {
            assert_eq!(client("10.0.0.1", &[("x-forwarded-for", header)]), is, "{header}");
        }
        for (header, is) in [
            ("for=192.0.2.1", "192.0.2.1"),
            ("For=\"[2001:db8::1]:4711\";proto=https;by=10.0.0.1", "2001:db8::1"),
            ("for=198.51.100.9, proto=http;for=192.0.2.1, for=10.1.2.3", "192.0.2.1"),
            ("for=_hidden", "10.0.0.1"),
            ("proto=https", "10.0.0.1"),
        ] {
            assert_eq!(client("10.0.0.1", &[("forwarded", header)]), is, "{header}");
        }
        let twice = [("x-forwarded-for", "198.51.100.9"), ("x-forwarded-for", "192.0.2.1")];
        assert_eq!(client("::1", &twice), "192.0.2.1");
    }
}
