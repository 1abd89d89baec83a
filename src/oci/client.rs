use std::io::Read;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::Deserialize;
use ureq::http::header::{
    ACCEPT, AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, LOCATION, RETRY_AFTER, WWW_AUTHENTICATE,
};
use ureq::http::{Method, Request, StatusCode, Uri};
use ureq::{Agent, Body};

use super::auth::Challenge;
use super::credentials::{self, Credentials};
use super::reference::is_loopback;
use super::{Error, Presence, Reference, Version, transport};
use crate::snapshot::Digest;
use crate::sys::process;

/// The longest manifest that is taken or given, in bytes; registries take none that is longer.
pub const MAX_MANIFEST: u64 = 4 << 20;
/// The longest answer that is not a blob or a manifest.
const MAX_SAID: u64 = 64 << 10;
/// How much of what a registry says is shown.
const MAX_SHOWN: usize = 200;
/// How often something is tried that may go better the next time.
const TRIES: u32 = 5;
/// How long to wait before the second try; twice as long before each other.
const PAUSE: Duration = Duration::from_millis(300);
/// The longest that a registry may make us wait between two tries.
const MAX_PAUSE: Duration = Duration::from_secs(30);
const MAX_REDIRECTS: usize = 5;

/// What is to be done in a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading.
    Pull,
    /// Reading and writing.
    Push,
}

/// A repository of a registry. Can be used by many threads.
pub struct Client {
    agent: Agent,
    reference: Reference,
    /// The beginning of the registry's addresses: scheme and host.
    origin: String,
    access: Access,
    credentials: Option<Credentials>,
    /// What goes into the `Authorization` header, once the registry has asked for it.
    authorization: Mutex<Option<String>>,
}

/// An answer that is no error.
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Body,
}

impl Client {
    /// A client for the repository of `reference`, with the credentials of the docker configuration. In the clear
    /// only when `plain` is wished, or to a registry on this machine that speaks nothing else.
    pub fn new(reference: &Reference, access: Access, plain: bool) -> Result<Client, Error> {
        let (agent, encrypted) = transport::agent(reference, plain)?;
        let scheme = if encrypted { "https" } else { "http" };
        Ok(Client {
            agent,
            origin: format!("{scheme}://{}", reference.host),
            access,
            credentials: credentials::find(&reference.host)?,
            authorization: Mutex::new(None),
            reference: reference.clone(),
        })
    }

    /// What it was made for.
    pub fn reference(&self) -> &Reference {
        &self.reference
    }

    /// The manifest, of a type that is accepted.
    pub fn manifest(&self, accept: &str) -> Result<Vec<u8>, Error> {
        let url = self.url(&format!("manifests/{}", self.reference.version));
        self.again(|| {
            let answer = self.get(&url, &[(ACCEPT.as_str(), accept)], "give the manifest")?;
            let bytes = self.bytes(answer, MAX_MANIFEST)?;
            match (&self.reference.version, Digest::of(&bytes)) {
                (Version::Digest(digest), found) if *digest != found => {
                    Err(self.strange(format!("the manifest's digest is {found}")))
                }
                _ => Ok(bytes),
            }
        })
    }

    /// Gives the tag, or the digest, to a manifest, all of whose blobs are there.
    pub fn put_manifest(&self, bytes: &[u8], media_type: &str) -> Result<(), Error> {
        let url = self.url(&format!("manifests/{}", self.reference.version));
        let headers = [(CONTENT_TYPE.as_str(), media_type)];
        self.again(|| self.call(Method::PUT, &url, &headers, bytes, "take the manifest").map(drop))
    }

