//! Ids and records: the words every floor speaks.
//!
//! Used by all modules; knows no HTTP, no SQL and no storage, and does no I/O.

use std::fmt;

use uuid::Uuid;

/// Identifies a blob: the bytes of one artifact or cache entry. Made by the server, never by a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlobId(pub Uuid);

impl BlobId {
    /// A fresh id, ordered by time so that indexes stay compact.
    pub fn fresh() -> Self {
        Self(Uuid::now_v7())
    }
}

impl fmt::Display for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

/// Where an object lies in the store: `blobs/<blob id>/<uuid>`. Never reused, never overwritten.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey(String);

impl ObjectKey {
    /// A key that no object has yet, under the prefix of `blob`.
    pub fn fresh(blob: BlobId) -> Self {
        Self(format!("{}{}", Self::prefix(blob), Uuid::now_v7()))
    }

    /// What the keys of every object staged for `blob` begin with; ends in `/`.
    pub fn prefix(blob: BlobId) -> String {
        format!("blobs/{blob}/")
    }

    /// Takes a key back from the database or from a listing of the store.
    /// `None` if it is not of the one form that [`ObjectKey::fresh`] makes.
    pub fn parse(text: &str) -> Option<Self> {
        let (blob, object) = text.strip_prefix("blobs/")?.split_once('/')?;
        let canonical = |part: &str| Uuid::parse_str(part).is_ok_and(|id| id.hyphenated().to_string() == part);
        (canonical(blob) && canonical(object)).then(|| Self(text.to_owned()))
    }

    /// The blob that the object was staged for.
    pub fn blob(&self) -> BlobId {
        // Both parts were checked when the key was made.
        let id = self.0.split('/').nth(1).and_then(|id| Uuid::parse_str(id).ok());
        BlobId(id.unwrap_or_default())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The id of an artifact: grows, fits in 2^53 because clients turn it into a JavaScript number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ArtifactId(pub i64);

impl fmt::Display for ArtifactId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The id of a cache entry: grows, fits in 2^53 as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CacheEntryId(pub i64);

impl fmt::Display for CacheEntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A SHA-256 digest. Travels as `sha256:<64 lower-case hex digits>` in the artifact API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sha256(pub [u8; 32]);

impl Sha256 {
    /// Parses the form that `FinalizeArtifact` sends in `hash`. `None` if it is any other.
    pub fn parse(text: &str) -> Option<Self> {
        let hex = text.strip_prefix("sha256:")?.as_bytes();
        if hex.len() != 64 {
            return None;
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(hex.chunks_exact(2)) {
            let digit = |c: u8| char::from(c).to_digit(16);
            *byte = u8::try_from(digit(pair[0])? * 16 + digit(pair[1])?).ok()?;
        }
        Some(Self(bytes))
    }
}

impl fmt::Display for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not byte by byte: a list of a thousand artifacts has 32 000 of them.
        let (halves, _) = self.0.as_chunks();
        f.write_str("sha256:")?;
        halves
            .iter()
            .try_for_each(|half| write!(f, "{:032x}", u128::from_be_bytes(*half)))
    }
}

/// Whose a workflow run is. Every row and every look-up is keyed by all three.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RunKey {
    /// The name of the issuer whose token spoke for the run.
    pub issuer: String,
    /// `id:<repository_id>` or `name:<owner/name, lower case>`; the two never meet.
    /// Empty when the issuer's tokens name no repository and none is configured.
    pub repository: String,
    /// The first id of the token's `Actions.Results:<run>:<job>` scope.
    pub run_backend_id: String,
}

/// Who is calling, as proven by a runtime token. Handlers see this and never the token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Principal {
    pub run: RunKey,
    /// `owner/name` as the token gives it, for people to read; not part of the key.
    pub repository_name: Option<String>,
    /// The number that REST paths and the v3 protocol carry; not every token has it.
    pub run_id: Option<i64>,
    /// Counts from 1; 1 when the token does not say.
    pub run_attempt: i32,
    /// The second id of the token's `Actions.Results:<run>:<job>` scope.
    pub job_backend_id: String,
    /// The caches that this job may use, in the order in which it searches them.
    pub cache_scopes: Vec<CacheScope>,
    /// When the token was made, as far as it says.
    pub issued_at_ms: Option<i64>,
    /// When the token ends, in milliseconds since the epoch.
    pub expires_at_ms: i64,
}

