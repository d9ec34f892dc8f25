//! The gRPC services: validate, convert, call, map errors.
