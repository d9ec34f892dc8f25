//! Generated from `proto/admin/v1`: what gantryctl asks of gantryd beyond CRI.

/// Package `gantry.admin.v1`.
pub mod v1 {
    #![allow(clippy::all)]
    tonic::include_proto!("gantry.admin.v1");
}
