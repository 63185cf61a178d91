//! Certificates: between the processes of a cluster, at its front door, and of those who come there.

use std::{io, net::TcpStream, path::PathBuf, sync::Arc, time::Instant};

use clap::Args;
use uniarm_collective::{Bare, Wire, Wires};
use uniarm_proto::{Role, client::Dialer};
use uniarm_tls::{ClientTls, Identity, PeerTls, RoleName, ServerTls, TlsError};

/// Who this process is to the others of its cluster.
#[derive(Debug, Clone, Args)]
pub struct TlsArgs {
    /// Speak mutual TLS with the other processes of the cluster, whose certificates this authority signed (PEM); they have
    /// the DNS names `router`, `base`, `reward` or `trainer`, each with `.uniarm.internal`
    #[arg(long, env = "UNIARM_TLS_CA", value_name = "FILE", requires = "tls_cert", requires = "tls_key")]
    pub tls_ca: Option<PathBuf>,
    /// This process's certificate (PEM); read again when it changes
    #[arg(long, env = "UNIARM_TLS_CERT", value_name = "FILE", requires = "tls_ca")]
    pub tls_cert: Option<PathBuf>,
    /// The key of that certificate (PEM)
    #[arg(long, env = "UNIARM_TLS_KEY", value_name = "FILE", requires = "tls_ca")]
    pub tls_key: Option<PathBuf>,
}

/// Who a router is to clients.
#[derive(Debug, Clone, Args)]
pub struct DoorArgs {
    /// Certificate of the front door for its host (PEM): gRPC and HTTP speak TLS; read again when it changes
    #[arg(long, env = "UNIARM_FRONT_CERT", value_name = "FILE", requires = "front_key")]
    pub front_cert: Option<PathBuf>,
    /// The key of that certificate (PEM)
    #[arg(long, env = "UNIARM_FRONT_KEY", value_name = "FILE", requires = "front_cert")]
    pub front_key: Option<PathBuf>,
    /// Clients show a certificate that this authority signed (PEM)
    #[arg(long, env = "UNIARM_FRONT_CLIENT_CA", value_name = "FILE", requires = "front_cert")]
    pub front_client_ca: Option<PathBuf>,
}

/// The operators' port, and who this process is there.
#[derive(Debug, Clone, Args)]
pub struct AdminArgs {
    /// Address of /metrics, /healthz, /readyz and /debug/steps; none without it
    #[arg(long, env = "UNIARM_ADMIN", value_name = "ADDRESS")]
    pub admin: Option<String>,
    /// Certificate of the admin port (PEM), which speaks HTTPS then; read again when it changes
    #[arg(long, env = "UNIARM_ADMIN_CERT", value_name = "FILE", requires = "admin_key", requires = "admin")]
    pub admin_cert: Option<PathBuf>,
    /// The key of that certificate (PEM)
    #[arg(long, env = "UNIARM_ADMIN_KEY", value_name = "FILE", requires = "admin_cert")]
    pub admin_key: Option<PathBuf>,
    /// Who reads there shows a certificate that this authority signed (PEM)
    #[arg(long, env = "UNIARM_ADMIN_CLIENT_CA", value_name = "FILE", requires = "admin_cert")]
    pub admin_client_ca: Option<PathBuf>,
}

/// Whom a client trusts, and who it is.
#[derive(Debug, Clone, Default, Args)]
pub struct TrustArgs {
    /// Who signed the certificates of https:// routers (PEM) [default: whom browsers trust]
    #[arg(long, env = "UNIARM_CA", value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// A certificate to show to routers that ask for one (PEM)
    #[arg(long, env = "UNIARM_CLIENT_CERT", value_name = "FILE", requires = "client_key")]
    pub client_cert: Option<PathBuf>,
    /// The key of that certificate (PEM)
    #[arg(long, env = "UNIARM_CLIENT_KEY", value_name = "FILE", requires = "client_cert")]
    pub client_key: Option<PathBuf>,
}

