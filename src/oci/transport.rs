//! Connections to a registry: encrypted, or in the clear where that is right.

use std::sync::Arc;
use std::time::Duration;

use ureq::Agent;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

use super::{Error, Reference};

const CONNECT_WITHIN: Duration = Duration::from_secs(15);
/// How long nothing may come, or go.
const SILENCE: Duration = Duration::from_secs(60);

/// What makes connections, and whether those to the registry are to be encrypted: unless `plain` is wished, or it is on
/// this machine and speaks nothing else.
pub(super) fn agent(reference: &Reference, plain: bool) -> Result<(Agent, bool), Error> {
    let near = reference.is_loopback();
    let mut config = Agent::config_builder()
        .http_status_as_error(false)
        .https_only(!plain && !near)
        // Redirects are followed here, where it is known who may get credentials.
        .max_redirects(0)
        .max_redirects_will_error(false)
        .user_agent(concat!("catnap/", env!("CARGO_PKG_VERSION")))
        .timeout_resolve(Some(CONNECT_WITHIN))
        .timeout_connect(Some(CONNECT_WITHIN))
        .timeout_per_read(Some(SILENCE))
        .timeout_per_write(Some(SILENCE));
    if near {
        config = config.proxy(None);
    }
    let (tls, trusts) = tls();
    if !trusts && !plain && !near {
        return Err(Error::NoRoots);
    }
    let agent = config.tls_config(tls).build().new_agent();
    let encrypted = !plain && (!near || encrypts(&agent, &reference.host));
    Ok((agent, encrypted))
}

/// TLS with the certificates that this host trusts, and whether it trusts any.
fn tls() -> (TlsConfig, bool) {
    let roots = rustls_native_certs::load_native_certs().certs;
    let roots: Vec<_> = roots.iter().map(|root| Certificate::from_der(root).to_owned()).collect();
    let config = TlsConfig::builder()
        .root_certs(RootCerts::new_with_certs(&roots))
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .build();
    (config, !roots.is_empty())
}

/// Whether a registry on this machine speaks TLS, though perhaps with a certificate that nobody trusts.
fn encrypts(agent: &Agent, host: &str) -> bool {
    match agent.get(format!("https://{host}/v2/")).call() {
        Ok(_) => true,
        Err(error) => tls_error(&error).is_some_and(|error| !matches!(error, rustls::Error::InvalidMessage(_))),
    }
}

/// The error that is about TLS, if it is one.
pub(super) fn tls_error(error: &ureq::Error) -> Option<&rustls::Error> {
    match error {
        ureq::Error::Rustls(error) => Some(error),
        ureq::Error::Io(error) => error.get_ref()?.downcast_ref(),
        _ => None,
    }
}
