//! The XML body of Put Block List.
//!
//! Called by `api/blobs.rs`. Source: Azure's Put Block List; what the JavaScript and Go SDKs send. Accepts nothing
//! else: no attributes worth the name, no text between elements, no document type.

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

use super::blobs::canonical_block_id;
use super::reply::AzureError;
use crate::db::{ListEntry, ListSource};

const MAX_BLOCKS: usize = 50_000;
/// Room for a namespace on the root; keeps the parser's work on attributes nil.
const MAX_TAG_BYTES: usize = 1024;

fn invalid(message: &str) -> AzureError {
    AzureError::bad_request("InvalidXmlDocument", message)
}

/// The blocks that a list names, in its order.
pub fn parse(body: &[u8]) -> Result<Vec<ListEntry>, AzureError> {
    let text = std::str::from_utf8(body).map_err(|_| invalid("the block list is not UTF-8"))?;
    let mut reader = Reader::from_str(text.trim_start_matches('\u{feff}'));
    let mut list = Vec::new();
    let mut state = State::Before;
    loop {
        let event = reader.read_event().map_err(|_| invalid("the block list is not XML"))?;
        state = match (state, event) {
            (State::Before, Event::Decl(_)) if list.is_empty() => State::Before,
            (State::Before, Event::Start(tag)) if name(&tag)? == "BlockList" => State::Inside,
            (State::Before, Event::Empty(tag)) if name(&tag)? == "BlockList" => State::After,
            (State::Inside, Event::Start(tag)) => State::Id(source(&tag)?, String::new()),
            (State::Inside, Event::End(_)) => State::After,
            (State::Id(from, mut id), Event::Text(text)) => {
                id.push_str(text.trim());
                State::Id(from, id)
            }
            (State::Id(from, id), Event::End(_)) => {
                if list.len() == MAX_BLOCKS {
                    let message = format!("a block list may have at most {MAX_BLOCKS} blocks");
                    return Err(AzureError::bad_request("BlockListTooLong", message));
                }
                let block_id = canonical_block_id(&id)
                    .map_err(|_| AzureError::bad_request("InvalidBlockId", "a block id is not base64"))?;
                list.push(ListEntry { block_id, from });
                State::Inside
            }
            (State::After, Event::Eof) => return Ok(list),
            (state, Event::Comment(_)) => state,
            (state @ (State::Before | State::Inside | State::After), Event::Text(text))
                if text.trim_ascii().is_empty() =>
            {
                state
            }
            (State::Before, _) => return Err(invalid("a block list begins with <BlockList>")),
            (State::Inside | State::Id(..), _) => {
                return Err(invalid("a block list has ids of blocks and nothing else"));
            }
            (State::After, _) => return Err(invalid("something comes after the block list")),
        };
    }
}

enum State {
    Before,
    Inside,
    Id(ListSource, String),
    After,
}

fn name<'a>(tag: &'a BytesStart<'_>) -> Result<&'a str, AzureError> {
    if tag.len() > MAX_TAG_BYTES {
        Err(invalid("a tag is too long"))
    } else {
        Ok(tag.local_name().into_inner())
    }
}

fn source(tag: &BytesStart<'_>) -> Result<ListSource, AzureError> {
    match name(tag)? {
        "Latest" => Ok(ListSource::Latest),
        "Committed" => Ok(ListSource::Committed),
        "Uncommitted" => Ok(ListSource::Uncommitted),
        _ => Err(invalid("a block list has Latest, Committed and Uncommitted only")),
    }
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn what_the_clients_send_is_read_in_order() {
        let body = "<?xml version=\"1.0\" encoding=\"UTF-8\" standalone=\"yes\"?><BlockList><Latest>QQ==</Latest>\n<Committed>Qg==</Committed></BlockList>";
        let ids: Vec<_> = parse(body.as_bytes())
            .unwrap()
            .into_iter()
            .map(|entry| entry.block_id)
            .collect();
        assert_eq!(ids, ["QQ==", "Qg=="]);
        assert!(parse(b"\xef\xbb\xbf<BlockList/>").unwrap().is_empty());
        assert!(parse(b"<BlockList></BlockList>").unwrap().is_empty());
    }

    #[test]
    fn anything_else_is_refused() {
        for body in [
            "",
            "<BlockList>",
            "<BlockList/><BlockList/>",
            "<BlockList>text</BlockList>",
            "<BlockList><Latest><![CDATA[QQ==]]></Latest></BlockList>",
            "<BlockList><Latest><Latest>QQ==</Latest></Latest></BlockList>",
            "<!DOCTYPE x><BlockList/>",
            "<Other/>",
            "<BlockList><Other>QQ==</Other></BlockList>",
            "<BlockList><Latest/></BlockList>",
        ] {
            assert!(parse(body.as_bytes()).is_err(), "{body}");
        }
        let utf16: Vec<u8> = "<BlockList/>".encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert!(parse(&utf16).is_err());
    }
}
