//! The load generator: HTTP/1.1 on blocking sockets, a thread per connection, and nothing else.
//!
//! `scenarios` and `peers` send everything through here. It has to cost less than the servers it drives: what is sent
//! is one buffer made beforehand, and a body that nobody wants to see is dropped inside the kernel. TLS is the
//! exception: here too each byte is encrypted or decrypted.

use std::fmt::{self, Write as _};
use std::io::{self, IoSlice, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustls_pki_types::CertificateDer;
use sha2::{Digest as _, Sha256};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

/// A server that is silent for so long has failed.
const PATIENCE: Duration = Duration::from_secs(120);
/// TCP: throw away what was received instead of copying it (`tcp(7)`).
const MSG_TRUNC: i32 = 0x20;
const DROP_AT_ONCE: usize = 4 * 1024 * 1024;
const READ_BYTES: usize = 256 * 1024;

/// What becomes of a reply's body.
pub enum Take<'a> {
    Drop,
    Keep(&'a mut Vec<u8>),
    Hash(&'a mut Sha256),
}

/// A whole reply.
pub struct Reply {
    pub status: u16,
    head: String,
    pub body: Vec<u8>,
}

impl Reply {
    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.head, name)
    }

    /// # Errors
    /// What the server said, unless the status is 2xx.
    pub fn accepted(self, what: &str) -> Result<Self> {
        let told = &self.body[..self.body.len().min(300)];
        ensure!(
            (200..300).contains(&self.status),
            "{what}: {} {}",
            self.status,
            String::from_utf8_lossy(told)
        );
        Ok(self)
    }
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(found, _)| found.eq_ignore_ascii_case(name))
        .map(|(_, value)| value.trim())
}

/// Where a server is, and what its clients trust if it speaks TLS.
#[derive(Clone)]
pub struct Origin {
    address: SocketAddr,
    tls: Option<Arc<ClientConfig>>,
}

impl Origin {
    /// The same server, if it speaks TLS with this certificate.
    pub fn with_certificate(self, certificate: CertificateDer<'static>) -> Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(certificate)?;
        let config = ClientConfig::builder()
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self {
            tls: Some(Arc::new(config)),
            ..self
        })
    }

    fn connect(&self) -> Result<Connection> {
        let stream = TcpStream::connect(self.address).context("no connection")?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let Some(config) = &self.tls else {
            return Ok(Connection::Plain(stream));
        };
        let session = ClientConnection::new(Arc::clone(config), self.address.ip().into())?;
        Ok(Connection::Tls(Box::new(StreamOwned::new(session, stream))))
    }
}

impl From<SocketAddr> for Origin {
    fn from(address: SocketAddr) -> Self {
        Self { address, tls: None }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        write!(formatter, "{scheme}://{}", self.address)
    }
}

enum Connection {
    Plain(TcpStream),
    /// Makes its handshake when it first sends.
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(buffer),
            Self::Tls(stream) => stream.read(buffer),
        }
    }

    fn write_vectored(&mut self, slices: &[IoSlice]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write_vectored(slices),
            Self::Tls(stream) => stream.write_vectored(slices),
        }
    }
}

/// One connection, opened when it is first needed and kept.
pub struct Client {
    origin: Origin,
    connection: Option<Connection>,
    /// Bytes received and not yet looked at.
    ahead: Vec<u8>,
    scratch: Vec<u8>,
    dropped: Vec<MaybeUninit<u8>>,
}

impl Client {
    pub fn new(origin: impl Into<Origin>) -> Self {
        Self {
            origin: origin.into(),
            connection: None,
            ahead: Vec::new(),
            scratch: Vec::new(),
            dropped: Vec::new(),
        }
    }

    /// Sends a request and keeps the whole reply. `headers` are complete lines.
    pub fn call(&mut self, method: &str, target: &str, headers: &str, body: &[u8]) -> Result<Reply> {
        let mut kept = Vec::new();
        let (head, _) = self.exchange(method, target, headers, body, &mut Take::Keep(&mut kept))?;
        Ok(Reply {
            status: status(&head)?,
            head,
            body: kept,
        })
    }

    /// GETs a target and returns how many bytes came.
    pub fn get(&mut self, target: &str, take: &mut Take) -> Result<u64> {
        let (head, bytes) = self.exchange("GET", target, "", &[], take)?;
        ensure!(
            status(&head)? == 200,
            "GET: {}",
            head.lines().next().unwrap_or_default()
        );
        Ok(bytes)
    }

