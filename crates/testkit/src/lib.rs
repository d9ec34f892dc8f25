//! Image builder, local registry, fakes, failpoints, leak check.