    /// Whether a blob is there. One that it sends us elsewhere for is when it is there. One of another length than this,
    /// if the registry says that, is damaged.
    pub fn has_blob(&self, digest: &Digest, length: u64) -> Result<Presence, Error> {
        let url = self.url(&format!("blobs/{digest}"));
        self.again(|| match self.follow(Method::HEAD, &url, &[], "tell whether a blob is there") {
            Ok(answer) => {
                let found = header(&answer.headers, CONTENT_LENGTH.as_str()).and_then(|text| text.parse().ok());
                // No blob has no bytes at all; a server that counts those of its answer may say so.
                Ok(found.filter(|found| ![0, length].contains(found)).map_or(Presence::Whole, Presence::Damaged))
            }
            Err(Error::NotFound(_)) => Ok(Presence::Missing),
            Err(error) => Err(error),
        })
    }

    /// A blob of this length, which is what its digest says.
    pub fn blob(&self, digest: &Digest, length: u64) -> Result<Vec<u8>, Error> {
        let url = self.url(&format!("blobs/{digest}"));
        self.again(|| {
            let bytes = self.get(&url, &[], "give a blob").and_then(|answer| self.bytes(answer, length))?;
            match Digest::of(&bytes) {
                found if found == *digest && bytes.len() as u64 == length => Ok(bytes),
                found => Err(self.strange(format!("{digest} has the digest {found} and {} bytes", bytes.len()))),
            }
        })
    }

    /// Puts a blob there. A registry that has one of that digest may keep it as it is.
    pub fn put_blob(&self, digest: &Digest, bytes: &[u8]) -> Result<(), Error> {
        let begin = self.url("blobs/uploads/");
        let doing = "take a blob";
        // Another try begins a new upload: what became of the first is not worth a question for so little.
        self.again(|| {
            let answer = self.call(Method::POST, &begin, &[], &[], doing)?;
            let location = header(&answer.headers, LOCATION.as_str());
            let location = location.ok_or_else(|| self.strange("it takes a blob and does not say where".into()))?;
            let mut url = self.resolve(&begin, location)?;
            url.push(if url.contains('?') { '&' } else { '?' });
            url += &format!("digest={digest}");
            let headers = [(CONTENT_TYPE.as_str(), "application/octet-stream")];
            self.call(Method::PUT, &url, &headers, bytes, doing).map(drop)
        })
    }

    fn url(&self, path: &str) -> String {
        format!("{}/v2/{}/{path}", self.origin, self.reference.repository)
    }

    fn get(&self, url: &str, headers: &[(&str, &str)], doing: &'static str) -> Result<Answer, Error> {
        self.follow(Method::GET, url, headers, doing)
    }

    /// Follows redirects, as to where a registry keeps its blobs. Credentials do not go there.
    fn follow(
        &self,
        method: Method,
        url: &str,
        headers: &[(&str, &str)],
        doing: &'static str,
    ) -> Result<Answer, Error> {
        let mut url = url.to_owned();
        for _ in 0..=MAX_REDIRECTS {
            let answer = self.call(method.clone(), &url, headers, &[], doing)?;
            if !answer.status.is_redirection() {
                return Ok(answer);
            }
            let location = header(&answer.headers, LOCATION.as_str());
            let location =
                location.ok_or_else(|| self.strange("it sends us elsewhere and does not say where".into()))?;
            url = self.resolve(&url, location)?;
        }
        Err(self.strange("it sends us from one place to another".into()))
    }

    /// One request, again with credentials when it is refused without.
    fn call(
        &self,
        method: Method,
        url: &str,
        headers: &[(&str, &str)],
        body: &[u8],
        doing: &'static str,
    ) -> Result<Answer, Error> {
        let ours = self.is_ours(url);
        let authorization = if ours { self.authorization() } else { None };
        let answer = self.send(&method, url, headers, body, authorization.as_deref())?;
        if answer.status != StatusCode::UNAUTHORIZED || !ours {
            return self.judge(answer, &method, url, doing);
        }
        let asked = answer.headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
        let Some(challenge) = Challenge::find(asked) else { return self.judge(answer, &method, url, doing) };
        let Some(authorization) = self.authorize(&challenge, authorization.as_deref(), doing)? else {
            return self.judge(answer, &method, url, doing);
        };
        drop(answer);
        let answer = self.send(&method, url, headers, body, Some(&authorization))?;
        self.judge(answer, &method, url, doing)
    }

