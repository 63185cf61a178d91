//! TLS as a cluster speaks it: certificates in files that may change at any time, and names in them that say a role.
//!
//! Processes of one cluster know each other by an authority of their own and by a DNS name in the certificate,
//! `ROLE.uniarm.internal`, not by their addresses, which come and go. A certificate may have the names of several roles.
//! The front door has a certificate as any server on the web. What is in the files counts for each new connection from the
//! moment they change; connections that are open stay.

mod client;
mod files;
mod peers;
mod server;
#[cfg(feature = "testing")]
pub mod testing;

use std::{fmt, path::PathBuf, sync::Arc};

use rustls::{
    CertificateError, Error,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, ServerName},
    server::ParsedCertificate,
};

pub use client::ClientTls;
pub use files::TlsError;
pub use peers::{PeerStream, PeerTls};
pub use server::ServerTls;

/// A certificate with its key, and who signs those of peers; PEM files.
#[derive(Clone, PartialEq, Eq)]
pub struct Identity {
    pub authority: PathBuf,
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// What processes of a role are called in certificates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RoleName {
    Router,
    Base,
    Reward,
    /// A worker of a training run.
    Trainer,
}

/// HTTP/2, which is all that gRPC speaks.
const H2: &[u8] = b"h2";

// === impl Identity ===

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} by {}", self.certificate.display(), self.authority.display())
    }
}

// === impl RoleName ===

impl RoleName {
    /// The DNS name that a certificate has.
    #[must_use]
    pub const fn dns(self) -> &'static str {
        match self {
            Self::Router => "router.uniarm.internal",
            Self::Base => "base.uniarm.internal",
            Self::Reward => "reward.uniarm.internal",
            Self::Trainer => "trainer.uniarm.internal",
        }
    }
}

/// Fails unless the certificate has the name of one of these roles.
fn check_role(certificate: &CertificateDer<'_>, roles: &[RoleName]) -> Result<(), Error> {
    let parsed = ParsedCertificate::try_from(certificate)?;
    let is_of = |role: &RoleName| {
        let name = ServerName::try_from(role.dns()).expect("our names are DNS names");
        rustls::client::verify_server_name(&parsed, &name).is_ok()
    };
    match roles.iter().any(is_of) {
        true => Ok(()),
        false => {
            let wanted: Vec<_> = roles.iter().map(|role| role.dns()).collect();
            tracing::warn!(
                wanted = wanted.join(" or "),
                "a peer was refused: its certificate is of another role"
            );
            Err(CertificateError::NotValidForName.into())
        }
    }
}

/// ring: the one that the rest of the tree has.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}
