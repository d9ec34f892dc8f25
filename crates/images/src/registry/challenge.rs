//! `WWW-Authenticate` (RFC 9110, section 11.6.1).

/// A challenge that we can answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Challenge {
    Basic,
    /// Get a token from `realm` (distribution specification, token authentication).
    Bearer {
        realm: String,
        service: String,
        scope: String,
    },
}

/// Most bytes of a header that are looked at.
const HEADER_MAX: usize = 8192;

/// The challenges of one header value, in its order; what cannot be parsed ends the list.
pub fn parse(header: &str) -> Vec<Challenge> {
    let mut challenges = Vec::new();
    let mut scheme: Option<(String, Vec<(String, String)>)> = None;
    let mut rest = header.get(..HEADER_MAX).unwrap_or(header);
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let end = rest.find(|c: char| !is_token(c)).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        if word.is_empty() {
            break;
        }
        let trimmed = after.trim_start_matches([' ', '\t']);
        match (trimmed.strip_prefix('='), &mut scheme) {
            (Some(value), Some((_, parameters))) => {
                let Some((value, after)) = parameter(value.trim_start_matches([' ', '\t'])) else {
                    break;
                };
                parameters.push((word.to_ascii_lowercase(), value));
                rest = after;
            }
            _ => {
                challenges.extend(scheme.take().and_then(finish));
                scheme = Some((word.to_ascii_lowercase(), Vec::new()));
                rest = after;
            }
        }
    }
    challenges.extend(scheme.and_then(finish));
    challenges
}

fn is_token(c: char) -> bool {
    c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c)
}

/// A token or a quoted string, and what follows it.
fn parameter(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text
            .find(|c: char| c == ',' || c.is_whitespace())
            .unwrap_or(text.len());
        return Some((text[..end].to_owned(), &text[end..]));
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, c)) = characters.next() {
        match c {
            '"' => return Some((value, &quoted[at + 1..])),
            '\\' => value.push(characters.next()?.1),
            c => value.push(c),
        }
    }
    None
}

fn finish((scheme, parameters): (String, Vec<(String, String)>)) -> Option<Challenge> {
    let get = |name: &str| {
        let found = parameters.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.clone()).unwrap_or_default()
    };
    match scheme.as_str() {
        "basic" => Some(Challenge::Basic),
        "bearer" if !get("realm").is_empty() => Some(Challenge::Bearer {
            realm: get("realm"),
            service: get("service"),
            scope: get("scope"),
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read() {
        let bearer = Challenge::Bearer {
            realm: "https://auth.io/token".into(),
            service: "r.io".into(),
            scope: "repository:a/b:pull,push".into(),
        };
        let text = "Bearer realm=\"https://auth.io/token\",service=\"r.io\", \
                    scope=\"repository:a/b:pull,push\"";
        assert_eq!(parse(text), std::slice::from_ref(&bearer));
        assert_eq!(
            parse(&format!("Basic realm=\"a \\\"b\\\", c\", {text}")),
            [Challenge::Basic, bearer]
        );
        assert_eq!(parse("basic"), [Challenge::Basic]);
        assert_eq!(parse("Negotiate abc==, Basic realm=x"), [Challenge::Basic]);
    }

    #[test]
    fn nonsense_is_no_challenge() {
        for text in [
            "",
            "Bearer",
            "Bearer realm=",
            "Bearer realm=\"x",
            "=",
            "\"",
            ",,,",
            "é",
            "Digest a=\"b\"",
        ] {
            assert_eq!(parse(text), [], "{text}");
        }
        let long = format!("Bearer realm=\"{}\"", "é".repeat(HEADER_MAX));
        parse(&long);
    }
}
