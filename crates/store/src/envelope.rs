//! The wrapper around every stored value, in sled and in files.

use prost::Message;

use crate::record::Envelope;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    #[error("not a record: {0}")]
    Malformed(String),
    #[error("checksum does not match: the record is damaged")]
    Damaged,
    #[error("record has schema version {found}, this program knows {known}")]
    Version { found: u32, known: u32 },
    #[error("record has {field} {value}, which this program does not know")]
    Unknown { field: &'static str, value: i32 },
}

impl EnvelopeError {
    /// Whether a newer program can have written it, for which it is kept as it is. Otherwise it is
    /// damaged, and whoever has a copy may put that in its place.
    pub fn is_newer(&self) -> bool {
        match self {
            Self::Version { found, known } => found > known,
            Self::Unknown { .. } => true,
            Self::Malformed(_) | Self::Damaged => false,
        }
    }
}

/// Over the version too, so that an envelope cut before its payload is not a valid empty one.
fn checksum(version: u32, payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&version.to_le_bytes()), payload)
}

/// Encodes a record of schema `version`.
pub fn seal<M: Message>(version: u32, record: &M) -> Vec<u8> {
    let payload = record.encode_to_vec();
    let checksum = checksum(version, &payload);
    Envelope {
        version,
        payload,
        checksum,
    }
    .encode_to_vec()
}

/// Decodes what [`seal`] made; refuses damage and versions other than `version`.
pub fn open<M: Message + Default>(version: u32, bytes: &[u8]) -> Result<M, EnvelopeError> {
    let malformed = |e: prost::DecodeError| EnvelopeError::Malformed(e.to_string());
    let envelope = Envelope::decode(bytes).map_err(malformed)?;
    if checksum(envelope.version, &envelope.payload) != envelope.checksum {
        return Err(EnvelopeError::Damaged);
    }
    if envelope.version != version {
        return Err(EnvelopeError::Version {
            found: envelope.version,
            known: version,
        });
    }
    M::decode(envelope.payload.as_slice()).map_err(malformed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::PodStatus;

    #[test]
    fn every_damaged_byte_is_noticed() {
        let status = PodStatus {
            reason: "a reason".into(),
            ..Default::default()
        };
        let sealed = seal(1, &status);
        assert_eq!(open::<PodStatus>(1, &sealed).unwrap(), status);
        for at in 0..sealed.len() {
            let mut damaged = sealed.clone();
            damaged[at] ^= 0x10;
            assert!(
                open::<PodStatus>(1, &damaged).ok() != Some(status.clone()),
                "byte {at}"
            );
            assert!(open::<PodStatus>(1, &sealed[..at]).is_err(), "cut at {at}");
        }
    }
}
