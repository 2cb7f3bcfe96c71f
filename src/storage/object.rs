//! Objects in an S3 bucket, or in memory for tests, by way of the `object_store` crate.
//!
//! Only `storage/mod.rs` calls this. Never starts a multipart upload, whose lost ids nobody could list; never
//! depends on a conditional request; never logs or returns a presigned URL.

use std::error::Error as _;
use std::ops::Range;
use std::path::Path as FilePath;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt, TryStreamExt};
use http::header::CONTENT_LENGTH;
use http::{Method, StatusCode};
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::client::HttpError;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::signer::Signer;
use object_store::{
    BackoffConfig, Certificate, ClientOptions, GetOptions, ObjectMeta, ObjectStore, ObjectStoreExt, PutPayload,
    RetryConfig,
};
use secrecy::ExposeSecret;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use super::intake::Intake;
use super::{Listed, MARKER, MARKER_MAX_BYTES, OpenError, Settings};
use crate::error::{Error, Result};
use crate::model::{BlobId, ObjectKey};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long the store may neither take nor send a byte. There is no limit on a whole request: blocks are large.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the first look at the bucket may take, retries and all.
const OPEN_TIMEOUT: Duration = Duration::from_secs(20);
const MAX_RETRIES: usize = 3;
const RETRY_TIMEOUT: Duration = Duration::from_secs(20);
/// S3 looks at the signature when the request begins; this leaves room for clocks that differ.
const UPLOAD_URL_LIFETIME: Duration = Duration::from_secs(15 * 60);
/// Replies to a PUT are empty or a short XML error.
const REPLY_MAX_BYTES: usize = 8 * 1024;

#[derive(Clone, Debug)]
pub struct Object {
    store: Arc<dyn ObjectStore>,
    /// How bodies are streamed into a bucket; memory takes them as they are.
    upload: Option<Upload>,
    /// What every key is prefixed with; may be empty.
    prefix: Path,
}

/// One PUT per object, its body streamed: `ObjectStore::put` would hold all of it in memory.
#[derive(Clone, Debug)]
struct Upload {
    signer: Arc<AmazonS3>,
    client: reqwest::Client,
}

impl Object {
    pub(super) fn in_memory() -> Self {
        Self {
            store: Arc::new(InMemory::new()),
            upload: None,
            prefix: Path::default(),
        }
    }

    pub(super) async fn in_bucket(
        settings: &Settings,
        bucket: &str,
        prefix: &str,
        ca_file: Option<&FilePath>,
    ) -> std::result::Result<Self, OpenError> {
        if bucket.is_empty() {
            return Err(OpenError(
                "storage.url names no bucket: write `s3://bucket` or `s3://bucket/prefix`".into(),
            ));
        }
        let prefix = Path::parse(prefix)
            .map_err(|error| OpenError(format!("the prefix in storage.url can't be part of a key: {error}")))?;
        let authorities = match ca_file {
            Some(path) => tokio::fs::read(path)
                .await
                .map_err(|error| OpenError(format!("can't read the ca_file {}: {error}", path.display())))?,
            None => Vec::new(),
        };
        let signer = Arc::new(amazon_s3(settings, bucket, &authorities)?);
        let client = upload_client(&authorities)?;
        let object = Self {
            store: signer.clone(),
            upload: Some(Upload { signer, client }),
            prefix,
        };
        object.check_bucket(settings, bucket).await?;
        Ok(object)
    }

    async fn check_bucket(&self, settings: &Settings, bucket: &str) -> std::result::Result<(), OpenError> {
        let place = if settings.endpoint.is_empty() {
            "Amazon S3"
        } else {
            &settings.endpoint
        };
        // The first page of a listing is all that is fetched.
        let mut listing = self.store.list(Some(&self.prefix));
        let Ok(page) = timeout(OPEN_TIMEOUT, listing.next()).await else {
            return Err(OpenError(format!(
                "the store at {place} does not answer: check storage.endpoint"
            )));
        };
        let Some(Err(error)) = page else {
            return Ok(());
        };
        let cause = error.to_string();
        Err(OpenError(if cause.contains("NoSuchBucket") {
            format!("the bucket `{bucket}` does not exist at {place}: create it, or correct storage.url")
        } else if cause.contains("/latest/") {
            // The address of the machine's role service.
            format!(
                "no credentials for the bucket `{bucket}`: set storage.access_key_id and storage.secret_access_key, \
                 or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role ({cause})"
            )
        } else if status_in(&cause).is_some_and(|status| matches!(status, 401 | 403)) {
            format!(
                "{place} refused the credentials for the bucket `{bucket}`: check storage.access_key_id and \
                 storage.secret_access_key, and that they may list, read, write and delete ({cause})"
            )
        } else if is_transient(&error) {
            format!("the store at {place} can't be reached: check storage.endpoint and the network ({cause})")
        } else {
            format!("the bucket `{bucket}` at {place} can't be used: {cause}")
        }))
    }

