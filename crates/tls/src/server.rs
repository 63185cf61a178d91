//! The side that is dialled.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use rustls::{
    DigitallySignedStruct, DistinguishedName, Error, ServerConfig, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    pki_types::{CertificateDer, UnixTime},
    server::{
        WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use crate::{
    H2, Identity, RoleName, TlsError, check_role,
    files::{Rotating, chain, key, roots},
    provider,
};

/// A client that opens a connection and does not say who it is within this loses it.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// How a server shows who it is, and knows who may come in. Clones share the files.
#[derive(Clone, Debug)]
pub struct ServerTls {
    config: Rotating<Arc<ServerConfig>>,
}

/// Takes clients whom the authority has given the name of one of these roles.
#[derive(Debug)]
struct RoleVerifier {
    chains: Arc<dyn ClientCertVerifier>,
    roles: Vec<RoleName>,
}

// === impl ServerTls ===

impl ServerTls {
    /// Of a process of a cluster, which processes of these roles may dial.
    ///
    /// # Errors
    /// When the files cannot be used.
    pub fn mutual(identity: &Identity, roles: &[RoleName]) -> Result<Self, TlsError> {
        let (identity, roles) = (identity.clone(), roles.to_vec());
        let paths = vec![identity.certificate.clone(), identity.key.clone(), identity.authority.clone()];
        let config = Rotating::new(paths, move || Ok(Arc::new(mutual(&identity, &roles, H2)?)))?;
        Ok(Self { config })
    }

    /// Of a front door. `client_authority`: clients have to show a certificate that it signed.
    ///
    /// # Errors
    /// When the files cannot be used.
    pub fn front(
        certificate: PathBuf,
        own_key: PathBuf,
        client_authority: Option<PathBuf>,
        protocols: &'static [&'static [u8]],
    ) -> Result<Self, TlsError> {
        let mut paths = vec![certificate.clone(), own_key.clone()];
        paths.extend(client_authority.clone());
        let config = Rotating::new(paths, move || {
            let verifier = match &client_authority {
                Some(path) => {
                    WebPkiClientVerifier::builder_with_provider(roots(path)?, provider()).build()?
                }
                None => WebPkiClientVerifier::no_client_auth(),
            };
            Ok(Arc::new(serving(verifier, &certificate, &own_key, protocols)?))
        })?;
        Ok(Self { config })
    }

    /// # Errors
    /// When the client is not who it should be, or says nothing.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let shaken = TlsAcceptor::from(self.config.current()).accept(stream);
        tokio::time::timeout(HANDSHAKE_TIMEOUT, shaken)
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no TLS handshake in time"))?
    }
}

/// Of a process that others of these roles dial.
pub(crate) fn mutual(
    identity: &Identity,
    roles: &[RoleName],
    protocol: &[u8],
) -> Result<ServerConfig, TlsError> {
    let authority = roots(&identity.authority)?;
    let chains = WebPkiClientVerifier::builder_with_provider(authority, provider()).build()?;
    let verifier = Arc::new(RoleVerifier { chains, roles: roles.to_vec() });
    serving(verifier, &identity.certificate, &identity.key, &[protocol])
}

fn serving(
    verifier: Arc<dyn ClientCertVerifier>,
    certificate: &std::path::Path,
    own_key: &std::path::Path,
    protocols: &[&[u8]],
) -> Result<ServerConfig, TlsError> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain(certificate)?, key(own_key)?)?;
    config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
    Ok(config)
}

// === impl RoleVerifier ===

impl ClientCertVerifier for RoleVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chains.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chains.verify_client_cert(end_entity, intermediates, now)?;
        check_role(end_entity, &self.roles)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chains.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chains.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chains.supported_verify_schemes()
    }
}