    fn send(
        &self,
        method: &Method,
        url: &str,
        headers: &[(&str, &str)],
        body: &[u8],
        authorization: Option<&str>,
    ) -> Result<Answer, Error> {
        let mut request = Request::builder().method(method).uri(url);
        for (name, value) in headers.iter().copied().chain(authorization.map(|value| (AUTHORIZATION.as_str(), value))) {
            request = request.header(name, value);
        }
        let with_body = matches!(*method, Method::POST | Method::PUT);
        let sent = match with_body {
            true => request.body(body).map(|request| self.agent.run(request)),
            false => request.body(()).map(|request| self.agent.run(request)),
        };
        let answer = sent.map_err(|_| self.strange("an address of it is none".into()))?;
        let (parts, body) = answer.map_err(|error| self.unreachable(&error))?.into_parts();
        Ok(Answer { status: parts.status, headers: parts.headers, body })
    }

    /// Makes an error of an answer that is one. A redirect is one for whoever gives: nothing was taken.
    fn judge(&self, answer: Answer, method: &Method, url: &str, doing: &'static str) -> Result<Answer, Error> {
        let (host, status) = (self.reference.host.clone(), answer.status);
        let asks = matches!(*method, Method::GET | Method::HEAD);
        if status.is_success() || asks && status.is_redirection() {
            return Ok(answer);
        }
        if status.is_redirection() {
            // Only the host is shown: the rest may hold secrets.
            let to = header(&answer.headers, LOCATION.as_str()).and_then(|location| self.resolve(url, location).ok());
            let to = to.and_then(|to| to.parse::<Uri>().ok()?.authority().map(ToString::to_string));
            let to = to.unwrap_or_else(|| "another place".into());
            return Err(self.strange(format!("asked to {doing}, it answers {} and sends us to {to}", status.as_u16())));
        }
        if let Some(pause) = header(&answer.headers, RETRY_AFTER.as_str()).and_then(|value| value.parse().ok()) {
            rest(Duration::from_secs(pause).min(MAX_PAUSE))?;
        }
        let said = self.said(answer);
        Err(match status {
            StatusCode::NOT_FOUND => {
                let what =
                    url.rsplit_once("/blobs/").map(|(_, digest)| format!("the blob {digest} of {}", self.reference));
                Error::NotFound(what.unwrap_or_else(|| self.reference.to_string()))
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Error::Denied { host, doing: self.allowance(), said },
            _ => Error::Answer { host, doing, status: status.as_u16(), said },
        })
    }

    fn allowance(&self) -> &'static str {
        match self.access {
            Access::Pull => "pull from there",
            Access::Push => "push to there",
        }
    }

