//! Signed links: one URL opens one blob, to read or to write it, until it expires.
//!
//! ```text
//! <public_url>/blob/<kind>/<uuid>?sv=1&sp=w|r&se=<unix seconds>&sk=<key id>&sig=<43 characters base64url>
//! ```
//!
//! The form is our own: three path segments and unreserved characters only, because Azure's SDK takes the path apart
//! and encodes others anew; the parameter is called `sig`, because that one the clients keep out of their logs.
//! The SDK appends `comp`, `blockid` and `timeout`, which therefore are not signed; anything else is refused.
//!
//! Called by `Papers::sign_link` and `Papers::verify_link`. Never looks a blob up: whether the one that is named may
//! still be read or written is for the caller to find out, by the id in [`Link`] and by nothing else.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::Mac;
use uuid::Uuid;

use super::keys::{Key, KeyRing, LinkMac};
use crate::error::{Error, Result};
use crate::model::{BlobId, BlobKind};

const VERSION: &str = "1";
const PURPOSE: &str = "blob link";

/// What a link allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permission {
    /// GET and HEAD.
    Read,
    /// PUT.
    Write,
}

impl Permission {
    fn as_str(self) -> &'static str {
        match self {
            Self::Read => "r",
            Self::Write => "w",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::Read, Self::Write]
            .into_iter()
            .find(|permission| permission.as_str() == text)
    }
}

/// A query parameter that the client appends, outside the signature.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Param {
    #[default]
    Absent,
    Value(String),
    /// It stands there twice, or its percent-encoding can't be read. The link itself is good.
    Unreadable(&'static str),
}

impl Param {
    fn add(&mut self, value: Self) {
        *self = match self {
            Self::Absent => value,
            _ => Self::Unreadable("given twice"),
        };
    }
}

/// What a link says whose signature is ours and which has not expired.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub blob: BlobId,
    pub kind: BlobKind,
    pub permission: Permission,
    /// As it stands in the query.
    pub comp: Param,
    /// Percent-decoded; a `+` is a `+`.
    pub block_id: Param,
}

pub(super) fn sign(
    ring: &KeyRing,
    public_url: &str,
    kind: BlobKind,
    permission: Permission,
    blob: BlobId,
    expires_at_s: i64,
) -> String {
    let key = ring.active();
    let sig = URL_SAFE_NO_PAD.encode(mac(key, kind, permission, blob, expires_at_s).finalize().into_bytes());
    let (kind, permission, key_id) = (kind.as_str(), permission.as_str(), &key.id);
    format!("{public_url}/blob/{kind}/{blob}?sv={VERSION}&sp={permission}&se={expires_at_s}&sk={key_id}&sig={sig}")
}

pub(super) fn verify(ring: &KeyRing, kind: &str, uuid: &str, query: &str, now_ms: i64) -> Result<Link> {
    let forbidden = |why: &str| Error::Forbidden(format!("the link {why}"));
    let (link, expires_at_s, mac, sig) =
        read(ring, kind, uuid, query).ok_or_else(|| forbidden("is not one of ours"))?;
    mac.verify_slice(&sig).map_err(|_| forbidden("has a wrong signature"))?;
    if now_ms.div_euclid(1000) >= expires_at_s {
        return Err(forbidden("has expired"));
    }
    Ok(link)
}