    fn exchange(
        &mut self,
        method: &str,
        target: &str,
        headers: &str,
        body: &[u8],
        take: &mut Take,
    ) -> Result<(String, u64)> {
        let mut request = String::with_capacity(512);
        write!(
            request,
            "{method} {target} HTTP/1.1\r\nHost: {}\r\n{headers}",
            self.origin.address
        )?;
        if method != "GET" {
            write!(request, "Content-Length: {}\r\n", body.len())?;
        }
        request.push_str("\r\n");
        let kept = self.connection.is_some();
        let head = match self.send(request.as_bytes(), body) {
            Ok(head) => head,
            // The server had closed the idle connection.
            Err(_) if kept => {
                self.connection = None;
                self.send(request.as_bytes(), body)?
            }
            Err(error) => return Err(error),
        };
        let bytes = self.receive_body(&head, take)?;
        if header(&head, "connection").is_some_and(|value| value.eq_ignore_ascii_case("close")) {
            self.connection = None;
        }
        Ok((head, bytes))
    }

    /// Sends a request and returns the reply's head.
    fn send(&mut self, head: &[u8], body: &[u8]) -> Result<String> {
        if self.connection.is_none() {
            self.connection = Some(self.origin.connect()?);
            self.ahead.clear();
        }
        let connection = self.connection.as_mut().context("no connection")?;
        let mut slices = [IoSlice::new(head), IoSlice::new(body)];
        let mut rest = &mut slices[..];
        while !rest.is_empty() {
            match connection.write_vectored(rest) {
                Ok(written) => IoSlice::advance_slices(&mut rest, written),
                // It may have said no before it had all.
                Err(_) => break,
            }
        }
        loop {
            if let Some(end) = self.ahead.windows(4).position(|four| four == b"\r\n\r\n") {
                let head =
                    String::from_utf8(self.ahead.drain(..end + 4).collect()).context("a head that is no text")?;
                if head.starts_with("HTTP/1.1 100") {
                    continue;
                }
                return Ok(head);
            }
            self.read_more()?;
        }
    }

    fn read_more(&mut self) -> Result<()> {
        let connection = self.connection.as_mut().context("no connection")?;
        self.scratch.resize(READ_BYTES, 0);
        let read = connection.read(&mut self.scratch).context("receiving")?;
        ensure!(read > 0, "the connection was closed");
        self.ahead.extend_from_slice(&self.scratch[..read]);
        Ok(())
    }

    fn receive_body(&mut self, head: &str, take: &mut Take) -> Result<u64> {
        if status(head)? == 204 {
            return Ok(0);
        }
        if header(head, "transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
            return self.receive_chunks(take);
        }
        let length = header(head, "content-length")
            .map_or(Ok(0), str::parse)
            .context("Content-Length")?;
        self.receive(length, take)?;
        Ok(length)
    }

    fn receive_chunks(&mut self, take: &mut Take) -> Result<u64> {
        let mut total = 0;
        loop {
            let line = self.line()?;
            let size = u64::from_str_radix(line.split(';').next().unwrap_or_default().trim(), 16).context("chunk")?;
            self.receive(size, take)?;
            total += size;
            ensure!(self.line()?.is_empty(), "a chunk without an end");
            if size == 0 {
                return Ok(total);
            }
        }
    }

    fn line(&mut self) -> Result<String> {
        loop {
            if let Some(end) = self.ahead.windows(2).position(|two| two == b"\r\n") {
                let line: Vec<u8> = self.ahead.drain(..end + 2).collect();
                return Ok(String::from_utf8_lossy(&line[..end]).into_owned());
            }
            self.read_more()?;
        }
    }

    fn receive(&mut self, length: u64, take: &mut Take) -> Result<()> {
        let mut left = usize::try_from(length)?;
        let at_hand = left.min(self.ahead.len());
        give(take, &self.ahead[..at_hand]);
        self.ahead.drain(..at_hand);
        left -= at_hand;
        let connection = self.connection.as_mut().context("no connection")?;
        while left > 0 {
            let read = if let (Connection::Plain(stream), Take::Drop) = (&*connection, &*take) {
                self.dropped.resize(DROP_AT_ONCE, MaybeUninit::uninit());
                let most = left.min(DROP_AT_ONCE);
                socket2::SockRef::from(stream).recv_with_flags(&mut self.dropped[..most], MSG_TRUNC)
            } else {
                self.scratch.resize(READ_BYTES, 0);
                let most = left.min(READ_BYTES);
                let read = connection.read(&mut self.scratch[..most]);
                read.inspect(|read| give(take, &self.scratch[..*read]))
            }
            .context("receiving")?;
            if read == 0 {
                bail!("{left} bytes short");
            }
            left -= read;
        }
        Ok(())
    }
}

