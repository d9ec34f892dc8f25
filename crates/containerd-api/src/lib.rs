//! Generated from `proto/containerd`: the part of containerd's API v1 that cAdvisor uses. Modules are
//! named as containerd's packages are.

#![allow(clippy::all)]

pub mod services {
    pub mod containers {
        pub mod v1 {
            tonic::include_proto!("containerd.services.containers.v1");
        }
    }
    pub mod tasks {
        pub mod v1 {
            tonic::include_proto!("containerd.services.tasks.v1");
        }
    }
    pub mod version {
        pub mod v1 {
            tonic::include_proto!("containerd.services.version.v1");
        }
    }
}

pub mod v1 {
    pub mod types {
        tonic::include_proto!("containerd.v1.types");
    }
}
