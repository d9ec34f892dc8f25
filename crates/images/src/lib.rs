//! References, registry client, content store, pull pipeline, unpack, import and export.
