//! The ways a request can fail, in the product's own words.
//!
//! Every floor returns this; `api/reply.rs` turns it into the dialect of the caller.
//! `From` for the databases' drivers lives in `db/`, for object_store in `storage/`, so that this file names neither.

/// Texts are for the caller, except in [`Error::Unauthorized`] and [`Error::Internal`], which only the log sees.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such thing for this caller.
    #[error("{0}")]
    NotFound(String),
    /// It was there and its bytes are lost or were refused.
    #[error("{0}")]
    Gone(String),
    #[error("{0}")]
    AlreadyExists(String),
    /// Somebody else was first, or the thing is final.
    #[error("{0}")]
    Conflict(String),
    /// The request can't be read at all: not JSON, not XML, a field of the wrong type.
    #[error("{0}")]
    Malformed(String),
    /// The request was read, and a value in it is not allowed.
    #[error("{0}")]
    Invalid(String),
    /// A block list names a block that was not staged.
    #[error("{0}")]
    UnknownBlock(String),
    /// The bytes that came are not those that the client's checksum describes.
    #[error("{0}")]
    ChecksumMismatch(String),
    #[error("{0}")]
    FailedPrecondition(String),
    #[error("{0}")]
    Unsupported(String),
    #[error("the range starts behind the end of the {size_bytes} bytes")]
    RangeNotSatisfiable { size_bytes: u64 },
    /// The reason is for the log; every caller gets the same text.
    #[error("not authenticated: {0}")]
    Unauthorized(String),
    #[error("{0}")]
    Forbidden(String),
    #[error("{0}")]
    TooLarge(String),
    /// The body is packed, and its bytes are wanted as they are.
    #[error("{0}")]
    Encoded(String),
    #[error("{0}")]
    QuotaExceeded(String),
    /// Try again later: overload, a full disk, a database or store that does not answer.
    #[error("{0}")]
    Busy(String),
    /// Nobody's fault but ours. The cause is logged and hidden from the caller.
    #[error("internal error: {0}")]
    Internal(String),
}

pub type Result<T> = std::result::Result<T, Error>;