/// One generation of the keys that sign links and minted tokens. The keys themselves are derived from the root secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SigningKey {
    /// Stands in a link's `sk` and in a token's `kid`.
    pub id: String,
    pub created_at_ms: i64,
    /// From then on it signs, until a newer one does.
    pub signs_from_ms: i64,
    /// From then on nothing that it signed counts.
    pub retired_at_ms: Option<i64>,
}

impl SigningKey {
    /// The one that every installation begins with.
    pub fn first() -> Self {
        Self {
            id: "1".to_owned(),
            created_at_ms: 0,
            signs_from_ms: 0,
            retired_at_ms: None,
        }
    }
}

/// Jobs whose runtime tokens ended before their time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClosedRun {
    /// `None`: whoever's.
    pub issuer: Option<String>,
    /// The key that the tokens' runs have, `id:…` or `name:…`, or `name:` and the name that they carry beside an id.
    pub repository: String,
    /// The run's id in the token's scope, or its number.
    pub run: String,
    /// `None`: all jobs of the run.
    pub job: Option<String>,
    pub closed_at_ms: i64,
    /// Tokens made later are good: those of the run's next attempt.
    pub ends_issued_until_ms: i64,
}

/// What an API token may do, each more than the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// List and download.
    Read,
    /// And delete, and close runs.
    Write,
    /// And mint runtime tokens.
    Admin,
}

impl Access {
    pub const ALL: [Self; 3] = [Self::Read, Self::Write, Self::Admin];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Admin => "admin",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|access| access.as_str() == text)
    }
}

/// The repositories that an API token is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Repositories {
    All,
    /// `owner/name` in lower case, or `id:<number>`.
    Some(Vec<String>),
}

impl Repositories {
    /// Whether a repository is one of them. `key` is that of its rows; a name does not open what is kept under a
    /// number that is not listed, since names can be given away.
    pub fn include(&self, key: &str) -> bool {
        match self {
            Self::All => true,
            Self::Some(listed) => {
                let name = key.strip_prefix("name:").unwrap_or(key);
                listed.iter().any(|listed| listed == name)
            }
        }
    }
}

/// An API token as it is kept: everything but the secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiToken {
    /// The part of the token that may be shown.
    pub id: String,
    /// What it is for, for people.
    pub name: String,
    /// `None`: the repositories of every issuer.
    pub issuer: Option<String>,
    pub repositories: Repositories,
    pub access: Access,
    pub created_at_ms: i64,
    pub expires_at_ms: i64,
    pub last_used_at_ms: Option<i64>,
    pub revoked_at_ms: Option<i64>,
}

/// One entry of a token's `ac` claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheScope {
    /// A git ref such as `refs/heads/main`.
    pub scope: String,
    pub read: bool,
    pub write: bool,
}

/// What a blob's bytes are for. The word stands in every link's path and signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlobKind {
    Artifact,
    Cache,
}

impl BlobKind {
    /// The path segment of links: `/blob/<kind>/<uuid>`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Artifact => "art",
            Self::Cache => "cache",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        [Self::Artifact, Self::Cache]
            .into_iter()
            .find(|kind| kind.as_str() == text)
    }
}

/// How far a blob has come. Bytes may change until it is sealed; a sealed blob never changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlobState {
    /// Blocks arrive; there is no content yet.
    Staging,
    /// A block list (or Put Blob) gave it content; another one may replace it.
    Committed,
    /// Finalized: the content is final.
    Sealed,
    /// A tombstone: nobody sees it, the cleaner takes its objects and then the row.
    Deleting,
}

impl BlobState {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Staging => "staging",
            Self::Committed => "committed",
            Self::Sealed => "sealed",
            Self::Deleting => "deleting",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        [Self::Staging, Self::Committed, Self::Sealed, Self::Deleting]
            .into_iter()
            .find(|state| state.as_str() == text)
    }
}

/// Bytes of a blob that lie in one range of one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    pub object_key: ObjectKey,
    pub object_offset: u64,
    pub size_bytes: u64,
    /// CRC-64/NVME of the block's bytes, the polynomial that Azure's `x-ms-content-crc64` has too.
    pub crc64: u64,
}
