//! One driver task per pod, shim client, recovery.
