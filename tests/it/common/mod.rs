//! What several tests share: servers that stand in for the real ones.

pub mod s3;
