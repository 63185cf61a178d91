//! The side that dials.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use rustls::{
    ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{
    H2, Identity, RoleName, TlsError, check_role,
    files::{Rotating, chain, key, roots},
    provider,
};

/// A peer that accepts a connection and does not say who it is within this is away.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);

/// How a client knows whom it has dialled, and shows who it is. Clones share the files.
#[derive(Clone, Debug)]
pub struct ClientTls {
    config: Rotating<Arc<ClientConfig>>,
}

/// Takes whoever the authority has given the name of one of these roles, whatever the address.
#[derive(Debug)]
struct RoleVerifier {
    /// Knows the authority and the signatures.
    chains: Arc<WebPkiServerVerifier>,
    roots: Arc<RootCertStore>,
    roles: Vec<RoleName>,
}

// === impl ClientTls ===

impl ClientTls {
    /// Of a process of a cluster, which dials processes of these roles.
    ///
    /// # Errors
    /// When the files cannot be used.
    pub fn mutual(identity: &Identity, roles: &[RoleName]) -> Result<Self, TlsError> {
        let (identity, roles) = (identity.clone(), roles.to_vec());
        let paths = vec![identity.certificate.clone(), identity.key.clone(), identity.authority.clone()];
        let config = Rotating::new(paths, move || Ok(Arc::new(mutual(&identity, &roles, H2)?)))?;
        Ok(Self { config })
    }

    /// Of a client of front doors, whose certificates are for their hosts. `authority`: who signs them; without one,
    /// whom browsers trust. `identity`: certificate and key, where the door asks for them.
    ///
    /// # Errors
    /// When the files cannot be used.
    pub fn of_front_doors(
        authority: Option<PathBuf>,
        identity: Option<(PathBuf, PathBuf)>,
    ) -> Result<Self, TlsError> {
        let files = authority.iter().chain(identity.iter().flat_map(|(certificate, key)| [certificate, key]));
        let config = Rotating::new(files.cloned().collect(), move || {
            let roots = match &authority {
                Some(path) => roots(path)?,
                None => Arc::new(RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() }),
            };
            let config = ClientConfig::builder_with_provider(provider())
                .with_safe_default_protocol_versions()?
                .with_root_certificates(roots);
            let config = match &identity {
                Some((certificate, own_key)) => {
                    config.with_client_auth_cert(chain(certificate)?, key(own_key)?)?
                }
                None => config.with_no_client_auth(),
            };
            Ok(Arc::new(speaking(H2, config)))
        })?;
        Ok(Self { config })
    }

    /// # Errors
    /// When the peer is not who it should be, or says nothing.
    pub async fn connect(&self, host: &str, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, TlsError::Host(host.to_owned())))?;
        let shaken = TlsConnector::from(self.config.current()).connect(name, stream);
        tokio::time::timeout(HANDSHAKE_TIMEOUT, shaken).await.map_err(|_| {
            let message = format!("{host} did not finish the TLS handshake in {HANDSHAKE_TIMEOUT:?}");
            io::Error::new(io::ErrorKind::TimedOut, message)
        })?
    }
}

/// Of a process that dials others of these roles.
pub(crate) fn mutual(
    identity: &Identity,
    roles: &[RoleName],
    protocol: &[u8],
) -> Result<ClientConfig, TlsError> {
    let roots = roots(&identity.authority)?;
    let chains = WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), provider()).build()?;
    let verifier = Arc::new(RoleVerifier { chains, roots, roles: roles.to_vec() });
    let config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .dangerous() // only because the names are ours and not the addresses
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(chain(&identity.certificate)?, key(&identity.key)?)?;
    Ok(speaking(protocol, config))
}

fn speaking(protocol: &[u8], mut config: ClientConfig) -> ClientConfig {
    config.alpn_protocols = vec![protocol.to_vec()];
    config
}

// === impl RoleVerifier ===

impl ServerCertVerifier for RoleVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let parsed = rustls::server::ParsedCertificate::try_from(end_entity)?;
        rustls::client::verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &self.roots,
            intermediates,
            now,
            provider().signature_verification_algorithms.all,
        )?;
        check_role(end_entity, &self.roles)?;
        Ok(ServerCertVerified::assertion())
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