/// The certificate that a role of the cluster shows.
pub fn role_name(role: Role) -> RoleName {
    match role {
        Role::Router => RoleName::Router,
        Role::Base => RoleName::Base,
        Role::Reward => RoleName::Reward,
    }
}

/// Mutual TLS between ranks, as their collective wants it.
struct SecureWires(PeerTls);

// === impl TlsArgs ===

impl TlsArgs {
    fn identity(&self) -> Option<Identity> {
        let (authority, certificate, key) =
            (self.tls_ca.clone()?, self.tls_cert.clone()?, self.tls_key.clone()?);
        Some(Identity { authority, certificate, key })
    }

    /// Of a worker: who may dial it is a matter of its role.
    ///
    /// # Errors
    /// When the files cannot be used.
    pub fn server(&self, role: Role) -> Result<Option<ServerTls>, TlsError> {
        let callers: &[_] = match role {
            Role::Reward => &[RoleName::Base, RoleName::Router],
            Role::Base | Role::Router => &[RoleName::Router],
        };
        self.identity().map(|identity| ServerTls::mutual(&identity, callers)).transpose()
    }

    /// Between ranks of one group, which all have this role.
    ///
    /// # Errors
    /// When the files cannot be used.
    pub fn wires(&self, role: RoleName) -> Result<Arc<dyn Wires>, TlsError> {
        Ok(match self.identity() {
            None => Arc::new(Bare),
            Some(identity) => Arc::new(SecureWires(PeerTls::mutual(&identity, role)?)),
        })
    }

    /// To processes of these roles.
    ///
    /// # Errors
    /// When the files cannot be used.
    pub fn dialer(&self, roles: &[RoleName]) -> Result<Dialer, TlsError> {
        let tls = self.identity().map(|identity| ClientTls::mutual(&identity, roles)).transpose()?;
        Ok(tls.map_or_else(Dialer::default, Dialer::mutual))
    }
}

// === impl DoorArgs ===

impl DoorArgs {
    /// # Errors
    /// When the files cannot be used.
    pub fn grpc(&self) -> Result<Option<ServerTls>, TlsError> {
        self.speaking(&[b"h2"])
    }

    /// # Errors
    /// When the files cannot be used.
    pub fn http(&self) -> Result<Option<ServerTls>, TlsError> {
        self.speaking(&[b"http/1.1"])
    }

    fn speaking(&self, protocols: &'static [&'static [u8]]) -> Result<Option<ServerTls>, TlsError> {
        let files = self.front_cert.clone().zip(self.front_key.clone());
        let door =
            |(certificate, key)| ServerTls::front(certificate, key, self.front_client_ca.clone(), protocols);
        files.map(door).transpose()
    }
}

// === impl AdminArgs ===

impl AdminArgs {
    /// # Errors
    /// When the files cannot be used.
    pub fn server(&self) -> Result<Option<ServerTls>, TlsError> {
        let files = self.admin_cert.clone().zip(self.admin_key.clone());
        let door = |(certificate, key)| {
            ServerTls::front(certificate, key, self.admin_client_ca.clone(), &[b"http/1.1"])
        };
        files.map(door).transpose()
    }
}

// === impl TrustArgs ===

impl TrustArgs {
    /// # Errors
    /// When the files cannot be used.
    pub fn dialer(&self) -> Result<Dialer, TlsError> {
        let identity = self.client_cert.clone().zip(self.client_key.clone());
        Ok(Dialer::of_front_doors(ClientTls::of_front_doors(self.ca.clone(), identity)?))
    }
}

// === impl SecureWires ===

impl Wires for SecureWires {
    fn dial(&self, stream: &Arc<TcpStream>, deadline: Instant) -> io::Result<Box<dyn Wire>> {
        Ok(Box::new(self.0.dial(Arc::clone(stream), deadline)?))
    }

    fn accept(&self, stream: &Arc<TcpStream>, deadline: Instant) -> io::Result<Box<dyn Wire>> {
        Ok(Box::new(self.0.accept(Arc::clone(stream), deadline)?))
    }
}
