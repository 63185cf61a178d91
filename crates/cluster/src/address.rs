//! Where the member store is, as a command line says it: `memory` or `etcd://host:port[,host:port][/prefix]`.

use std::fmt;
use std::str::FromStr;

use crate::StoreError;

/// Keys of one cluster begin with this unless the address says otherwise. The version is that of
/// the records: a cluster with other records would not read these.
pub const PREFIX_DEFAULT: &str = "/uniarm/v1";

const ETCD_SCHEME: &str = "etcd://";

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreAddress {
    /// One process.
    Memory,
    Etcd {
        /// host:port of each etcd node; at least one.
        endpoints: Vec<String>,
        /// Begins with a slash and does not end with one.
        prefix: String,
    },
}

impl StoreAddress {
    pub fn parse(address: &str) -> Result<Self, StoreError> {
        let refuse =
            |reason: &str| StoreError::Address { address: address.to_owned(), reason: reason.to_owned() };
        if address == "memory" {
            return Ok(Self::Memory);
        }
        let Some(rest) = address.strip_prefix(ETCD_SCHEME) else {
            return Err(refuse("want `memory` or `etcd://host:port[,host:port][/prefix]`"));
        };
        let (nodes, path) = rest.split_once('/').unwrap_or((rest, ""));
        let endpoints: Vec<String> = nodes.split(',').map(str::to_owned).collect();
        if !endpoints.iter().all(|endpoint| is_host_and_port(endpoint)) {
            return Err(refuse("every node wants a host and a port, such as 127.0.0.1:2379"));
        }
        let path = path.trim_end_matches('/');
        let prefix = if path.is_empty() { PREFIX_DEFAULT.to_owned() } else { format!("/{path}") };
        Ok(Self::Etcd { endpoints, prefix })
    }
}

impl FromStr for StoreAddress {
    type Err = StoreError;

    fn from_str(address: &str) -> Result<Self, StoreError> {
        Self::parse(address)
    }
}

impl fmt::Display for StoreAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory => f.write_str("memory"),
            Self::Etcd { endpoints, prefix } => write!(f, "{ETCD_SCHEME}{}{prefix}", endpoints.join(",")),
        }
    }
}

fn is_host_and_port(endpoint: &str) -> bool {
    endpoint.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_names_its_nodes_and_its_prefix() {
        assert_eq!(StoreAddress::parse("memory").unwrap(), StoreAddress::Memory);
        let etcd = |endpoints: &[&str], prefix: &str| StoreAddress::Etcd {
            endpoints: endpoints.iter().map(|&endpoint| endpoint.to_owned()).collect(),
            prefix: prefix.to_owned(),
        };
        for (address, parsed) in [
            ("etcd://127.0.0.1:2379", etcd(&["127.0.0.1:2379"], PREFIX_DEFAULT)),
            ("etcd://a:1,b:2,c:3/", etcd(&["a:1", "b:2", "c:3"], PREFIX_DEFAULT)),
            ("etcd://[::1]:2379/team/blue/", etcd(&["[::1]:2379"], "/team/blue")),
        ] {
            assert_eq!(StoreAddress::parse(address).unwrap(), parsed, "{address}");
            assert_eq!(StoreAddress::parse(&parsed.to_string()).unwrap(), parsed, "{address}");
        }
    }

    #[test]
    fn an_address_that_is_none_is_refused_in_words() {
        for address in
            ["", "etcd", "etcd://", "etcd://host", "etcd://a:1,", "etcd://a:1,b", "http://a:1", "etcd://:1"]
        {
            let error = StoreAddress::parse(address).unwrap_err();
            assert!(matches!(error, StoreError::Address { .. }), "{address}: {error}");
            assert!(!error.is_retryable());
        }
    }
}
