//! CRI configuration and resolved facts to an OCI runtime spec; pure.