    fn authorization(&self) -> Option<String> {
        self.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What to send as authorization from now on. `None` when there is nothing to say, or that was refused.
    fn authorize(
        &self,
        challenge: &Challenge,
        used: Option<&str>,
        doing: &'static str,
    ) -> Result<Option<String>, Error> {
        let mut known = self.authorization.lock().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have asked meanwhile.
        if known.is_some() && known.as_deref() != used {
            return Ok(known.clone());
        }
        let fresh = match challenge {
            Challenge::Basic => self.credentials.as_ref().and_then(Credentials::basic),
            Challenge::Bearer { realm, service } => {
                Some(format!("Bearer {}", self.token(realm, service.as_deref(), doing)?))
            }
        };
        if fresh.as_deref() == used {
            return Ok(None);
        }
        known.clone_from(&fresh);
        Ok(fresh)
    }

    /// A token for the repository (docker's "Token Authentication Specification", and its OAuth 2 flow).
    fn token(&self, realm: &str, service: Option<&str>, doing: &'static str) -> Result<String, Error> {
        /// Older servers know the one name, newer ones the other.
        #[derive(Deserialize)]
        struct Token {
            #[serde(default)]
            token: String,
            #[serde(default)]
            access_token: String,
        }
        let realm = self.resolve(&self.origin, realm)?;
        let action = if self.access == Access::Push { "pull,push" } else { "pull" };
        let scope = format!("repository:{}:{action}", self.reference.repository);
        let answered = match &self.credentials {
            Some(Credentials::Identity(token)) => {
                let mut form = vec![("grant_type", "refresh_token"), ("refresh_token", token), ("client_id", "catnap")];
                form.extend(service.map(|service| ("service", service)));
                form.push(("scope", &scope));
                self.agent.post(&realm).send_form(form)
            }
            credentials => {
                let mut request = self.agent.get(&realm).query("scope", &scope);
                if let Some(service) = service {
                    request = request.query("service", service);
                }
                if let Some(basic) = credentials.as_ref().and_then(Credentials::basic) {
                    request = request.header(AUTHORIZATION, basic);
                }
                request.call()
            }
        };
        let (parts, body) = answered.map_err(|error| self.unreachable(&error))?.into_parts();
        let answer = Answer { status: parts.status, headers: parts.headers, body };
        if !answer.status.is_success() {
            let (host, status) = (self.reference.host.clone(), answer.status);
            return Err(match status.is_client_error() && status != StatusCode::TOO_MANY_REQUESTS {
                true => Error::Denied { host, doing: self.allowance(), said: self.said(answer) },
                false => Error::Answer { host, doing, status: status.as_u16(), said: self.said(answer) },
            });
        }
        let token = serde_json::from_slice(&self.bytes(answer, MAX_SAID)?).ok();
        let token = token.map(|Token { token, access_token }| if token.is_empty() { access_token } else { token });
        let visible = |token: &String| !token.is_empty() && token.bytes().all(|b| b.is_ascii_graphic());
        token.filter(visible).ok_or_else(|| self.strange("its token server gives no token".into()))
    }

    /// The whole body, which may not have more bytes than this.
    fn bytes(&self, answer: Answer, limit: u64) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        let mut reader = answer.body.into_reader().take(limit + 1);
        reader.read_to_end(&mut bytes).map_err(|error| self.broken(error.to_string()))?;
        match bytes.len() as u64 > limit {
            false => Ok(bytes),
            true => Err(self.strange(format!("more than the {limit} bytes that it can have"))),
        }
    }

    /// What a registry says about an error, harmless and short.
    fn said(&self, answer: Answer) -> String {
        /// The body of an error (OCI Distribution Specification, "Error Codes").
        #[derive(Deserialize)]
        struct Errors {
            errors: Vec<Said>,
        }
        #[derive(Deserialize)]
        struct Said {
            #[serde(default)]
            message: String,
        }
        let bytes = self.bytes(answer, MAX_SAID).unwrap_or_default();
        let errors = serde_json::from_slice::<Errors>(&bytes).map(|said| said.errors).unwrap_or_default();
        let text = errors.into_iter().map(|error| error.message).filter(|said| !said.is_empty()).collect::<Vec<_>>();
        text.join(", ").chars().filter(|c| !c.is_control()).take(MAX_SHOWN).collect()
    }

    /// The address that a registry names, which may be relative. Refused where it would not be safe to go.
    fn resolve(&self, from: &str, location: &str) -> Result<String, Error> {
        let refuse = || self.strange("it sends us to an address that is none".into());
        let url = match location.starts_with('/') && !location.starts_with("//") {
            true => {
                let from = from.parse::<Uri>().map_err(|_| refuse())?;
                let origin = from.scheme_str().zip(from.authority());
                origin.map(|(scheme, host)| format!("{scheme}://{host}{location}")).ok_or_else(refuse)?
            }
            false => location.to_owned(),
        };
        let uri = url.parse::<Uri>().map_err(|_| refuse())?;
        let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else { return Err(refuse()) };
        let in_the_clear = scheme == "http" && self.origin.starts_with("http:");
        let near =
            *authority == *self.reference.host || is_loopback(authority.as_str()) && self.reference.is_loopback();
        match scheme {
            // A name in the address is somebody's password.
            _ if authority.as_str().contains('@') => Err(refuse()),
            "https" => Ok(url),
            "http" if in_the_clear && near => Ok(url),
            "http" => Err(Error::Plain(authority.to_string())),
            _ => Err(refuse()),
        }
    }

