//! Which protocol a client and this server speak after the upgrade.

use http::header::{CONNECTION, HeaderMap, HeaderName, SEC_WEBSOCKET_PROTOCOL, UPGRADE};

/// The client's protocols in its order; in the answer, the one chosen.
pub(crate) const PROTOCOL_VERSION: HeaderName =
    HeaderName::from_static("x-stream-protocol-version");

/// In a refusal: the protocols that would have been taken.
pub(crate) const ACCEPTED_VERSIONS: HeaderName =
    HeaderName::from_static("x-accepted-stream-protocol-versions");

/// Version of the remote command protocol: v2 closes streams in order, v3 resizes, v4 has exit codes,
/// v5 has half-closes over WebSocket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Version {
    V1,
    V2,
    V3,
    V4,
    V5,
}

/// A protocol's name on the wire and what it means.
pub(crate) type Table<T> = &'static [(&'static str, T)];

/// Remote commands over SPDY. v5 is for WebSocket alone: SPDY has half-closes of its own.
pub(crate) const REMOTE_COMMAND_SPDY: Table<Version> = &[
    ("v4.channel.k8s.io", Version::V4),
    ("v3.channel.k8s.io", Version::V3),
    ("v2.channel.k8s.io", Version::V2),
    ("channel.k8s.io", Version::V1),
];

pub(crate) const PORT_FORWARD_SPDY: Table<()> = &[("portforward.k8s.io", ())];

/// How a WebSocket message carries a channel's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// The channel's number as a byte, then the bytes.
    Binary,
    /// The channel's number as a digit, then the bytes in base64.
    Base64,
}

/// Remote commands over WebSocket; the empty name is that of a client that names none.
pub(crate) const REMOTE_COMMAND_WEBSOCKET: Table<(Version, Encoding)> = &[
    ("v5.channel.k8s.io", (Version::V5, Encoding::Binary)),
    ("v4.channel.k8s.io", (Version::V4, Encoding::Binary)),
    ("v4.base64.channel.k8s.io", (Version::V4, Encoding::Base64)),
    ("channel.k8s.io", (Version::V1, Encoding::Binary)),
    ("base64.channel.k8s.io", (Version::V1, Encoding::Base64)),
    ("", (Version::V1, Encoding::Binary)),
];

/// Port forwarding over WebSocket: SPDY inside messages, or a fixed pair of channels per port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Forward {
    Tunnel,
    Channels(Encoding),
}

pub(crate) const PORT_FORWARD_WEBSOCKET: Table<Forward> = &[
    ("SPDY/3.1+portforward.k8s.io", Forward::Tunnel),
    ("v4.channel.k8s.io", Forward::Channels(Encoding::Binary)),
    (
        "v4.base64.channel.k8s.io",
        Forward::Channels(Encoding::Base64),
    ),
    ("", Forward::Channels(Encoding::Binary)),
];

/// Why a client's request is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// 400: not an upgrade that this server understands.
    Bad(&'static str),
    /// 403: it names protocols, and none that is known here.
    Unknown {
        asked: Vec<String>,
        accepted: Vec<&'static str>,
    },
}

/// What a client wants its connection to become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Upgrade {
    Spdy,
    WebSocket,
}

/// The upgrade that the request asks for.
pub(crate) fn upgrade(headers: &HeaderMap) -> Result<Upgrade, Refusal> {
    let asks = values(headers, &CONNECTION).any(|token| token.eq_ignore_ascii_case("upgrade"));
    let to = |name: &str| values(headers, &UPGRADE).any(|token| token.eq_ignore_ascii_case(name));
    match (asks, to("websocket"), to("SPDY/3.1")) {
        (true, true, _) => Ok(Upgrade::WebSocket),
        (true, false, true) => Ok(Upgrade::Spdy),
        _ => Err(Refusal::Bad(
            "this is for clients that upgrade to SPDY/3.1 or WebSocket",
        )),
    }
}

/// The protocol for SPDY: the first of the client's list that `table` has.
pub(crate) fn spdy<T: Copy>(
    headers: &HeaderMap,
    table: Table<T>,
) -> Result<(&'static str, T), Refusal> {
    if !headers.contains_key(&PROTOCOL_VERSION) {
        return Err(Refusal::Bad(
            "the header X-Stream-Protocol-Version is missing",
        ));
    }
    let asked: Vec<&str> = values(headers, &PROTOCOL_VERSION).collect();
    if asked.is_empty() {
        return Err(Refusal::Bad(
            "the header X-Stream-Protocol-Version is empty",
        ));
    }
    first(&asked, table)
}

/// The protocol for WebSocket: the first of the client's list that `table` has. A client without a
/// list speaks the table's unnamed protocol.
pub(crate) fn websocket<T: Copy>(
    headers: &HeaderMap,
    table: Table<T>,
) -> Result<(&'static str, T), Refusal> {
    let mut asked: Vec<&str> = values(headers, &SEC_WEBSOCKET_PROTOCOL).collect();
    if asked.is_empty() {
        asked.push("");
    }
    first(&asked, table)
}

