//! Shims that run are not replaced with the daemon: what they speak never changes. Each version of
//! the protocol is frozen twice, as definitions (`proto/shim/v1/frozen`) that the present ones must
//! go on saying, and as bytes (`protocol-1.hex`) that must go on meaning the same.

use std::collections::BTreeMap;
use std::path::Path;

use gantry_shim_api::v1::{self, event, message, request};
use prost::Message;

const ADVICE: &str = "the protocol of running shims must not change: add fields, requests and a \
                      version (gantry_shim_api::PROTOCOL) instead";

/// Every field and value of a file, by its name, with all that decides how it is encoded.
fn definitions(file: &str) -> BTreeMap<String, String> {
    let proto = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto");
    let set = protox::compile([proto.join(file)], [proto]).unwrap();
    let mut all = BTreeMap::new();
    for file in &set.file {
        let mut messages: Vec<_> = file
            .message_type
            .iter()
            .map(|message| (message.name().to_owned(), message))
            .collect();
        while let Some((name, message)) = messages.pop() {
            let one_of = |index: Option<i32>| {
                let index = usize::try_from(index?).ok()?;
                Some(message.oneof_decl.get(index)?.name().to_owned())
            };
            for field in &message.field {
                let what = format!(
                    "{} {:?} {:?} {} {:?}",
                    field.number(),
                    field.label(),
                    field.r#type(),
                    field.type_name(),
                    one_of(field.oneof_index)
                );
                all.insert(format!("{name}.{}", field.name()), what);
            }
            let nested = message.nested_type.iter();
            messages.extend(nested.map(|inner| (format!("{name}.{}", inner.name()), inner)));
        }
        for choice in &file.enum_type {
            for value in &choice.value {
                let name = format!("{}.{}", choice.name(), value.name());
                all.insert(name, value.number().to_string());
            }
        }
    }
    all
}

#[test]
fn what_older_shims_speak_is_still_what_is_spoken() {
    let present = definitions("shim/v1/shim.proto");
    let frozen = definitions("shim/v1/frozen/protocol-1.proto");
    assert!(frozen.len() > 80, "{} definitions", frozen.len());
    for (name, was) in frozen {
        let is = present.get(&name);
        assert_eq!(is, Some(&was), "{name} of protocol 1: {ADVICE}");
    }
}

fn request(body: request::Body) -> Vec<u8> {
    let body = Some(body);
    v1::Request { id: 5, body }.encode_to_vec()
}

fn answer(body: message::Body) -> Vec<u8> {
    let body = Some(body);
    v1::Message { id: 5, body }.encode_to_vec()
}

fn event(body: event::Body) -> Vec<u8> {
    let body = Some(message::Body::Event(v1::Event { body: Some(body) }));
    v1::Message { id: 0, body }.encode_to_vec()
}

fn process(pid: i32) -> Option<v1::Process> {
    let start_time = 1_000_000;
    Some(v1::Process { pid, start_time })
}

fn exit() -> Option<v1::ExitRecord> {
    Some(v1::ExitRecord {
        code: 137,
        finished_at: 1_700_000_000_000_000_000,
        oom_killed: true,
        ..Default::default()
    })
}

