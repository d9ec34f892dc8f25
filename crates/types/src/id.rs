//! Ids of pods and containers: 64 lower-case hexadecimal digits, as every node agent expects.

use std::fmt;
use std::str::FromStr;

/// Length of an id in characters.
pub const ID_LEN: usize = 64;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("id {0:?} is not 64 lower-case hexadecimal digits")]
pub struct IdError(pub String);

fn parse(text: &str) -> Result<Box<str>, IdError> {
    let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    if text.len() == ID_LEN && text.bytes().all(hex) {
        Ok(text.into())
    } else {
        // An id reaches error messages and file names: show at most a screenful of a bad one.
        Err(IdError(text.chars().take(80).collect()))
    }
}

fn to_hex(bytes: [u8; ID_LEN / 2]) -> Box<str> {
    use fmt::Write;
    let mut text = String::with_capacity(ID_LEN);
    for byte in bytes {
        let _ = write!(text, "{byte:02x}");
    }
    text.into()
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Box<str>);

        impl $name {
            /// An id from 32 random bytes, which the caller draws: this crate does no I/O.
            pub fn from_random(bytes: [u8; ID_LEN / 2]) -> Self {
                Self(to_hex(bytes))
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// The first 13 digits, for logs and interface names.
            pub fn short(&self) -> &str {
                &self.0[..13]
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                parse(text).map(Self)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.short())
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
    };
}

id!(
    /// A pod sandbox.
    PodId
);
id!(
    /// A container of a pod.
    ContainerId
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_64_lower_case_hex_digits_are_an_id() {
        let good = "0123456789abcdef".repeat(4);
        assert_eq!(good.parse::<PodId>().unwrap().as_str(), good);
        let traversal = format!("../{}", &good[3..]);
        for bad in [
            "",
            "abc",
            "../../etc",
            &good.to_uppercase(),
            &format!("{good}0"),
            &traversal,
        ] {
            assert!(bad.parse::<PodId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_random_id_parses() {
        let id = ContainerId::from_random([0xab; 32]);
        assert_eq!(id.as_str().parse::<ContainerId>().unwrap(), id);
        assert_eq!(id.short().len(), 13);
    }
}
