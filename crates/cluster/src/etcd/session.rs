//! One client of etcd: made when it is first needed, and every request bounded in time.

use std::path::Path;
use std::time::Duration;

use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};
use tokio::sync::OnceCell;

use super::{EtcdOptions, TlsFiles};
use crate::StoreError;

/// A node that vanished without closing its connection is noticed after both.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(3);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(3);

pub(super) struct Session {
    endpoints: Vec<String>,
    connect: ConnectOptions,
    /// Made on the store's own thread, where it also runs. With credentials that takes etcd's
    /// answer, so it cannot be made up front.
    client: OnceCell<Client>,
    pub(super) request_timeout: Duration,
    pub(super) lease_ttl: Duration,
}

impl Session {
    pub(super) fn new(endpoints: Vec<String>, options: &EtcdOptions) -> Result<Self, StoreError> {
        let mut connect = ConnectOptions::new()
            .with_connect_timeout(options.request_timeout)
            .with_keep_alive(KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT)
            .with_keep_alive_while_idle(true)
            // Without it, a node that is cut off from the others goes on serving a silent watch.
            .with_require_leader(true);
        if let Some(credentials) = &options.credentials {
            connect =
                connect.with_user(&credentials.user, &credentials.password).with_auto_token_refresh(true);
        }
        if let Some(files) = &options.tls {
            connect = connect.with_tls(tls(files)?);
        }
        Ok(Self {
            endpoints,
            connect,
            client: OnceCell::new(),
            request_timeout: options.request_timeout,
            lease_ttl: options.lease_ttl,
        })
    }

    /// One request. The time limit is here, around all of it, because the client's own begins only
    /// once a node is connected.
    pub(super) async fn request<T, F>(&self, request: impl FnOnce(Client) -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let bounded = tokio::time::timeout(self.request_timeout, async {
            let connecting = || Client::connect(&self.endpoints, Some(self.connect.clone()));
            let client = self.client.get_or_try_init(connecting).await?;
            request(client.clone()).await
        });
        match bounded.await {
            Ok(answer) => Ok(answer?),
            Err(_) => Err(StoreError::Unavailable(format!("no answer within {:.1?}", self.request_timeout))),
        }
    }
}

fn tls(files: &TlsFiles) -> Result<TlsOptions, StoreError> {
    let mut tls = TlsOptions::new();
    if let Some(path) = &files.authority {
        tls = tls.ca_certificate(Certificate::from_pem(read(path)?));
    }
    if let Some((certificate, key)) = &files.identity {
        tls = tls.identity(Identity::from_pem(read(certificate)?, read(key)?));
    }
    if let Some(domain) = &files.domain {
        tls = tls.domain_name(domain);
    }
    Ok(tls)
}

fn read(path: &Path) -> Result<Vec<u8>, StoreError> {
    std::fs::read(path)
        .map_err(|error| StoreError::Refused(format!("cannot read {}: {error}", path.display())))
}