fn give(take: &mut Take, bytes: &[u8]) {
    match take {
        Take::Drop => {}
        Take::Keep(kept) => kept.extend_from_slice(bytes),
        Take::Hash(hasher) => hasher.update(bytes),
    }
}

fn status(head: &str) -> Result<u16> {
    head.split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .context("a reply without a status")
}

/// An artifact's content, in blocks: windows into one buffer of noise, each at another place, so that no two are alike.
pub struct Payload {
    noise: Vec<u8>,
    pub size_bytes: usize,
    pub block_bytes: usize,
    /// In hex.
    pub sha256: String,
}

impl Payload {
    const SHIFT: usize = 64;

    pub fn new(size_bytes: usize, block_bytes: usize) -> Self {
        let block_bytes = block_bytes.min(size_bytes);
        let blocks = size_bytes.div_ceil(block_bytes);
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let noise = std::iter::repeat_with(|| {
            // xorshift64
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .take((block_bytes + blocks * Self::SHIFT).div_ceil(8))
        .flatten()
        .collect();
        let mut payload = Self {
            noise,
            size_bytes,
            block_bytes,
            sha256: String::new(),
        };
        let mut hasher = Sha256::new();
        for index in 0..blocks {
            hasher.update(payload.block(index));
        }
        payload.sha256 = hex(hasher);
        payload
    }

    pub fn blocks(&self) -> usize {
        self.size_bytes.div_ceil(self.block_bytes)
    }

    pub fn block(&self, index: usize) -> &[u8] {
        let length = self.block_bytes.min(self.size_bytes - index * self.block_bytes);
        &self.noise[index * Self::SHIFT..][..length]
    }
}

pub fn hex(hasher: Sha256) -> String {
    hasher.finalize().iter().fold(String::new(), |mut text, byte| {
        // Writing to a string can't fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// When to stop.
#[derive(Clone, Copy)]
pub enum Until<'a> {
    Count(usize),
    Passed(Duration),
    Told(&'a AtomicBool),
}

/// What a number of calls took.
pub struct Run<T> {
    pub wall: Duration,
    /// Of every call, shortest first.
    pub latencies: Vec<Duration>,
    /// What the calls returned, in the order of their numbers.
    pub results: Vec<T>,
}

impl<T> Run<T> {
    /// The latency that this share of the calls stayed below, in milliseconds.
    pub fn quantile_ms(&self, share: f64) -> f64 {
        let last = self.latencies.len().saturating_sub(1);
        let index = (last as f64 * share).round() as usize;
        self.latencies
            .get(index)
            .map_or(0.0, |latency| latency.as_secs_f64() * 1e3)
    }
}

/// Calls `work` with the numbers from 0 on, on so many connections at once.
pub fn in_parallel<T: Send>(
    origin: &Origin,
    connections: usize,
    until: Until,
    work: impl Fn(&mut Client, usize) -> Result<T> + Sync,
) -> Result<Run<T>> {
    let next = AtomicUsize::new(0);
    let begun = Instant::now();
    let one = || -> Result<Vec<(usize, Duration, T)>> {
        let mut client = Client::new(origin.clone());
        let mut done = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if match until {
                Until::Count(count) => number >= count,
                Until::Passed(time) => begun.elapsed() >= time,
                Until::Told(stop) => stop.load(Ordering::Relaxed),
            } {
                return Ok(done);
            }
            let called = Instant::now();
            let result = work(&mut client, number)?;
            done.push((number, called.elapsed(), result));
        }
    };
    let finished = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..connections).map(|_| scope.spawn(one)).collect();
        let joined = threads.into_iter().map(|thread| match thread.join() {
            Ok(done) => done,
            Err(_) => bail!("a thread of the load generator panicked"),
        });
        joined.collect::<Result<Vec<_>>>()
    })?;
    let wall = begun.elapsed();
    let mut done: Vec<_> = finished.into_iter().flatten().collect();
    done.sort_by_key(|(number, ..)| *number);
    let mut latencies: Vec<_> = done.iter().map(|(_, latency, _)| *latency).collect();
    latencies.sort();
    Ok(Run {
        wall,
        latencies,
        results: done.into_iter().map(|(.., result)| result).collect(),
    })
}
