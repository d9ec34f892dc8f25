//! Generated CRI 1.36 types, client and server.
