//! The protobuf of a Twirp request, read as each message there is.

#![no_main]

use libfuzzer_sys::fuzz_target;
use wharfinger::api::fuzzing;

fuzz_target!(|body: &[u8]| {
    fuzzing::twirp_protobuf(body);
});
