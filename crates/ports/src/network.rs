//! A pod's network: attach it, detach it, say whether the node has one.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use async_trait::async_trait;
use gantry_types::PodId;

use crate::Error;

/// Transport protocol of a port mapping, as CRI's `Protocol`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

/// A port of the host that leads to a port of the pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortMapping {
    pub protocol: Protocol,
    pub container_port: u16,
    pub host_port: u16,
    /// Address of the host to listen on; empty means all.
    pub host_ip: String,
}

/// The pod's resolver configuration, for plugins with the `dns` capability.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dns {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

/// The pod whose network is wanted. The same value is given to attach and to detach.
#[derive(Clone, Debug)]
pub struct Attachment {
    pub pod: PodId,
    pub name: String,
    pub namespace: String,
    pub uid: String,
    /// The pinned network namespace; `None` at detach when it is gone (the plugin is then called
    /// with an empty path, as the CNI specification allows for DEL).
    pub netns: Option<PathBuf>,
    /// Mappings with host port zero only declare a port and are not passed to plugins.
    pub port_mappings: Vec<PortMapping>,
    /// `None` when the pod copies the host's resolv.conf.
    pub dns: Option<Dns>,
    /// Pod annotations: the bandwidth capability is read from them.
    pub annotations: BTreeMap<String, String>,
    /// Parent cgroup of the pod, for plugins with the `cgroupPath` capability; may be empty.
    pub cgroup_parent: String,
}

/// What attach gave. `raw` is kept with the pod and handed back at detach, so that a teardown
/// uses the configuration and result that the pod was made with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attached {
    /// Addresses of the pod, in the order that the plugin gave them; the first is the primary.
    pub ips: Vec<IpAddr>,
    /// Opaque to the core: JSON of the implementation.
    pub raw: Vec<u8>,
}

/// An address that plugins have given out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    pub pod: PodId,
    pub address: IpAddr,
    /// Who else it may be of; `None`: pods of this node alone use the network.
    pub other: Option<String>,
}

/// Why pods cannot be given a network now, in CRI's terms (`NetworkReady` condition).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotReady {
    /// One CamelCase word.
    pub reason: String,
    pub message: String,
}

#[async_trait]
pub trait Network: Send + Sync + 'static {
    /// Answers from memory: Status must never wait for a plugin.
    fn ready(&self) -> Result<(), NotReady>;

    /// What verbose Status shows under `cniconfig`.
    fn describe(&self) -> serde_json::Value;

    /// The opaque intent that the core records before `attach`, and hands to `detach` when no
    /// result was recorded: which configuration is about to be used.
    fn intent(&self) -> Result<Vec<u8>, Error>;

    /// Attaches under the configuration that `intent` names. On error whatever was half made has
    /// been handed to `detach` once; the core still owes another detach.
    async fn attach(&self, pod: &Attachment, intent: &[u8]) -> Result<Attached, Error>;

    /// Gives everything back; idempotent, also when attach failed midway or never ran.
    /// `raw` is `Attached::raw`, or the intent when there was no result.
    async fn detach(&self, pod: &Attachment, raw: &[u8]) -> Result<(), Error>;

    /// The addresses that plugins have given out, as far as they can be seen from outside. Blocks on
    /// the disk.
    fn held(&self) -> Result<Vec<Held>, Error>;

    /// Gives back what no pod of `valid` owns: leftovers of teardowns that never ran. `valid` must
    /// hold every pod for which an intent is recorded, those in flight included. Configurations
    /// that cannot collect are success. Not to be called while an attach may start unseen.
    async fn gc(&self, valid: &[PodId]) -> Result<(), Error>;

    /// CRI UpdateRuntimeConfig: the node's pod CIDRs, comma-separated.
    async fn update_pod_cidr(&self, cidr: &str) -> Result<(), Error>;
}
