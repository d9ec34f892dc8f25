//! Our proto against what other people say CRI is: the contract table of CRI 1.36 beside this
//! file, and the k8s-cri crate, whose proto is that of CRI 1.33.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use gantry_cri_api::{FILE_DESCRIPTOR_SET, v1 as ours};
use k8s_cri::v1 as theirs;
use prost::Message;
use protox::prost_reflect::{
    DescriptorPool, DynamicMessage, EnumDescriptor, FieldDescriptor, Kind, MapKey,
    MessageDescriptor, ServiceDescriptor, Value,
};

const CONTRACT: &str = include_str!("cri-1.36.txt");

fn our_pool() -> DescriptorPool {
    DescriptorPool::decode(FILE_DESCRIPTOR_SET).unwrap()
}

/// The pool of the proto that the k8s-cri crate was generated from. Only Cargo knows where the
/// crate's source lies.
fn their_pool() -> DescriptorPool {
    let output = std::process::Command::new(env!("CARGO"))
        // Without the filter Cargo wants the source of crates for systems that we never build for.
        .args(["metadata", "--format-version=1", "--filter-platform"])
        .arg(format!("{}-unknown-linux-gnu", std::env::consts::ARCH))
        .args([
            "--manifest-path",
            concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"),
        ])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let k8s_cri = packages
        .iter()
        .find(|package| package["name"] == "k8s-cri")
        .unwrap();
    let manifest = PathBuf::from(k8s_cri["manifest_path"].as_str().unwrap());
    let directory = manifest.parent().unwrap().join("proto");
    let set = protox::compile([directory.join("v1.proto")], [directory]).unwrap();
    DescriptorPool::from_file_descriptor_set(set).unwrap()
}

// --- the contract table ---

/// The table as blocks: `message X`, `enum X` or `service X` to its lines.
fn contract_blocks() -> BTreeMap<&'static str, Vec<&'static str>> {
    let mut blocks = BTreeMap::new();
    let mut lines = CONTRACT
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'));
    let mut head = lines.next().unwrap();
    for line in lines {
        if line.starts_with(' ') {
            blocks.entry(head).or_insert_with(Vec::new).push(line);
        } else {
            blocks.entry(head).or_default();
            head = line;
        }
    }
    blocks.entry(head).or_default();
    blocks
}

fn type_text(field: &FieldDescriptor) -> String {
    let kind = match field.kind() {
        Kind::Message(message) if message.is_map_entry() => {
            let entry = |field: FieldDescriptor| type_text(&field);
            return format!(
                "map<{}, {}>",
                entry(message.map_entry_key_field()),
                entry(message.map_entry_value_field())
            );
        }
        Kind::Message(message) => message.name().to_owned(),
        Kind::Enum(enumeration) => enumeration.name().to_owned(),
        scalar => format!("{scalar:?}").to_lowercase(),
    };
    if field.is_list() {
        format!("repeated {kind}")
    } else {
        kind
    }
}

fn options_text(field: &FieldDescriptor) -> &'static str {
    let options = field.options();
    // Fields `deprecated` and `debug_redact` of google.protobuf.FieldOptions.
    let is_set = |name: &str| {
        options
            .get_field_by_name(name)
            .is_some_and(|value| value.as_bool() == Some(true))
    };
    match (is_set("deprecated"), is_set("debug_redact")) {
        (true, _) => " [ deprecated = true ]",
        (_, true) => " [ debug_redact = true ]",
        _ => "",
    }
}

fn enum_lines(enumeration: &EnumDescriptor, indent: &str) -> Vec<String> {
    enumeration
        .values()
        .map(|v| format!("{indent}{} {}", v.number(), v.name()))
        .collect()
}

fn message_lines(message: &MessageDescriptor) -> Vec<String> {
    let mut lines = Vec::new();
    for nested in message.child_enums() {
        lines.push(format!("  enum {}", nested.name()));
        lines.extend(enum_lines(&nested, "    "));
    }
    // Ordered as declared, which the descriptor keeps but `fields()` does not.
    for declared in &message.descriptor_proto().field {
        let field = message.get_field(declared.number() as u32).unwrap();
        lines.push(format!(
            "  {} {} {}{}",
            field.number(),
            type_text(&field),
            field.name(),
            options_text(&field)
        ));
    }
    lines
}