/// Reads a link in its one canonical spelling, so that no two texts share a signature. `None` for any other.
fn read(ring: &KeyRing, kind: &str, uuid: &str, query: &str) -> Option<(Link, i64, LinkMac, Vec<u8>)> {
    let [mut sv, mut sp, mut se, mut sk, mut sig] = [None; 5];
    let (mut comp, mut block_id) = (Param::Absent, Param::Absent);
    for parameter in query.split('&') {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        let signed = match name {
            "sv" => &mut sv,
            "sp" => &mut sp,
            "se" => &mut se,
            "sk" => &mut sk,
            "sig" => &mut sig,
            "comp" => {
                comp.add(Param::Value(value.to_owned()));
                continue;
            }
            "blockid" => {
                block_id.add(percent_decode(value));
                continue;
            }
            "timeout" => continue,
            _ => return None,
        };
        if signed.replace(value).is_some() {
            return None;
        }
    }
    let blob = Uuid::try_parse(uuid)
        .ok()
        .filter(|blob| blob.hyphenated().to_string() == uuid)
        .map(BlobId)?;
    let expires_at_s: i64 = se?.parse().ok()?;
    if sv? != VERSION || expires_at_s < 0 || expires_at_s.to_string() != se? {
        return None;
    }
    let (kind, permission, key) = (BlobKind::parse(kind)?, Permission::parse(sp?)?, ring.find(sk?)?);
    let sig = URL_SAFE_NO_PAD.decode(sig?).ok()?;
    let mac = mac(key, kind, permission, blob, expires_at_s);
    Some((
        Link {
            blob,
            kind,
            permission,
            comp,
            block_id,
        },
        expires_at_s,
        mac,
        sig,
    ))
}

fn mac(key: &Key, kind: BlobKind, permission: Permission, blob: BlobId, expires_at_s: i64) -> LinkMac {
    let fields: [&[u8]; 7] = [
        VERSION.as_bytes(),
        PURPOSE.as_bytes(),
        permission.as_str().as_bytes(),
        kind.as_str().as_bytes(),
        blob.0.as_bytes(),
        &expires_at_s.to_be_bytes(),
        key.id.as_bytes(),
    ];
    key.link.clone().chain_update(bytes_to_sign(&fields))
}

/// Each field behind its length. A server that signed the bare concatenation could be made to take a link to one
/// artifact for a link to another, by moving digits over the border of two fields (CVE-2026-58426).
/// All fields are ours and short: a length always fits.
fn bytes_to_sign(fields: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for field in fields {
        bytes.extend_from_slice(&(field.len() as u32).to_be_bytes());
        bytes.extend_from_slice(field);
    }
    bytes
}

