//! Whoever watches the store, in the order in which they came: one channel for all of them would wake them in any order.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;
use uniarm_cluster::{Snapshot, SnapshotReceiver};

type Senders = Arc<Mutex<Vec<watch::Sender<Arc<Snapshot>>>>>;

/// Channels of one receiver each, which get what the store's own channel gets.
pub struct Watchers {
    members: SnapshotReceiver,
    senders: Senders,
}

// === impl Watchers ===

impl Watchers {
    /// Until the store is closed.
    pub fn of(members: SnapshotReceiver) -> Self {
        let senders = Senders::default();
        tokio::spawn(tell(members.clone(), Arc::clone(&senders)));
        Self { members, senders }
    }

    pub fn add(&self) -> SnapshotReceiver {
        let (sender, receiver) = watch::channel(Arc::clone(&self.members.borrow()));
        self.senders.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
        receiver
    }
}

async fn tell(mut members: SnapshotReceiver, senders: Senders) {
    let lock = || senders.lock().unwrap_or_else(PoisonError::into_inner);
    while members.changed().await.is_ok() {
        let latest = Arc::clone(&members.borrow_and_update());
        lock().retain(|sender| sender.send(Arc::clone(&latest)).is_ok());
    }
    lock().clear();
}