fn service_lines(service: &ServiceDescriptor) -> Vec<String> {
    let stream = |yes: bool| if yes { "stream " } else { "" };
    let line = |method: protox::prost_reflect::MethodDescriptor| {
        format!(
            "  rpc {}({}{}) -> ({}{})",
            method.name(),
            stream(method.is_client_streaming()),
            method.input().name(),
            stream(method.is_server_streaming()),
            method.output().name()
        )
    };
    service.methods().map(line).collect()
}

#[test]
fn our_proto_is_the_contract_table() {
    let pool = our_pool();
    let mut blocks: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for service in pool.services() {
        blocks.insert(
            format!("service {}", service.name()),
            service_lines(&service),
        );
    }
    for message in pool
        .all_messages()
        .filter(|message| message.parent_message().is_none())
    {
        blocks.insert(
            format!("message {}", message.name()),
            message_lines(&message),
        );
    }
    for enumeration in pool
        .all_enums()
        .filter(|found| found.parent_message().is_none())
    {
        blocks.insert(
            format!("enum {}", enumeration.name()),
            enum_lines(&enumeration, "  "),
        );
    }

    let contract = contract_blocks();
    for (head, lines) in &contract {
        assert_eq!(
            blocks.get(*head).map(|b| b.join("\n")),
            Some(lines.join("\n")),
            "{head}"
        );
    }
    let known: BTreeSet<&str> = contract.keys().copied().collect();
    let more: Vec<_> = blocks
        .keys()
        .filter(|head| !known.contains(head.as_str()))
        .collect();
    assert!(more.is_empty(), "not in the contract: {more:?}");
}

// --- k8s-cri ---

/// The one field whose type changed between 1.33 and 1.36: an environment value need not be
/// UTF-8. Both types are the same on the wire.
const RETYPED: (&str, (&str, &str)) = ("runtime.v1.KeyValue.value", ("string", "bytes"));

#[test]
fn our_proto_holds_all_of_k8s_cri() {
    let (ours, theirs) = (our_pool(), their_pool());
    for message in theirs
        .all_messages()
        .filter(|message| !message.is_map_entry())
    {
        let name = message.full_name();
        let mine = ours
            .get_message_by_name(name)
            .unwrap_or_else(|| panic!("{name} is missing"));
        for field in message.fields() {
            let what = format!("{name}.{}", field.name());
            let my_field = mine
                .get_field_by_name(field.name())
                .unwrap_or_else(|| panic!("{what} is missing"));
            assert_eq!(my_field.number(), field.number(), "{what}");
            if what == RETYPED.0 {
                assert_eq!(
                    (type_text(&field).as_str(), type_text(&my_field).as_str()),
                    RETYPED.1
                );
            } else {
                assert_eq!(type_text(&my_field), type_text(&field), "{what}");
            }
            assert_eq!(my_field.cardinality(), field.cardinality(), "{what}");
            assert_eq!(
                my_field.containing_oneof().is_some(),
                field.containing_oneof().is_some(),
                "{what}"
            );
        }
    }
    for enumeration in theirs.all_enums() {
        let name = enumeration.full_name();
        let mine = ours
            .get_enum_by_name(name)
            .unwrap_or_else(|| panic!("{name} is missing"));
        for value in enumeration.values() {
            let my_value = mine.get_value_by_name(value.name());
            assert_eq!(
                my_value.map(|v| v.number()),
                Some(value.number()),
                "{}",
                value.full_name()
            );
        }
    }
    for service in theirs.services() {
        let name = service.full_name();
        let mine = ours
            .get_service_by_name(name)
            .unwrap_or_else(|| panic!("{name} is missing"));
        let my_rpcs: BTreeSet<_> = service_lines(&mine).into_iter().collect();
        for rpc in service_lines(&service) {
            assert!(my_rpcs.contains(&rpc), "{name}: {rpc} is missing");
        }
    }
}

/// A message of which every field is set to something that is not its default, so that every
/// field is on the wire. One element a list and a map: their order is not part of the question.
fn filled(message: &MessageDescriptor) -> DynamicMessage {
    let mut built = DynamicMessage::new(message.clone());
    for field in message.fields() {
        let value = if field.is_map() {
            let Kind::Message(entry) = field.kind() else {
                unreachable!("maps are messages")
            };
            let value = filled_value(&entry.map_entry_value_field());
            Value::Map([(MapKey::String("key".into()), value)].into())
        } else if field.is_list() {
            Value::List(vec![filled_value(&field)])
        } else {
            filled_value(&field)
        };
        built.set_field(&field, value);
    }
    built
}