/// Decodes what `encodeURIComponent` wrote (RFC 3986 §2.1): a `+` stays one, a `%` needs two hex digits.
fn percent_decode(text: &str) -> Param {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let mut digit = || rest.next().and_then(|digit| char::from(digit).to_digit(16));
        bytes.push(match byte {
            b'%' => match digit().zip(digit()) {
                Some((high, low)) => (high * 16 + low) as u8,
                None => return Param::Unreadable("not percent-encoded"),
            },
            _ => byte,
        });
    }
    String::from_utf8(bytes).map_or(Param::Unreadable("not UTF-8"), Param::Value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::Papers;
    use super::super::secret::tests::root;
    use super::*;

    const NOW_S: i64 = 1_800_000_000;
    const NOW_MS: i64 = NOW_S * 1000;
    const ORIGIN: &str = "http://localhost:8080";

    fn papers() -> Papers {
        Papers::new(&[], &root(), "http://localhost:8080/").unwrap()
    }

    fn blob() -> BlobId {
        BlobId(Uuid::from_u128(0x0199_a0b1_c2d3_7e4f_8a5b_6c7d_8e9f_0a1b))
    }

    fn link(permission: Permission) -> String {
        papers().sign_link(BlobKind::Artifact, permission, blob(), NOW_S + 600)
    }

    /// Takes a URL apart as the router does.
    fn verify(url: &str) -> Result<Link> {
        let no_route = || Error::NotFound("no such route".into());
        let path = url
            .strip_prefix(ORIGIN)
            .and_then(|path| path.strip_prefix("/blob/"))
            .ok_or_else(no_route)?;
        let (path, query) = path.split_once('?').unwrap_or((path, ""));
        let (kind, uuid) = path.split_once('/').ok_or_else(no_route)?;
        papers().verify_link(kind, uuid, query, NOW_MS)
    }

    #[track_caller]
    fn forbidden(url: &str, why: &str) {
        match verify(url) {
            Err(Error::Forbidden(text)) => assert!(text.contains(why), "{url}: {text}"),
            other => panic!("{url}: {other:?}"),
        }
    }

    #[test]
    fn a_link_is_what_the_clients_need() {
        let url = link(Permission::Write);
        let (rest, sig) = url.split_once("&sig=").unwrap();
        let path = "/blob/art/0199a0b1-c2d3-7e4f-8a5b-6c7d8e9f0a1b";
        assert_eq!(rest, format!("{ORIGIN}{path}?sv=1&sp=w&se=1800000600&sk=1"));
        assert_eq!(sig.len(), 43);
        let expected = Link {
            blob: blob(),
            kind: BlobKind::Artifact,
            permission: Permission::Write,
            comp: Param::Absent,
            block_id: Param::Absent,
        };
        assert_eq!(verify(&url).unwrap(), expected);
        assert_eq!(
            verify(&link(Permission::Read)).unwrap(),
            Link {
                permission: Permission::Read,
                ..expected
            }
        );
    }

    /// Computed apart from this code, by Python's `hmac`. A change breaks live links during an upgrade.
    #[test]
    fn signatures_never_change() {
        assert!(
            link(Permission::Write).ends_with("&sig=YgHZ8FWp2keNRSXJm-eES53qjQ2kkTKo_LC0amvHyx8"),
            "{}",
            link(Permission::Write)
        );
    }

    #[test]
    fn what_the_sdk_appends_is_passed_on() {
        let url = link(Permission::Write);
        let params = |appended: &str| {
            verify(&format!("{url}{appended}"))
                .map(|link| (link.comp, link.block_id))
                .unwrap()
        };
        let value = |text: &str| Param::Value(text.to_owned());
        assert_eq!(
            params("&comp=block&blockid=YWJj%2BZ%2f%3D%3D"),
            (value("block"), value("YWJj+Z/=="))
        );
        assert_eq!(
            params("&comp=blocklist&timeout=30"),
            (value("blocklist"), Param::Absent)
        );
        assert_eq!(params("&blockid=a+b==&comp=a%20b"), (value("a%20b"), value("a+b==")));
        assert_eq!(params("&comp&blockid="), (value(""), value("")));
        let twice = Param::Unreadable("given twice");
        assert_eq!(params("&comp=block&comp=block"), (twice.clone(), Param::Absent));
        assert_eq!(
            params("&blockid=a&comp=block&blockid=b&blockid=c"),
            (value("block"), twice)
        );
        for (bad, why) in [
            ("%", "not percent-encoded"),
            ("%2", "not percent-encoded"),
            ("%+1", "not percent-encoded"),
        ] {
            assert_eq!(params(&format!("&blockid={bad}")).1, Param::Unreadable(why));
        }
        assert_eq!(params("&blockid=%ff").1, Param::Unreadable("not UTF-8"));
    }

    #[test]
    fn the_order_of_parameters_is_free() {
        let url = link(Permission::Read);
        let (path, query) = url.split_once('?').unwrap();
        let reversed: Vec<&str> = query.rsplit('&').collect();
        assert!(verify(&format!("{path}?{}", reversed.join("&"))).is_ok());
    }

    /// B060.
    #[test]
    fn no_link_without_its_signature() {
        let url = link(Permission::Write);
        let (rest, sig) = url.split_once("&sig=").unwrap();
        forbidden(rest, "not one of ours");
        for bad in [
            "&sig=",
            "&sig",
            &format!("&sig={}", &sig[..42]),
            &format!("&sig={sig}A"),
            &format!("&sig={sig}="),
            &format!("&sig={sig}%3D"),
            &format!("&SIG={sig}"),
            &format!("&%73ig={sig}"),
            &format!("&sig=%{:02X}{}", sig.as_bytes()[0], &sig[1..]),
            "&sig=not*base64!not*base64!not*base64!not*base64",
            &format!("&sig={}", "A".repeat(43)),
        ] {
            forbidden(&format!("{rest}{bad}"), "the link");
        }
        forbidden(&format!("{ORIGIN}/blob/art/{}", blob()), "not one of ours");
    }

    /// B061, B063, B066: each signed part altered.
    #[test]
    fn no_part_can_be_altered() {
        let url = link(Permission::Write);
        for (from, to) in [
            ("0a1b?", "0a1c?"),
            ("0199a0b1-", "0199A0B1-"),
            ("0199a0b1-", "0199a0b1"),
            ("/0199", "/{0199"),
            ("/art/", "/cache/"),
            ("/art/", "/ART/"),
            ("/art/", "//"),
            ("sv=1", "sv=2"),
            ("sv=1", "sv=01"),
            ("sv=1&", ""),
            ("sp=w", "sp=r"),
            ("sp=w", "sp=rw"),
            ("sp=w", "sp=W"),
            ("sp=w", "sp=%77"),
            ("sp=w&", ""),
            ("se=1800000600", "se=1800000601"),
            ("se=1800000600&", ""),
            ("sk=1", "sk=2"),
            ("sk=1", "sk=../../etc/passwd"),
            ("sk=1", "sk="),
            ("sk=1&", ""),
        ] {
            let altered = url.replacen(from, to, 1);
            assert_ne!(altered, url);
            forbidden(&altered, "the link");
        }
        let read = link(Permission::Read);
        let read_sig = read.split_once("&sig=").unwrap().1;
        forbidden(
            &format!("{}&sig={read_sig}", url.split_once("&sig=").unwrap().0),
            "signature",
        );
    }

    /// B062: the bytes of the whole stay, the borders move.
    #[test]
    fn digits_do_not_move_between_fields() {
        let url = link(Permission::Write);
        for (from, to) in [
            ("se=1800000600&sk=1", "se=18000006001&sk="),
            ("se=1800000600&sk=1", "se=180000060&sk=01"),
            ("sv=1&sp=w&se=1800000600", "sv=11&sp=w&se=800000600"),
            ("sv=1&sp=w", "sv=&sp=1w"),
            ("0a1b?sv=1", "0a1?sv=b1"),
        ] {
            let altered = url.replacen(from, to, 1);
            assert_ne!(altered, url);
            forbidden(&altered, "not one of ours");
        }
        // GHSA-hg5r: name `x-15` of task 48 and name `x-1` of task 548.
        assert_ne!(bytes_to_sign(&[b"x-15", b"48"]), bytes_to_sign(&[b"x-1", b"548"]));
        assert_ne!(bytes_to_sign(&[b"ab"]), bytes_to_sign(&[b"a", b"b"]));
        assert_ne!(bytes_to_sign(&[b"", b"a"]), bytes_to_sign(&[b"a", b""]));
    }

    /// B065.
    #[test]
    fn expiry() {
        let at = |expires_at_s| papers().sign_link(BlobKind::Artifact, Permission::Write, blob(), expires_at_s);
        assert!(verify(&at(NOW_S + 1)).is_ok());
        assert!(verify(&at(i64::MAX)).is_ok());
        forbidden(&at(NOW_S), "expired");
        forbidden(&at(NOW_S - 1), "expired");
        forbidden(&at(0), "expired");
        forbidden(&at(-1), "not one of ours");
        for se in [
            "99999999999999999999",
            "-1",
            "1e9",
            "",
            "+1800000600",
            "01800000600",
            "1800000600.0",
            " 1800000600",
            "1800000600%30",
            "9223372036854775808",
        ] {
            forbidden(
                &link(Permission::Write).replace("se=1800000600", &format!("se={se}")),
                "not one of ours",
            );
        }
        // A forged link is forged whether or not it has expired.
        forbidden(
            &link(Permission::Write).replace("se=1800000600", "se=1"),
            "wrong signature",
        );
    }

    /// B094, and a signed parameter given twice.
    #[test]
    fn nothing_else_is_let_in() {
        let url = link(Permission::Read);
        for extra in [
            "&rscd=attachment",
            "&rsct=text/html",
            "&response-content-disposition=inline",
            "&response-content-type=text%2Fhtml",
            "&Comp=block",
            "&restype=container",
            "&snapshot=1",
            "&",
            "&&comp=block",
            "&=",
            "&sp=r",
            "&sp=w",
            "&sv=1",
            "&sk=1",
            "&se=1800000600",
            "&sig=",
        ] {
            forbidden(&format!("{url}{extra}"), "not one of ours");
            let before = url.replacen('?', &format!("?{}&", &extra[1..]), 1);
            forbidden(&before, "not one of ours");
        }
    }

    #[test]
    fn another_servers_link_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let other = super::super::RootSecret::load_or_create(&directory.path().join("root")).unwrap();
        let other = Papers::new(&[], &other, ORIGIN).unwrap();
        forbidden(
            &other.sign_link(BlobKind::Artifact, Permission::Read, blob(), NOW_S + 600),
            "wrong signature",
        );
    }

    fn any_fields() -> impl Strategy<Value = Vec<Vec<u8>>> {
        // Few values and short fields, so that equal concatenations are common.
        prop::collection::vec(prop::collection::vec(0..3_u8, 0..4), 0..4)
    }

    proptest! {
        #[test]
        fn different_fields_never_give_the_same_bytes(one in any_fields(), other in any_fields()) {
            let bytes = |fields: &[Vec<u8>]| bytes_to_sign(&fields.iter().map(Vec::as_slice).collect::<Vec<_>>());
            prop_assert_eq!(bytes(&one) == bytes(&other), one == other);
        }

        #[test]
        fn what_was_signed_verifies(id: u128, write: bool, cache: bool, expires_at_s in NOW_S + 1..) {
            let (blob, permission) = (BlobId(Uuid::from_u128(id)), [Permission::Read, Permission::Write][usize::from(write)]);
            let kind = [BlobKind::Artifact, BlobKind::Cache][usize::from(cache)];
            let link = verify(&papers().sign_link(kind, permission, blob, expires_at_s)).unwrap();
            prop_assert_eq!((link.blob, link.kind, link.permission), (blob, kind, permission));
        }

        #[test]
        fn any_changed_character_is_refused(at in ORIGIN.len()..200_usize, new in "[ -~]|\\PC", change in 0..3) {
            let url = link(Permission::Write);
            let at = ORIGIN.len() + at % (url.len() - ORIGIN.len());
            let end = if change == 1 { at } else { at + 1 };
            let new = if change == 2 { "" } else { &new };
            let changed = format!("{}{new}{}", &url[..at], &url[end..]);
            prop_assert_eq!(verify(&changed).is_ok(), changed == url, "{}", changed);
        }

        #[test]
        fn percent_encoding_comes_back(text in "\\PC*") {
            let encoded: String = text.bytes().map(|byte| format!("%{byte:02x}")).collect();
            prop_assert_eq!(percent_decode(&encoded), Param::Value(text));
        }

        #[test]
        fn no_text_panics(kind in "\\PC*", uuid in "\\PC*", query in "((sv|sp|se|sk|sig|comp|blockid|x)?[=&%]?\\PC{0,3}){0,9}") {
            prop_assert!(papers().verify_link(&kind, &uuid, &query, NOW_MS).is_err());
        }
    }

    /// Every position, every printable ASCII character.
    #[test]
    fn no_single_character_can_be_replaced() {
        let url = link(Permission::Write);
        for at in ORIGIN.len()..url.len() {
            for new in ' '..='~' {
                let changed = format!("{}{new}{}", &url[..at], &url[at + 1..]);
                assert!(changed == url || verify(&changed).is_err(), "{changed}");
            }
        }
    }
}
