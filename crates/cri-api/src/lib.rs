//! Generated CRI 1.36 types, client and server.

/// Package `runtime.v1`, the CRI of Kubernetes 1.36. Documentation of each item is that of
/// `proto/runtime/v1/api.proto`.
pub mod v1 {
    #![allow(clippy::all)]
    tonic::include_proto!("runtime.v1");
}

/// The encoded `FileDescriptorSet` of [`v1`], for reflection and for tests of the contract.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Credentials reach errors and logs through `{:?}`; this one shows only that they are there.
impl std::fmt::Debug for v1::AuthConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shown = |secret: &str| if secret.is_empty() { "" } else { "<redacted>" };
        f.debug_struct("AuthConfig")
            .field("username", &self.username)
            .field("password", &shown(&self.password))
            .field("auth", &shown(&self.auth))
            .field("server_address", &self.server_address)
            .field("identity_token", &shown(&self.identity_token))
            .field("registry_token", &shown(&self.registry_token))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::v1::AuthConfig;

    #[test]
    fn secrets_are_not_shown_by_debug() {
        let auth = AuthConfig {
            username: "ann".into(),
            password: "s3cret".into(),
            auth: "s3cret".into(),
            identity_token: "s3cret".into(),
            registry_token: "s3cret".into(),
            ..Default::default()
        };
        let shown = format!("{auth:?}");
        assert!(
            shown.contains("ann") && !shown.contains("s3cret"),
            "{shown}"
        );
    }
}
