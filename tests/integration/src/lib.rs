//! Tests that drive a real gantryd over its socket.
