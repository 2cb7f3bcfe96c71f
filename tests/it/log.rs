//! What the log says of a request.

use serde_json::Value;

use super::common::Backend;
use super::common::process::{Environment, Process};
use super::common::raw::{exchange, request};

/// The log's word on the client of a request that says it came through proxies.
async fn client(trusted_proxies: &str) -> Value {
    let directory = tempfile::tempdir().unwrap();
    let mut environment = Environment::on(Backend::SqliteDisk, directory.path(), None).await;
    environment.set("WHARFINGER_SERVER__TRUSTED_PROXIES", trusted_proxies);
    let process = Process::start(&environment);
    let headers = [("X-Forwarded-For", "198.51.100.9, 192.0.2.1, 10.1.2.3")];
    exchange(&process.url, &request("GET", "/nothing", &headers, b"")).await;
    let log = process.log_to_its_end();
    let entries = log.iter().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let mut requests = entries.filter(|entry| entry["message"] == "request");
    requests.next().unwrap()["client"].clone()
}

#[tokio::test]
async fn a_client_is_the_peer_or_what_a_trusted_proxy_says() {
    for (trusted_proxies, logged) in [
        ("", "127.0.0.1"),
        ("10.0.0.0/8", "127.0.0.1"),
        ("127.0.0.1", "10.1.2.3"),
        ("127.0.0.0/8,10.0.0.0/8", "192.0.2.1"),
    ] {
        assert_eq!(client(trusted_proxies).await, logged, "{trusted_proxies}");
    }
}
