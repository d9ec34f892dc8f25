//! The wall clock as CRI counts it.

use std::time::{SystemTime, UNIX_EPOCH};

/// Nanoseconds since the epoch. CRI wants a creation time above zero: a clock set before 1970
/// gives 1.
pub fn now_ns() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX).max(1)
}
