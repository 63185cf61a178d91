//! Who is in the cluster: members register under a lease, and everyone watches the same snapshot of them. And what reward
//! workers are to serve: a catalogue of adapters.
//!
//! The store says who is alive and what they serve. It is never asked on a token's path: readers hold
//! a snapshot that stays as it was while the store is away.

pub mod adapters;
pub mod address;
pub mod etcd;
pub mod memory;
pub mod snapshot;
pub mod store;
#[cfg(feature = "testing")]
pub mod testing;

mod backoff;
mod error;
mod record;

use std::sync::Arc;

pub use adapters::{Adapters, AdaptersReceiver, NewAdapter};
pub use address::StoreAddress;
pub use error::StoreError;
pub use etcd::{Claim, Claimed, Credentials, EtcdOptions, EtcdStore, TlsFiles, Work, WorkState};
pub use memory::MemoryStore;
pub use snapshot::{Snapshot, SnapshotReceiver};
pub use store::{MemberStore, Registration, RegistrationState};

/// The store at `address`. A store in etcd opens at once, whether or not etcd can be reached:
/// see `EtcdStore::connect`.
pub fn open(address: &StoreAddress, options: EtcdOptions) -> Result<Arc<dyn MemberStore>, StoreError> {
    match address {
        StoreAddress::Memory => Ok(Arc::new(MemoryStore::new())),
        StoreAddress::Etcd { endpoints, prefix } => {
            let options = EtcdOptions { prefix: prefix.clone(), ..options };
            Ok(Arc::new(EtcdStore::connect(endpoints, &options)?))
        }
    }
}