fn first<T: Copy>(asked: &[&str], table: Table<T>) -> Result<(&'static str, T), Refusal> {
    asked
        .iter()
        .find_map(|asked| table.iter().find(|(name, _)| name == asked).copied())
        .ok_or_else(|| Refusal::Unknown {
            asked: asked.iter().map(|name| (*name).to_owned()).collect(),
            accepted: table
                .iter()
                .map(|(name, _)| *name)
                .filter(|name| !name.is_empty())
                .collect(),
        })
}

/// The elements of all of a header's comma-separated lists.
fn values<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let lists = headers.get_all(name).into_iter();
    // What is not text names nothing that is known here.
    lists
        .filter_map(|list| list.to_str().ok())
        .flat_map(|list| list.split(','))
        .map(str::trim)
        .filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn headers(pairs: &[(HeaderName, &'static str)]) -> HeaderMap {
        let value = |value| HeaderValue::from_static(value);
        pairs
            .iter()
            .map(|(name, text)| (name.clone(), value(text)))
            .collect()
    }

    fn chosen(list: &'static str) -> Result<&'static str, Refusal> {
        spdy(&headers(&[(PROTOCOL_VERSION, list)]), REMOTE_COMMAND_SPDY).map(|(name, _)| name)
    }

    #[test]
    fn the_first_of_the_clients_list_wins() {
        assert_eq!(chosen("v4.channel.k8s.io"), Ok("v4.channel.k8s.io"));
        assert_eq!(
            chosen("v2.channel.k8s.io,v4.channel.k8s.io"),
            Ok("v2.channel.k8s.io")
        );
        assert_eq!(
            chosen(" v9 , channel.k8s.io , v4.channel.k8s.io"),
            Ok("channel.k8s.io")
        );
        let two = headers(&[
            (PROTOCOL_VERSION, "v9"),
            (PROTOCOL_VERSION, "v3.channel.k8s.io"),
        ]);
        let mut both = two.clone();
        both.append(
            &PROTOCOL_VERSION,
            HeaderValue::from_static("v4.channel.k8s.io"),
        );
        assert_eq!(spdy(&both, REMOTE_COMMAND_SPDY).unwrap().1, Version::V3);
    }

    #[test]
    fn a_list_without_a_known_one_is_told_the_known_ones() {
        assert_eq!(
            chosen("v5.channel.k8s.io, V4.channel.k8s.io"),
            Err(Refusal::Unknown {
                asked: vec!["v5.channel.k8s.io".into(), "V4.channel.k8s.io".into()],
                accepted: vec![
                    "v4.channel.k8s.io",
                    "v3.channel.k8s.io",
                    "v2.channel.k8s.io",
                    "channel.k8s.io"
                ],
            })
        );
    }

    #[test]
    fn no_list_is_a_bad_request_for_spdy_and_the_first_protocol_for_websocket() {
        for bad in [headers(&[]), headers(&[(PROTOCOL_VERSION, " , ")])] {
            assert!(matches!(
                spdy(&bad, REMOTE_COMMAND_SPDY),
                Err(Refusal::Bad(_))
            ));
        }
        assert_eq!(
            websocket(&headers(&[]), REMOTE_COMMAND_WEBSOCKET),
            Ok(("", (Version::V1, Encoding::Binary)))
        );
        let tunnel = headers(&[(SEC_WEBSOCKET_PROTOCOL, "x, SPDY/3.1+portforward.k8s.io")]);
        assert_eq!(
            websocket(&tunnel, PORT_FORWARD_WEBSOCKET).unwrap().1,
            Forward::Tunnel
        );
        assert!(websocket(&tunnel, REMOTE_COMMAND_WEBSOCKET).is_err());
    }

    #[test]
    fn an_upgrade_needs_both_headers() {
        let ask = |connection, to| upgrade(&headers(&[(CONNECTION, connection), (UPGRADE, to)]));
        assert_eq!(ask("Upgrade", "SPDY/3.1"), Ok(Upgrade::Spdy));
        assert_eq!(ask("keep-alive, upgrade", "spdy/3.1"), Ok(Upgrade::Spdy));
        assert_eq!(ask("Upgrade", "websocket"), Ok(Upgrade::WebSocket));
        for (connection, to) in [
            ("close", "SPDY/3.1"),
            ("Upgrade", "h2c"),
            ("Upgrade", "SPDY/3"),
        ] {
            assert!(
                matches!(ask(connection, to), Err(Refusal::Bad(_))),
                "{connection} {to}"
            );
        }
        assert!(upgrade(&headers(&[(UPGRADE, "websocket")])).is_err());
    }
}