    /// Whether an address is the registry's own.
    fn is_ours(&self, url: &str) -> bool {
        url.strip_prefix(&self.origin).is_some_and(|rest| rest.starts_with('/'))
    }

    /// Tries again, after a while, what may go better then.
    fn again<T>(&self, mut act: impl FnMut() -> Result<T, Error>) -> Result<T, Error> {
        let mut pause = PAUSE;
        for _ in 1..TRIES {
            match act() {
                Err(error) if error.passes() => rest(pause)?,
                other => return other,
            }
            pause *= 2;
        }
        act()
    }

    fn strange(&self, why: String) -> Error {
        Error::Strange { host: self.reference.host.clone(), why }
    }

    fn broken(&self, why: String) -> Error {
        Error::Unreachable { host: self.reference.host.clone(), why }
    }

    fn unreachable(&self, error: &ureq::Error) -> Error {
        match transport::tls_error(error) {
            Some(rustls::Error::InvalidMessage(_)) => return Error::Plain(self.reference.host.clone()),
            // A certificate does not become good by waiting.
            Some(error) => return self.strange(format!("its TLS is not to be trusted: {error}")),
            None => {}
        }
        match error {
            ureq::Error::RequireHttpsOnly(_) => Error::Plain(self.reference.host.clone()),
            // The text of others has no addresses in it, which may hold secrets.
            ureq::Error::BadUri(_) => self.strange("an address of it is none".into()),
            error => self.broken(error.to_string()),
        }
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Waits, unless the user has had enough.
fn rest(time: Duration) -> Result<(), Error> {
    let until = Instant::now() + time;
    while Instant::now() < until {
        if process::interrupted() {
            return Err(Error::Interrupted);
        }
        thread::sleep(Duration::from_millis(50).min(time));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(plain: bool) -> Result<Client, Error> {
        Client::new(&"10.0.0.1:5000/x:y".parse().unwrap(), Access::Pull, plain)
    }

    #[test]
    fn only_who_wishes_it_speaks_in_the_clear_to_a_host_elsewhere() {
        assert_eq!(client(true).unwrap().origin, "http://10.0.0.1:5000");
        match client(false) {
            Ok(client) => assert_eq!(client.origin, "https://10.0.0.1:5000"),
            // A machine without certificates.
            Err(error) => assert!(matches!(error, Error::NoRoots), "{error}"),
        }
    }

    #[test]
    fn a_registry_leads_to_safe_places_only() {
        let client = client(true).unwrap();
        let from = "http://10.0.0.1:5000/v2/x/blobs/uploads/";
        for (location, expected) in [
            ("/v2/x?y=z", "http://10.0.0.1:5000/v2/x?y=z"),
            ("http://10.0.0.1:5000/a", "http://10.0.0.1:5000/a"),
            ("https://elsewhere.example/a?b", "https://elsewhere.example/a?b"),
        ] {
            let url = client.resolve(from, location).unwrap();
            assert_eq!((url.as_str(), client.is_ours(&url)), (expected, expected.contains("10.0.0.1")));
        }
        for away in ["http://elsewhere.example/a", "http://10.0.0.1/a", "http://localhost/a"] {
            assert!(matches!(client.resolve(from, away), Err(Error::Plain(_))), "{away}");
        }
        for strange in
            ["//elsewhere.example/a", "ftp://10.0.0.1:5000/a", "http://10.0.0.1:5000@b/a", "a/b", "", "http://"]
        {
            assert!(matches!(client.resolve(from, strange), Err(Error::Strange { .. })), "{strange}");
        }
        for other in ["http://10.0.0.1:50001/", "http://10.0.0.1:5000", "https://10.0.0.1:5000/"] {
            assert!(!client.is_ours(other), "{other}");
        }
    }
}