    fn path(&self, key: &ObjectKey) -> Path {
        self.below_prefix(key.as_str())
    }

    fn below_prefix(&self, name: &str) -> Path {
        Path::from_iter(self.prefix.parts().chain(Path::from(name).parts()))
    }

    pub(super) async fn put(&self, key: &ObjectKey, size_bytes: u64, mut intake: Intake) -> Result<u64> {
        match &self.upload {
            Some(upload) if size_bytes > 0 => upload.put(&self.path(key), size_bytes, &mut intake).await?,
            _ => {
                let mut frames = Vec::new();
                while let Some(frame) = intake.next().await? {
                    frames.push(frame);
                }
                self.store.put(&self.path(key), PutPayload::from_iter(frames)).await?;
            }
        }
        Ok(intake.crc64())
    }

    pub(super) fn fetch(&self, key: &ObjectKey, range: Range<u64>) -> BoxStream<'static, Result<Bytes>> {
        let mut download = Download {
            object: self.clone(),
            path: self.path(key),
            range,
            failures: 0,
            body: None,
        };
        download.body = Some(Body::Opening(download.start()));
        stream::try_unfold(download, Download::next).boxed()
    }

    /// An empty stream when the object is too short for the range.
    async fn get(self, path: Path, range: Range<u64>) -> Result<BoxStream<'static, Result<Bytes>>> {
        let options = GetOptions::new().with_range(Some(range.clone()));
        match self.store.get_opts(&path, options).await {
            Ok(found) if found.range == range => Ok(found.into_stream().map_err(Error::from).boxed()),
            Ok(_) => Ok(stream::empty().boxed()),
            Err(error @ object_store::Error::NotFound { .. }) => Err(error.into()),
            Err(error) if is_transient(&error) => Err(error.into()),
            // A range behind the end is refused in as many words as there are stores.
            Err(error) => match self.store.head(&path).await {
                Ok(meta) if meta.size < range.end => Ok(stream::empty().boxed()),
                _ => Err(error.into()),
            },
        }
    }

    pub(super) async fn delete(&self, key: &ObjectKey) -> Result<()> {
        match self.store.delete(&self.path(key)).await.map_err(Error::from) {
            Err(Error::NotFound(_)) => Ok(()),
            result => result,
        }
    }

    pub(super) async fn list(&self, blob: BlobId) -> Result<Vec<Listed>> {
        self.list_below(&ObjectKey::prefix(blob)).try_collect().await
    }

    pub(super) fn list_all(&self) -> BoxStream<'static, Result<Listed>> {
        self.list_below("blobs/")
    }

    fn list_below(&self, prefix: &str) -> BoxStream<'static, Result<Listed>> {
        let object = self.clone();
        self.store
            .list(Some(&self.below_prefix(prefix)))
            .map_err(Error::from)
            .try_filter_map(move |meta| {
                let listed = object.listed(&meta);
                async move { Ok(listed) }
            })
            .boxed()
    }

    /// `None` for names that are not ours.
    fn listed(&self, meta: &ObjectMeta) -> Option<Listed> {
        let name: Path = meta.location.prefix_match(&self.prefix)?.collect();
        let key = ObjectKey::parse(name.as_ref())?;
        Some(Listed {
            key,
            size_bytes: meta.size,
            modified_ms: meta.last_modified.timestamp_millis(),
        })
    }

    pub(super) async fn read_marker(&self) -> Result<Option<String>> {
        let found = match self.store.get(&self.below_prefix(MARKER)).await.map_err(Error::from) {
            Err(Error::NotFound(_)) => return Ok(None),
            result => result?,
        };
        if found.meta.size > MARKER_MAX_BYTES {
            return Err(Error::Internal(format!("the object {MARKER} is not a marker of ours")));
        }
        String::from_utf8(found.bytes().await?.into())
            .map(Some)
            .map_err(|_| Error::Internal(format!("the object {MARKER} is not text")))
    }

    pub(super) async fn write_marker(&self, marker: &str) -> Result<()> {
        self.store
            .put(&self.below_prefix(MARKER), marker.to_owned().into())
            .await?;
        Ok(())
    }
}

