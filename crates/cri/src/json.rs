//! CRI messages as JSON, for the verbose answers that people and tools read.

use std::sync::LazyLock;

use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};

static POOL: LazyLock<Option<DescriptorPool>> =
    LazyLock::new(|| DescriptorPool::decode(gantry_cri_api::FILE_DESCRIPTOR_SET).ok());

/// A message of package `runtime.v1` as JSON with the field names of the .proto file; null when
/// it has no JSON form, which a message of ours always has.
pub fn of(name: &str, message: &impl Message) -> serde_json::Value {
    let value = || {
        let descriptor = POOL
            .as_ref()?
            .get_message_by_name(&format!("runtime.v1.{name}"))?;
        let bytes = message.encode_to_vec();
        let message = DynamicMessage::decode(descriptor, bytes.as_slice()).ok()?;
        let options = SerializeOptions::new()
            .use_proto_field_name(true)
            .stringify_64_bit_integers(false);
        message
            .serialize_with_options(serde_json::value::Serializer, &options)
            .ok()
    };
    value().unwrap_or(serde_json::Value::Null)
}

#[cfg(test)]
mod tests {
    use gantry_cri_api::v1 as cri;

    #[test]
    fn a_config_is_shown_with_its_proto_names() {
        let config = cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: "a".into(),
                ..Default::default()
            }),
            log_directory: "/var/log/pods".into(),
            ..Default::default()
        };
        let json = super::of("PodSandboxConfig", &config);
        assert_eq!(json["metadata"]["name"], "a");
        assert_eq!(json["log_directory"], "/var/log/pods");
    }
}
