//! Credential helpers: `docker-credential-NAME get` (docker/docker-credential-helpers, README).
//!
//! The server's name goes in by standard input; a JSON object comes out. The programs are the
//! administrator's, but a hung or talkative one must not hold up the node.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

use crate::credentials::{Credentials, canonical};

/// Helpers ask cloud services, whose answers take seconds.
const TIMEOUT: Duration = Duration::from_secs(30);
const OUTPUT_MAX: u64 = 64 << 10;
/// What docker says is the server of its hub.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";
/// The user name that says that the secret is an identity token.
const TOKEN: &str = "<token>";
/// What a helper says when it has none; by the protocol on standard output.
const NOT_FOUND: &str = "credentials not found";

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

/// Whether a name makes a program's name and nothing else.
pub fn is_name(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    !name.is_empty() && name.len() <= 64 && name.bytes().all(plain)
}

/// What the helper has for `host`. Errors say what went wrong with the program and nothing that
/// it has written.
pub async fn get(
    dir: Option<&Path>,
    name: &str,
    host: &str,
) -> Result<Option<Credentials>, String> {
    get_within(dir, name, host, TIMEOUT).await
}

async fn get_within(
    dir: Option<&Path>,
    name: &str,
    host: &str,
    timeout: Duration,
) -> Result<Option<Credentials>, String> {
    if !is_name(name) {
        return Err(
            "the name of a credential helper has other characters than letters, digits, \
                    '-', '_' and '.'"
                .to_owned(),
        );
    }
    let program = format!("docker-credential-{name}");
    let path = dir.map_or_else(|| program.clone().into(), |dir| dir.join(&program));
    let fail = |reason: &dyn std::fmt::Display| format!("{program}: {reason}");
    let child = Command::new(path)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        // Its own children too end with it.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| fail(&e))?;
    let mut group = Group(child);
    let server = match canonical(host).as_str() {
        "docker.io" => DOCKER_HUB,
        _ => host,
    };
    let (output, status) = tokio::time::timeout(timeout, talk(&mut group.0, server))
        .await
        .map_err(|_| fail(&format_args!("no answer within {timeout:?}")))?
        .map_err(|e| fail(&e))?;
    if output.len() as u64 > OUTPUT_MAX {
        return Err(fail(&format_args!(
            "more than {OUTPUT_MAX} bytes of output"
        )));
    }
    if !status.success() {
        let none = String::from_utf8_lossy(&output).contains(NOT_FOUND);
        return if none { Ok(None) } else { Err(fail(&status)) };
    }
    let answer: Answer =
        serde_json::from_slice(&output).map_err(|_| fail(&"its output is not what `get` gives"))?;
    if answer.secret.is_empty() {
        return Ok(None);
    }
    Ok(Some(if answer.username == TOKEN {
        Credentials {
            identity_token: answer.secret,
            ..Credentials::default()
        }
    } else {
        Credentials {
            username: answer.username,
            password: answer.secret,
            ..Credentials::default()
        }
    }))
}

async fn talk(
    child: &mut Child,
    server: &str,
) -> std::io::Result<(Vec<u8>, std::process::ExitStatus)> {
    if let Some(mut input) = child.stdin.take() {
        match input.write_all(server.as_bytes()).await {
            // One that answers without listening.
            Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => {}
            written => written?,
        }
    }
    let mut output = Vec::new();
    if let Some(out) = child.stdout.take() {
        out.take(OUTPUT_MAX + 1).read_to_end(&mut output).await?;
    }
    Ok((output, child.wait().await?))
}

/// A helper with its children, killed when nobody waits for it any more.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        let pid = self.0.id().and_then(|pid| i32::try_from(pid).ok());
        // Without an id it has been waited for, and the number may be another's.
        if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Written by a process of its own: one that another test forks meanwhile would inherit a
    /// descriptor for writing, and executing the file would fail with ETXTBSY.
    fn helper(script: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("docker-credential-test");
        let mut writer = std::process::Command::new("sh")
            .args(["-c", "cat >\"$0\" && chmod 755 \"$0\""])
            .arg(&path)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = writer.stdin.take().unwrap();
        std::io::Write::write_all(&mut input, format!("#!/bin/sh\n{script}\n").as_bytes()).unwrap();
        drop(input);
        assert!(writer.wait().unwrap().success());
        dir
    }

    async fn ask(script: &str, host: &str) -> Result<Option<Credentials>, String> {
        ask_within(script, host, TIMEOUT).await
    }

    async fn ask_within(
        script: &str,
        host: &str,
        timeout: Duration,
    ) -> Result<Option<Credentials>, String> {
        let dir = helper(script);
        get_within(Some(dir.path()), "test", host, timeout).await
    }

    #[tokio::test]
    async fn a_helper_is_asked_by_the_servers_name() {
        let script = r#"[ "$1" = get ] || exit 9
            read -r server
            echo "{\"ServerURL\": \"$server\", \"Username\": \"$server\", \"Secret\": \"s\"}""#;
        let found = ask(script, "r.io:5000").await.unwrap().unwrap();
        assert_eq!(
            (found.username.as_str(), found.password.as_str()),
            ("r.io:5000", "s")
        );
        let found = ask(script, "registry-1.docker.io").await.unwrap().unwrap();
        assert_eq!(found.username, DOCKER_HUB);
        let script = r#"echo '{"Username": "<token>", "Secret": "refresh"}'"#;
        let found = ask(script, "r.io").await.unwrap().unwrap();
        assert_eq!(
            (found.identity_token.as_str(), found.username.as_str()),
            ("refresh", "")
        );
    }

    #[tokio::test]
    async fn a_helper_may_have_none() {
        let script = "echo credentials not found in native keychain; exit 1";
        assert_eq!(ask(script, "r.io").await, Ok(None));
        assert_eq!(ask("echo '{}'", "r.io").await, Ok(None));
    }

    #[tokio::test]
    async fn a_helper_that_fails_hangs_or_babbles_is_an_error_that_shows_no_secret() {
        let start = std::time::Instant::now();
        let babble = "while :; do echo hunter2hunter2hunter2; done";
        for (script, part, timeout) in [
            ("echo hunter2; exit 3", "exit status: 3", TIMEOUT),
            ("echo hunter2", "not what", TIMEOUT),
            ("sleep 1000 & wait", "no answer", Duration::from_secs(2)),
            (babble, "more than", TIMEOUT),
        ] {
            let error = ask_within(script, "r.io", timeout).await.unwrap_err();
            assert!(
                error.contains("docker-credential-test") && error.contains(part),
                "{script}: {error}"
            );
            assert!(!error.contains("hunter2"), "{error}");
        }
        assert!(start.elapsed() < Duration::from_secs(300));
        let dir = tempfile::tempdir().unwrap();
        assert!(get(Some(dir.path()), "absent", "r.io").await.is_err());
        for name in ["", "../x", "a/b", "a b"] {
            assert!(get(None, name, "r.io").await.is_err(), "{name}");
        }
    }
}
