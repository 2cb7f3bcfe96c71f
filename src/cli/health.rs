//! `wharfinger health`: exits with 0 if the server of this configuration is ready. For container health checks: the
//! image has neither a shell nor curl.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::config::Config;

/// Shorter than what container runtimes wait for by default.
const PATIENCE: Duration = Duration::from_secs(5);

/// Enough for a head and a list of reasons.
const MAX_REPLY_BYTES: u64 = 16 * 1024;

pub async fn run(config: &Config) -> anyhow::Result<()> {
    check(reachable(config.internal_listen)).await
}

async fn check(address: SocketAddr) -> anyhow::Result<()> {
    let reply = timeout(PATIENCE, ask(address))
        .await
        .with_context(|| {
            format!(
                "no answer from {address} within {}",
                humantime::format_duration(PATIENCE)
            )
        })?
        .with_context(|| format!("can't ask {address}"))?;
    match reply.split(' ').nth(1) {
        Some("200") => Ok(()),
        _ => bail!(
            "the server is not ready: {}",
            reply.split("\r\n\r\n").nth(1).unwrap_or(&reply).trim()
        ),
    }
}

async fn ask(address: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    stream
        .write_all(format!("GET /readyz HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes())
        .await?;
    let mut reply = Vec::new();
    stream.take(MAX_REPLY_BYTES).read_to_end(&mut reply).await?;
    Ok(String::from_utf8_lossy(&reply).into_owned())
}

/// A server that listens everywhere is asked on loopback.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    async fn answered(reply: &'static str) -> anyhow::Result<()> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 1024];
            let length = stream.read(&mut request).await.unwrap();
            stream.write_all(reply.as_bytes()).await.unwrap();
            String::from_utf8(request[..length].to_vec()).unwrap()
        });
        let outcome = check(address).await;
        assert!(server.await.unwrap().starts_with("GET /readyz HTTP/1.0\r\n"));
        outcome
    }

    #[tokio::test]
    async fn only_200_is_ready() {
        answered("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
            .await
            .unwrap();
        let error = answered("HTTP/1.0 503 Service Unavailable\r\n\r\n{\"reason\":\"draining\"}\n")
            .await
            .unwrap_err();
        assert_eq!(error.to_string(), "the server is not ready: {\"reason\":\"draining\"}");
        assert!(answered("").await.is_err());
    }

    #[tokio::test]
    async fn nobody_there_is_not_ready() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        assert!(check(address).await.unwrap_err().to_string().contains("can't ask"));
    }

    #[test]
    fn everywhere_is_asked_on_loopback() {
        for (listen, asked) in [
            ("0.0.0.0:9090", "127.0.0.1:9090"),
            ("[::]:9090", "[::1]:9090"),
            ("127.0.0.2:9090", "127.0.0.2:9090"),
        ] {
            assert_eq!(reachable(listen.parse().unwrap()), asked.parse().unwrap());
        }
    }
}
