//! `itemPath`: where a file is within a container, as clients of version 3 write it.
//!
//! Called by `api/artifacts_v3.rs`. Only reads and checks text; nothing on a disk is ever named by it.

use percent_encoding::percent_decode_str;

use crate::error::{Error, Result};
use crate::service::artifacts::check_name;

/// The longest path, in bytes of UTF-8, and how many parts it may have.
pub const MAX_BYTES: usize = 2048;
pub const MAX_PARTS: usize = 128;

/// A path of at least one part. Every part is a name that [`check_name`] accepts, so it leads nowhere but down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ItemPath {
    /// The first part: the artifact's name.
    pub artifact: String,
    /// The rest, `/` between its parts; empty if there is none.
    pub below: String,
}

/// Reads a path. Clients on Windows write `\` between its parts.
///
/// # Errors
/// [`Error::Invalid`].
pub fn parse(text: &str) -> Result<ItemPath> {
    let invalid = |reason: String| Error::Invalid(format!("itemPath is not valid: {reason}"));
    if text.len() > MAX_BYTES {
        return Err(invalid(format!("it has more than {MAX_BYTES} bytes")));
    }
    let path = text.replace('\\', "/");
    let parts = path.split('/');
    if parts.clone().count() > MAX_PARTS {
        return Err(invalid(format!("it has more than {MAX_PARTS} parts")));
    }
    for part in parts {
        // Names of files must not hold what names of artifacts must not.
        check_name(part).map_err(|_| invalid(format!("a part of it is not a name: {}", part.escape_debug())))?;
    }
    let (artifact, below) = path.split_once('/').unwrap_or((&path, ""));
    Ok(ItemPath {
        artifact: artifact.to_owned(),
        below: below.to_owned(),
    })
}

/// The value of a parameter of a form-encoded query, where a `+` is a space. `None` if it is not there.
///
/// # Errors
/// [`Error::Invalid`] if it is there twice or is not UTF-8.
pub fn form_value(query: &str, name: &str) -> Result<Option<String>> {
    let mut values = query.split('&').filter_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (key == name).then_some(value)
    });
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(Error::Invalid(format!("{name} is there twice")));
    }
    let spaced = value.replace('+', " ");
    match percent_decode_str(&spaced).decode_utf8() {
        Ok(value) => Ok(Some(value.into_owned())),
        Err(_) => Err(Error::Invalid(format!("{name} is not UTF-8"))),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(query: &str) -> Result<ItemPath> {
        parse(&form_value(query, "itemPath")?.unwrap_or_default())
    }

    #[test]
    fn paths_as_clients_write_them() {
        for (query, artifact, below) in [
            (
                "itemPath=small+art%2Fsub%2Fcompress.txt",
                "small art",
                "sub/compress.txt",
            ),
            ("itemPath=v3-u321%5Csub%5Cf.txt&api-version=6.0", "v3-u321", "sub/f.txt"),
            ("a=b&itemPath=big", "big", ""),
            ("itemPath=a%2B1%2F100%25+%C3%BC.txt", "a+1", "100% ü.txt"),
            // Decoded once only.
            ("itemPath=a%2F%252e%252e", "a", "%2e%2e"),
            ("itemPath=a%2F..hidden%2F...", "a", "..hidden/..."),
        ] {
            let expected = ItemPath {
                artifact: artifact.to_owned(),
                below: below.to_owned(),
            };
            assert_eq!(read(query).unwrap(), expected, "{query}");
        }
    }

    #[test]
    fn paths_that_harm() {
        let long = format!("itemPath=a%2F{}", "b".repeat(MAX_BYTES));
        let deep = format!("itemPath=a{}", "%2Fb".repeat(MAX_PARTS));
        for query in [
            "",
            "itemPath=",
            "itemPath=..%2F..%2Fx",
            "itemPath=%2Fetc%2Fpasswd",
            "itemPath=a%2F..%2F..%2Fb",
            "itemPath=a%5C..%5Cb",
            "itemPath=%2e%2e%2F",
            "itemPath=a%2F.%2Fb",
            "itemPath=a%2F%2Fb",
            "itemPath=a%2Fb%2F",
            "itemPath=a%2Fb%00c",
            "itemPath=C%3Ax",
            "itemPath=a%2FC%3Ax",
            "itemPath=%5C%5C%3F%5C",
            "itemPath=a%2Fb%0Ac",
            "itemPath=a%2F%FF",
            "itemPath=a%2Fb&itemPath=a%2Fc",
            &long,
            &deep,
        ] {
            assert!(matches!(read(query), Err(Error::Invalid(_))), "{query}");
        }
    }

    proptest! {
        #[test]
        fn what_is_accepted_leads_down(text in "[a.%/\\\\ +:C\\x00-\\x20ü]{0,20}") {
            if let Ok(path) = parse(&text) {
                let whole = format!("{}/{}", path.artifact, path.below);
                for part in whole.trim_end_matches('/').split('/') {
                    prop_assert!(!matches!(part, "" | "." | ".."));
                    prop_assert!(!part.contains(['\\', ':', '\0']));
                }
                prop_assert_eq!(parse(&whole.trim_end_matches('/').replace('/', "\\")).unwrap(), path);
            }
        }

        #[test]
        fn no_query_panics(query in "(itemPath|x)?[=&%+]?\\PC{0,9}(&itemPath=%\\PC{0,3})?") {
            let _ = read(&query);
        }
    }
}
