//! `X-Forwarded-For` and `Forwarded`, from a proxy that is trusted and from anybody.

#![no_main]

use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use libfuzzer_sys::fuzz_target;
use wharfinger::api::fuzzing;

const PROXY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 7));
const ANYBODY: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));

fuzz_target!(|value: &str| {
    let trusted = [IpNet::from(PROXY)];
    for header in ["x-forwarded-for", "forwarded"] {
        assert_eq!(fuzzing::client(ANYBODY, header, value, &trusted), ANYBODY);
        let client = fuzzing::client(PROXY, header, value, &trusted);
        // As a network of the operator's would have to name it.
        assert_eq!(client, client.to_canonical());
        // What the proxy itself adds counts, whatever was there before.
        let element = if header == "forwarded" {
            "for=192.0.2.1"
        } else {
            "192.0.2.1"
        };
        if value.is_ascii() && !value.contains(|c: char| c.is_control()) {
            let value = format!("{value},{element}");
            assert_eq!(fuzzing::client(PROXY, header, &value, &trusted), ANYBODY);
        }
    }
});
