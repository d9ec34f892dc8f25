//! The only crate with unsafe code: clone3, pidfd, setns, mounts, close_range, subreaper, signalfd.