fn amazon_s3(settings: &Settings, bucket: &str, authorities: &[u8]) -> std::result::Result<AmazonS3, OpenError> {
    let mut options = ClientOptions::new()
        .with_timeout_disabled()
        .with_connect_timeout(CONNECT_TIMEOUT)
        .with_read_timeout(STALL_TIMEOUT)
        .with_allow_http(settings.endpoint.starts_with("http://"));
    for authority in Certificate::from_pem_bundle(authorities).map_err(|error| bad_ca_file(&error))? {
        options = options.with_root_certificate(authority);
    }
    let retry = RetryConfig {
        max_retries: MAX_RETRIES,
        retry_timeout: RETRY_TIMEOUT,
        backoff: BackoffConfig {
            max_backoff: Duration::from_secs(5),
            ..BackoffConfig::default()
        },
    };
    // Credentials in the settings are taken as they are, without a session token that lies about in the environment.
    let mut builder = if settings.access_key_id.is_empty() {
        AmazonS3Builder::from_env()
    } else {
        AmazonS3Builder::new()
            .with_access_key_id(&settings.access_key_id)
            .with_secret_access_key(settings.secret_access_key.expose_secret())
    };
    if !settings.session_token.expose_secret().is_empty() {
        builder = builder.with_token(settings.session_token.expose_secret());
    }
    if !settings.endpoint.is_empty() {
        builder = builder.with_endpoint(endpoint(settings, bucket)?);
    }
    if !settings.region.is_empty() {
        builder = builder.with_region(&settings.region);
    }
    builder
        .with_bucket_name(bucket)
        .with_virtual_hosted_style_request(!settings.path_style)
        .with_client_options(options)
        .with_retry(retry)
        .build()
        .map_err(|error| OpenError(format!("the storage settings don't make an S3 client: {error}")))
}

/// The address that the builder wants: in virtual-hosted style it takes the bucket as a part of it.
fn endpoint(settings: &Settings, bucket: &str) -> std::result::Result<String, OpenError> {
    match settings.endpoint.split_once("://") {
        Some(("http" | "https", _)) if settings.path_style => Ok(settings.endpoint.clone()),
        Some((scheme @ ("http" | "https"), host)) => Ok(format!("{scheme}://{bucket}.{}", host.trim_end_matches('/'))),
        _ => Err(OpenError(format!(
            "storage.endpoint is `{}`: begin it with http:// or https://",
            settings.endpoint
        ))),
    }
}

fn upload_client(authorities: &[u8]) -> std::result::Result<reqwest::Client, OpenError> {
    let authorities = reqwest::Certificate::from_pem_bundle(authorities).map_err(|error| bad_ca_file(&error))?;
    reqwest::Client::builder()
        .http1_only()
        .connect_timeout(CONNECT_TIMEOUT)
        // A streamed body can't be sent twice.
        .redirect(reqwest::redirect::Policy::none())
        .tls_certs_merge(authorities)
        .build()
        .map_err(|error| OpenError(format!("can't set up HTTP for S3: {error}")))
}

fn bad_ca_file(error: &dyn std::error::Error) -> OpenError {
    OpenError(format!("the ca_file is not a bundle of PEM certificates: {error}"))
}

impl Upload {
    /// Nothing is stored unless the last frame goes out, and the intake holds that back until all is well.
    async fn put(&self, path: &Path, size_bytes: u64, intake: &mut Intake) -> Result<()> {
        let url = self.signer.signed_url(Method::PUT, path, UPLOAD_URL_LIFETIME).await?;
        let (frames, mut outgoing) = mpsc::channel::<Result<Bytes>>(1);
        let body = reqwest::Body::wrap_stream(stream::poll_fn(move |context| outgoing.poll_recv(context)));
        let request = self.client.put(url).header(CONTENT_LENGTH, size_bytes).body(body);
        let sending = AbortOnDropHandle::new(tokio::spawn(request.send()));

        while let Some(frame) = intake.next().await? {
            match timeout(STALL_TIMEOUT, frames.send(Ok(frame))).await {
                Ok(Ok(())) if intake.is_complete() => break,
                Ok(Ok(())) => intake.taken(),
                // The store has answered already or is gone; the reply tells.
                Ok(Err(_)) => break,
                Err(_) => return Err(stalled()),
            }
        }
        drop(frames);

        let reply = timeout(STALL_TIMEOUT, sending)
            .await
            .map_err(|_| stalled())?
            .map_err(|error| Error::Internal(format!("an upload task failed: {error}")))?
            .map_err(unreachable)?;
        let status = reply.status();
        let text = read_reply(reply).await?;
        // Some stores begin a 200 before they are done and then put their error into the body.
        match status.is_success() && !text.contains("<Error") {
            true => Ok(()),
            false => Err(refused(status, &text)),
        }
    }
}

