//! Where the members of a cluster are recorded, and how that place is reached.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use clap::Args;
use uniarm_cluster::{Credentials, EtcdOptions, MemberStore, StoreAddress, TlsFiles, Work};

#[derive(Debug, Clone, Args)]
pub struct StoreArgs {
    /// Where members are recorded: `etcd://host:port[,host:port][/prefix]`, or `memory` for fixed peers
    #[arg(long = "store", env = "UNIARM_STORE", default_value = "memory")]
    pub address: String,
    /// Seconds that this process stays recorded in etcd after it was killed or cut off; whole, at least 2
    #[arg(long, env = "UNIARM_LEASE_TTL", default_value_t = 10, value_parser = clap::value_parser!(u64).range(2..=3600))]
    pub lease_ttl: u64,
    /// Speak TLS to etcd, whose certificate this authority signed (PEM)
    #[arg(long, env = "UNIARM_STORE_CA", value_name = "FILE")]
    pub store_ca: Option<PathBuf>,
    /// This process's certificate for etcd (PEM)
    #[arg(
        long,
        env = "UNIARM_STORE_CERT",
        value_name = "FILE",
        requires = "store_key",
        requires = "store_ca"
    )]
    pub store_cert: Option<PathBuf>,
    /// The key of that certificate (PEM)
    #[arg(long, env = "UNIARM_STORE_KEY", value_name = "FILE", requires = "store_cert")]
    pub store_key: Option<PathBuf>,
    /// The name in etcd's certificate, where it is not the host's
    #[arg(long, env = "UNIARM_STORE_DOMAIN", value_name = "NAME", requires = "store_ca")]
    pub store_domain: Option<String>,
    /// User of etcd
    #[arg(long, env = "UNIARM_STORE_USER", value_name = "NAME", requires = "store_password_file")]
    pub store_user: Option<String>,
    /// File with that user's password; a line end behind it does not count
    #[arg(long, env = "UNIARM_STORE_PASSWORD_FILE", value_name = "FILE", requires = "store_user")]
    pub store_password_file: Option<PathBuf>,
}

// === impl StoreArgs ===

impl StoreArgs {
    /// # Errors
    /// For an address that is none.
    pub fn parse(&self) -> anyhow::Result<StoreAddress> {
        Ok(StoreAddress::parse(&self.address)?)
    }

    /// What can be said of it without reaching it.
    ///
    /// # Errors
    /// For an address that is none, and files that cannot be read; names the flag.
    pub fn check(&self) -> anyhow::Result<()> {
        self.parse()?;
        self.options()?;
        let files = [
            ("--store-ca", &self.store_ca),
            ("--store-cert", &self.store_cert),
            ("--store-key", &self.store_key),
        ];
        for (flag, file) in files {
            let Some(file) = file else { continue };
            std::fs::read(file).with_context(|| format!("{flag} {}", file.display()))?;
        }
        Ok(())
    }

    /// Opens it, whether or not it can be reached yet.
    ///
    /// # Errors
    /// For an address that is none, and files that cannot be read.
    pub fn open(&self) -> anyhow::Result<Arc<dyn MemberStore>> {
        Ok(uniarm_cluster::open(&self.parse()?, self.options()?)?)
    }

    /// The job that processes share by the name of `--share`.
    ///
    /// # Errors
    /// As of `open`; and where the store is no etcd.
    pub fn shared_work(&self, name: &str, patience: Duration) -> anyhow::Result<Work> {
        match self.parse()? {
            StoreAddress::Memory => bail!("--share wants --store etcd://host:port, where processes meet"),
            StoreAddress::Etcd { endpoints, prefix } => {
                let options = EtcdOptions { prefix, ..self.options()? };
                Ok(Work::new(&endpoints, &options, name, patience)?)
            }
        }
    }

    fn options(&self) -> anyhow::Result<EtcdOptions> {
        let credentials = match (&self.store_user, &self.store_password_file) {
            (Some(user), Some(file)) => {
                let text = std::fs::read_to_string(file)
                    .with_context(|| format!("--store-password-file {}", file.display()))?;
                Some(Credentials {
                    user: user.clone(),
                    password: text.trim_end_matches(['\r', '\n']).to_owned(),
                })
            }
            _ => None,
        };
        let tls = self.store_ca.as_ref().map(|authority| TlsFiles {
            authority: Some(authority.clone()),
            identity: self.store_cert.clone().zip(self.store_key.clone()),
            domain: self.store_domain.clone(),
        });
        let lease_ttl = Duration::from_secs(self.lease_ttl);
        Ok(EtcdOptions { lease_ttl, credentials, tls, ..EtcdOptions::default() })
    }
}
