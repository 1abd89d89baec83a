//! What the docker configuration says about who you are to a registry.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::Error;
use crate::sys::files::read_bounded;

/// The longest configuration, and the longest answer of a helper, in bytes.
const MAX_CONFIG: u64 = 1 << 20;
/// As whom a helper gives a secret that is an identity token.
const TOKEN: &str = "<token>";

/// Who you are to a registry. Never shown.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Credentials {
    /// A name and a password.
    Basic { user: String, password: String },
    /// A token with which others can be had.
    Identity(String),
}

/// The part of the docker configuration that is about credentials.
#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Configuration {
    auths: BTreeMap<String, Entry>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Entry {
    auth: String,
    identitytoken: String,
    username: String,
    password: String,
}

/// What a helper answers.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    username: String,
    secret: String,
}

/// The credentials for a registry, if there are any: from `$DOCKER_CONFIG`, or `.docker` at home.
pub(super) fn find(host: &str) -> Result<Option<Credentials>, Error> {
    let set = |name| env::var_os(name).filter(|value: &OsString| !value.is_empty()).map(PathBuf::from);
    let folder = set("DOCKER_CONFIG").or_else(|| set("HOME").map(|home| home.join(".docker")));
    let Some(path) = folder.map(|folder| folder.join("config.json")) else { return Ok(None) };
    let refuse = |why: String| Error::Configuration { path: path.clone(), why };
    let bytes = match read_bounded(&path, MAX_CONFIG) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|error| refuse(error.source.to_string()))?,
    };
    // What is wrong and where, but nothing of what stands there.
    let broken =
        |error: serde_json::Error| format!("line {}, column {}: {:?}", error.line(), error.column(), error.classify());
    let configuration: Configuration = serde_json::from_slice(&bytes).map_err(|error| refuse(broken(error)))?;
    configuration.find(host, ask_helper, refuse)
}

impl Configuration {
    fn find(
        &self,
        host: &str,
        ask: impl Fn(&str, &str) -> Result<Option<Credentials>, Error>,
        refuse: impl Fn(String) -> Error,
    ) -> Result<Option<Credentials>, Error> {
        let helper = self.cred_helpers.get(host).unwrap_or(&self.creds_store);
        if !helper.is_empty()
            && let Some(found) = ask(helper, host)?
        {
            return Ok(Some(found));
        }
        // Docker has written whole addresses, once.
        let names = |key: &str| {
            let rest = key.split_once("://").map_or(key, |(_, rest)| rest);
            rest.split('/').next() == Some(host)
        };
        let entry =
            self.auths.get(host).or_else(|| self.auths.iter().find(|(key, _)| names(key)).map(|(_, entry)| entry));
        let Some(entry) = entry else { return Ok(None) };
        if !entry.identitytoken.is_empty() {
            return Ok(Some(Credentials::Identity(entry.identitytoken.clone())));
        }
        if entry.auth.is_empty() {
            let basic = || Credentials::Basic { user: entry.username.clone(), password: entry.password.clone() };
            return Ok((!entry.username.is_empty()).then(basic));
        }
        let text =
            STANDARD.decode(entry.auth.trim_end_matches('\0')).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let pair = text.as_deref().and_then(|text| text.trim_end_matches('\0').split_once(':'));
        let (user, password) =
            pair.ok_or_else(|| refuse(format!("`auth` of {host} is not base64 of USER:PASSWORD")))?;
        Ok(Some(Credentials::Basic { user: user.into(), password: password.into() }))
    }
}

impl Credentials {
    /// The header that says who you are.
    pub(super) fn basic(&self) -> Option<String> {
        match self {
            Credentials::Basic { user, password } => {
                Some(format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))))
            }
            Credentials::Identity(_) => None,
        }
    }
}

/// Asks the program `docker-credential-NAME`, as docker does.
fn ask_helper(name: &str, host: &str) -> Result<Option<Credentials>, Error> {
    let program = format!("docker-credential-{name}");
    let fail = |why: String| Error::Helper { program: program.escape_debug().to_string(), why };
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if !name.bytes().all(plain) {
        return Err(fail("that is no program's name".into()));
    }
    let run = || -> io::Result<(Vec<u8>, bool)> {
        let mut command = Command::new(&program);
        let mut child = command.arg("get").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            // One that has heard enough says so with its answer.
            let _ = stdin.write_all(host.as_bytes());
        }
        let mut said = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            stdout.take(MAX_CONFIG).read_to_end(&mut said)?;
        }
        Ok((said, child.wait()?.success()))
    };
    let (said, good) = run().map_err(|error| fail(error.to_string()))?;
    if !good {
        let said = String::from_utf8_lossy(&said);
        // The words of docker's own helpers.
        return match said.contains("credentials not found") {
            true => Ok(None),
            false => Err(fail(said.chars().filter(|c| !c.is_control()).take(200).collect())),
        };
    }
    let Answer { username, secret } =
        serde_json::from_slice(&said).map_err(|_| fail("it answers something else".into()))?;
    Ok(Some(match username == TOKEN {
        true => Credentials::Identity(secret),
        false => Credentials::Basic { user: username, password: secret },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(json: &str, host: &str) -> Result<Option<Credentials>, Error> {
        let configuration: Configuration = serde_json::from_str(json).unwrap();
        let ask = |helper: &str, host: &str| {
            let known = host != "unknown.example";
            Ok(known.then(|| Credentials::Basic { user: helper.into(), password: host.into() }))
        };
        configuration.find(host, ask, |why| Error::Configuration { path: "config.json".into(), why })
    }

    fn basic(user: &str, password: &str) -> Option<Credentials> {
        Some(Credentials::Basic { user: user.into(), password: password.into() })
    }

    #[test]
    fn credentials_are_found_as_docker_finds_them() {
        let json = r#"{
            "auths": {
                "a.example": {"auth": "YW5uYTpwdXJyOnB1cnI="},
                "https://b.example/v1/": {"identitytoken": "t"},
                "c.example:5000": {"username": "u", "password": "p"},
                "d.example": {"auth": "!"},
                "empty.example": {},
                "unknown.example": {"auth": "YTpi"}
            },
            "credHelpers": {"h.example": "special"},
            "somethingElse": 3
        }"#;
        assert!(found(json, "a.example").unwrap() == basic("anna", "purr:purr"));
        assert!(found(json, "b.example").unwrap() == Some(Credentials::Identity("t".into())));
        assert!(found(json, "c.example:5000").unwrap() == basic("u", "p"));
        assert!(matches!(found(json, "d.example"), Err(Error::Configuration { why, .. }) if why.contains("d.example")));
        assert!(found(json, "h.example").unwrap() == basic("special", "h.example"));
        for none in ["c.example", "empty.example", "b.example.org", "x"] {
            assert!(found(json, none).unwrap().is_none(), "{none}");
        }
        let store = json.replace(r#""somethingElse": 3"#, r#""credsStore": "chain""#);
        assert!(found(&store, "a.example").unwrap() == basic("chain", "a.example"));
        assert!(found(&store, "unknown.example").unwrap() == basic("a", "b"));
        assert_eq!(basic("anna", "purr:purr").unwrap().basic().unwrap(), "Basic YW5uYTpwdXJyOnB1cnI=");
        assert!(found("{}", "a.example").unwrap().is_none());
    }

    #[test]
    fn helpers_that_are_no_programs_are_named() {
        for (name, why) in [("../x", "no program's name"), ("of-catnaps-that-is-nowhere", "No such file")] {
            let error = ask_helper(name, "a.example").err().unwrap().to_string();
            assert!(error.contains(why) && error.contains(name), "{error}");
        }
    }
}