/// As much of the reply as can be an error's text, so that the connection can be used again.
async fn read_reply(mut reply: reqwest::Response) -> Result<String> {
    let mut text = BytesMut::new();
    while text.len() < REPLY_MAX_BYTES {
        match timeout(STALL_TIMEOUT, reply.chunk())
            .await
            .map_err(|_| stalled())?
            .map_err(unreachable)?
        {
            Some(chunk) => text.extend_from_slice(&chunk),
            None => break,
        }
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

fn refused(status: StatusCode, text: &str) -> Error {
    let code = text
        .split_once("<Code>")
        .and_then(|(_, rest)| rest.split_once("</Code>"))
        .map_or("", |(code, _)| code);
    let passing = matches!(
        code,
        "RequestTimeout" | "SlowDown" | "InternalError" | "ServiceUnavailable"
    );
    if passing || is_passing(status.as_u16()) || status.is_success() {
        tracing::warn!(%status, code, "the object store puts us off");
        return Error::Busy("the object store is busy".into());
    }
    Error::Internal(format!("the object store refused an upload: {status} {code}"))
}

/// `without_url`: the URL is a key to the bucket.
fn unreachable(error: reqwest::Error) -> Error {
    let error = error.without_url();
    tracing::warn!(cause = ?error, "the object store broke off an upload");
    Error::Busy("the object store can't be reached".into())
}

fn stalled() -> Error {
    tracing::warn!("the object store took no bytes for {} s", STALL_TIMEOUT.as_secs());
    Error::Busy("the object store does not answer".into())
}

/// A range on its way out. It goes on with a new request where an old one broke off: a reader that is slower than
/// the store's patience must not lose its download.
struct Download {
    object: Object,
    path: Path,
    /// What has not come yet.
    range: Range<u64>,
    /// In a row, without a byte in between.
    failures: usize,
    body: Option<Body>,
}

enum Body {
    Opening(AbortOnDropHandle<Result<BoxStream<'static, Result<Bytes>>>>),
    Open(BoxStream<'static, Result<Bytes>>),
}

impl Download {
    /// In a task, so that the store is asked although nobody polls yet.
    fn start(&self) -> AbortOnDropHandle<Result<BoxStream<'static, Result<Bytes>>>> {
        AbortOnDropHandle::new(tokio::spawn(
            self.object.clone().get(self.path.clone(), self.range.clone()),
        ))
    }

    async fn next(mut self) -> Result<Option<(Bytes, Self)>> {
        while !self.range.is_empty() {
            let mut chunks = match self.body.take() {
                Some(Body::Open(chunks)) => chunks,
                Some(Body::Opening(opening)) => opening
                    .await
                    .map_err(|error| Error::Internal(format!("a download task failed: {error}")))??,
                None => self.object.clone().get(self.path.clone(), self.range.clone()).await?,
            };
            match chunks.next().await {
                Some(Ok(chunk)) => {
                    self.range.start += chunk.len() as u64;
                    self.failures = 0;
                    self.body = Some(Body::Open(chunks));
                    return Ok(Some((chunk, self)));
                }
                Some(Err(Error::Busy(_))) if self.failures < MAX_RETRIES => self.failures += 1,
                Some(Err(error)) => return Err(error),
                None => return Ok(None),
            }
        }
        Ok(None)
    }
}

/// Whether trying again later may help.
fn is_transient(error: &object_store::Error) -> bool {
    let mut cause = error.source();
    while let Some(inner) = cause {
        if inner.is::<HttpError>() {
            return true;
        }
        cause = inner.source();
    }
    let text = error.to_string();
    // "error response" is an S3 error in the body of a 200.
    status_in(&text).is_some_and(is_passing) || text.contains("Server returned error response")
}

/// object_store keeps the type that carries the status to itself, but its text ends up in every error.
fn status_in(text: &str) -> Option<u16> {
    let (_, rest) = text.split_once("status code: ")?;
    rest.get(..3)?.parse().ok()
}

fn is_passing(status: u16) -> bool {
    status >= 500 || matches!(status, 408 | 429)
}

impl From<object_store::Error> for Error {
    fn from(error: object_store::Error) -> Self {
        let text = error.to_string();
        if matches!(error, object_store::Error::NotFound { .. }) && !text.contains("NoSuchBucket") {
            return Self::NotFound("no such object".into());
        }
        if is_transient(&error) {
            tracing::warn!(cause = text, "the object store fails for now");
            return Self::Busy("the object store can't be reached".into());
        }
        Self::Internal(format!("object store: {text}"))
    }
}