/// One of each, with every field that protocol 1 has.
fn protocol_1() -> Vec<(&'static str, Vec<u8>)> {
    use message::Body as Answer;
    use request::Body as Ask;
    let (container_id, exec_id) = ("c".to_owned(), "e".to_owned());
    let mapping = v1::IdMapping {
        container_id: 1,
        host_id: 65_536,
        length: 4096,
    };
    let bootstrap = v1::Bootstrap {
        protocol: 1,
        pod_id: "p".into(),
        run_dir: "/run/p".into(),
        holder: Some(v1::Holder {
            netns_path: "/netns/p".into(),
            pin_dir: "/run/p/ns".into(),
            new_ipc: true,
            new_uts: true,
            new_pid: true,
            hostname: "h".into(),
            sysctls: [("net.a".to_owned(), "1".to_owned())].into(),
            cgroup_dirs: vec!["/cg/p".into()],
            uid_mappings: vec![mapping],
            gid_mappings: vec![mapping],
            oom_score_adj: -998,
        }),
        runtime: Some(v1::Runtime {
            binary: "/bin/runc".into(),
            root: "/run/runc".into(),
            systemd_cgroup: true,
            timeout_ms: 120_000,
        }),
        oom_score_adj: -998,
        cgroup_dirs: vec!["/cg/s".into()],
        ..Default::default()
    };
    let ready = v1::Ready {
        error: "why".into(),
        holder: process(2),
        shim: process(3),
    };
    let start = v1::Start {
        container_id: container_id.clone(),
        bundle: "/b".into(),
        log_path: "/l".into(),
        tty: true,
        stdin: true,
        stdin_once: true,
        oom_file: "/o".into(),
        cgroup_dir: "/cg/c".into(),
        kill_cgroup_on_exit: true,
    };
    let exec = v1::Exec {
        container_id: container_id.clone(),
        exec_id: exec_id.clone(),
        process_json: b"{}".into(),
        tty: true,
        grace_ms: Some(0),
    };
    let resize = v1::ResizePty {
        container_id: container_id.clone(),
        exec_id: exec_id.clone(),
        width: 80,
        height: 25,
    };
    let hello = v1::HelloReply {
        protocol: 1,
        shim_version: "0.1.0".into(),
        pod_id: "p".into(),
        shim: process(3),
        holder: process(2),
    };
    let container = v1::ContainerState {
        id: container_id.clone(),
        process: process(4),
        started_at: 1_600_000_000_000_000_000,
        exit: exit(),
        log_dropped: 7,
    };
    let state = v1::StateReply {
        holder: process(2),
        containers: vec![container],
    };
    let of = || container_id.clone();
    let mut all = vec![
        ("Bootstrap", bootstrap.encode_to_vec()),
        ("Ready", ready.encode_to_vec()),
        (
            "Hello",
            request(Ask::Hello(v1::Hello {
                protocol: 1,
                daemon_version: "0.1.0".into(),
            })),
        ),
        ("State", request(Ask::State(v1::State {}))),
        ("Start", request(Ask::Start(start))),
        (
            "Signal",
            request(Ask::Signal(v1::Signal {
                container_id: of(),
                signal: 15,
                all: true,
            })),
        ),
        (
            "Delete",
            request(Ask::Delete(v1::Delete { container_id: of() })),
        ),
        ("Exec", request(Ask::Exec(exec))),
        (
            "Update",
            request(Ask::Update(v1::Update {
                container_id: of(),
                resources_json: b"{}".into(),
            })),
        ),
        (
            "ReopenLog",
            request(Ask::ReopenLog(v1::ReopenLog { container_id: of() })),
        ),
        ("Shutdown", request(Ask::Shutdown(v1::Shutdown {}))),
        (
            "KillExec",
            request(Ask::KillExec(v1::KillExec {
                container_id: of(),
                exec_id: exec_id.clone(),
            })),
        ),
        ("ResizePty", request(Ask::ResizePty(resize))),
        ("Ack", request(Ask::Ack(v1::Ack { container_id: of() }))),
        (
            "Attach",
            request(Ask::Attach(v1::Attach {
                container_id: of(),
                stdin: true,
                stdout: true,
                stderr: true,
            })),
        ),
        ("Done", answer(Answer::Done(v1::Done {}))),
        ("HelloReply", answer(Answer::Hello(hello))),
        ("StateReply", answer(Answer::State(state))),
        ("Started", answer(Answer::Started(process(4).unwrap()))),
        ("Attached", answer(Answer::Attached(v1::Attached {}))),
        (
            "Exited",
            event(event::Body::Exited(v1::Exited {
                container_id: of(),
                exit: exit(),
            })),
        ),
        (
            "ExecExited",
            event(event::Body::ExecExited(v1::ExecExited {
                container_id: of(),
                exec_id,
                code: 3,
            })),
        ),
        (
            "HolderExited",
            event(event::Body::HolderExited(v1::HolderExited {})),
        ),
        (
            "Oom",
            event(event::Body::Oom(v1::Oom { container_id: of() })),
        ),
        // Also what the shim writes to the bundle, for whichever daemon comes.
        ("ExitRecord", exit().unwrap().encode_to_vec()),
    ];
    for kind in 0..=8 {
        let name: &'static str = v1::ErrorKind::try_from(kind).unwrap().as_str_name();
        let message = "why".to_owned();
        all.push((name, answer(Answer::Error(v1::Error { kind, message }))));
    }
    all
}

#[test]
fn bytes_of_older_shims_mean_what_they_meant() {
    let frozen: BTreeMap<&str, &str> = include_str!("protocol-1.hex")
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.split_once(' ').unwrap())
        .collect();
    let present = protocol_1();
    for (name, bytes) in &present {
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            frozen.get(name).copied(),
            Some(hex.as_str()),
            "{name} of protocol 1: {ADVICE}"
        );
    }
    assert_eq!(frozen.len(), present.len());
}

/// A request that this version does not know is answered, and an event passed over.
#[test]
fn what_comes_later_is_decoded_without_a_body() {
    // Field 99.
    let later = [0x08, 7, 0x9a, 0x06, 0];
    let request = v1::Request::decode(later.as_slice()).unwrap();
    assert_eq!((request.id, request.body), (7, None));
    let message = v1::Message::decode(later.as_slice()).unwrap();
    assert_eq!((message.id, message.body), (7, None));
    let error = v1::Error {
        kind: 99,
        ..Default::default()
    };
    assert_eq!(error.kind(), v1::ErrorKind::Internal);
}
