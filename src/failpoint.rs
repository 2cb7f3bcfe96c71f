//! Points where tests let the process die, as if it was killed there. Without the feature `failpoints` they are nothing.
//!
//! `FAILPOINTS=block_stored=return` arms one, `block_stored=2*off->return` for the third time that it is reached; the
//! `fail` crate has the whole syntax. Never part of what is shipped.

/// Arms what the environment names.
pub fn arm() {
    #[cfg(feature = "failpoints")]
    // Dropping it would disarm everything.
    std::mem::forget(fail::FailScenario::setup());
}

/// Dies here if the point is armed.
#[cfg(feature = "failpoints")]
pub fn reach(point: &'static str) {
    fail::fail_point!(point, |_| {
        tracing::error!(point, "dying at a failpoint");
        std::process::abort()
    });
}

/// Does nothing.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn reach(_point: &'static str) {}