fn filled_value(field: &FieldDescriptor) -> Value {
    let number = field.number();
    match field.kind() {
        Kind::String => Value::String(format!("{} ü", field.full_name())),
        Kind::Bytes => Value::Bytes(vec![0, 0xff, number as u8].into()),
        Kind::Bool => Value::Bool(true),
        Kind::Int32 => Value::I32(-(number as i32)),
        Kind::Int64 => Value::I64(i64::MIN + i64::from(number)),
        Kind::Uint32 => Value::U32(u32::MAX - number),
        Kind::Uint64 => Value::U64(u64::MAX - u64::from(number)),
        Kind::Double => Value::F64(0.5 + f64::from(number)),
        Kind::Enum(found) => Value::EnumNumber(found.values().last().unwrap().number()),
        Kind::Message(found) => Value::Message(filled(&found)),
        other => panic!("{}: CRI had no {other:?} so far", field.full_name()),
    }
}

/// Encodes with one crate, decodes with the other, in both directions, for each named message.
macro_rules! agree {
    ($pool:expr; $($name:ident)*) => {$(
        let name = concat!("runtime.v1.", stringify!($name));
        let wire = filled(&$pool.get_message_by_name(name).unwrap()).encode_to_vec();
        let their_value = theirs::$name::decode(&wire[..]).unwrap();
        let our_value = ours::$name::decode(&their_value.encode_to_vec()[..]).unwrap();
        let our_wire = our_value.encode_to_vec();
        assert_eq!(our_wire.len(), wire.len(), "{name}: a field was lost");
        assert_eq!(theirs::$name::decode(&our_wire[..]).unwrap(), their_value, "{name}");
    )*};
}

#[test]
fn messages_survive_the_way_between_k8s_cri_and_us() {
    let pool = their_pool();
    agree! { pool;
        VersionResponse RunPodSandboxRequest PodSandboxStatusResponse ListPodSandboxRequest
        ListPodSandboxResponse PodSandboxStatsResponse ListPodSandboxStatsResponse
        CreateContainerRequest StopContainerRequest ListContainersRequest ListContainersResponse
        ContainerStatusResponse UpdateContainerResourcesRequest ExecSyncRequest ExecSyncResponse
        ExecRequest AttachRequest PortForwardRequest ListContainerStatsRequest
        ListContainerStatsResponse ListImagesResponse ImageStatusResponse PullImageRequest
        ImageFsInfoResponse UpdateRuntimeConfigRequest StatusResponse CheckpointContainerRequest
        ContainerEventResponse ListMetricDescriptorsResponse ListPodSandboxMetricsResponse
        RuntimeConfigResponse
    }
}

#[test]
fn fields_of_a_request_mean_the_same_to_both() {
    let theirs = theirs::CreateContainerRequest {
        pod_sandbox_id: "pod".into(),
        config: Some(theirs::ContainerConfig {
            metadata: Some(theirs::ContainerMetadata {
                name: "web".into(),
                attempt: 3,
            }),
            mounts: vec![theirs::Mount {
                container_path: "/data".into(),
                propagation: theirs::MountPropagation::PropagationBidirectional.into(),
                recursive_read_only: true,
                ..Default::default()
            }],
            linux: Some(theirs::LinuxContainerConfig {
                resources: Some(theirs::LinuxContainerResources {
                    cpu_quota: -1,
                    memory_swap_limit_in_bytes: 1 << 40,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        sandbox_config: None,
    };
    let ours = ours::CreateContainerRequest::decode(&theirs.encode_to_vec()[..]).unwrap();
    assert_eq!(ours.pod_sandbox_id, "pod");
    assert_eq!(ours.sandbox_config, None);
    let config = ours.config.unwrap();
    assert_eq!(config.metadata.unwrap().attempt, 3);
    assert_eq!(config.mounts[0].container_path, "/data");
    assert_eq!(
        config.mounts[0].propagation(),
        ours::MountPropagation::PropagationBidirectional
    );
    assert!(config.mounts[0].recursive_read_only);
    let resources = config.linux.unwrap().resources.unwrap();
    assert_eq!(
        (resources.cpu_quota, resources.memory_swap_limit_in_bytes),
        (-1, 1 << 40)
    );
}
