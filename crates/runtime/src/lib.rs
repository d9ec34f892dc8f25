//! Drives the OCI runtime binary and reads its JSON log; sync.
