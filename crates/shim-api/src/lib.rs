//! Messages and framing between gantryd and gantry-shim.
