//! Ranks that are processes, with a connection between each two.

mod links;
mod rendezvous;
mod wait;

use std::net::TcpListener;

pub(crate) use self::links::{Links, Sign};
use self::{links::Link, rendezvous::Rendezvous};
use crate::{Bare, CollectiveError, Group, Ranks, Wires, arguments::check_rank};

/// One rank of a group over TCP.
pub type Tcp = Ranks<Links>;

// === impl Tcp ===

impl Tcp {
    /// Forms the group: rank 0 listens at `address` (host:port), the others call it there. Returns when all ranks are
    /// there.
    ///
    /// # Errors
    /// [`CollectiveError::Rendezvous`] within the group's timeout: a rank that does not come, an address that nobody
    /// listens at, a group of another epoch, size or payload.
    pub fn connect(address: &str, rank: usize, group: Group) -> Result<Self, CollectiveError> {
        Self::connect_over(&Bare, address, rank, group)
    }

    /// The same, over wires of the caller's.
    ///
    /// # Errors
    /// As [`Tcp::connect`]; also a rank that the others do not take for one of theirs, or that takes no other for one.
    pub fn connect_over(
        wires: &dyn Wires,
        address: &str,
        rank: usize,
        group: Group,
    ) -> Result<Self, CollectiveError> {
        check_rank(&group, rank)?;
        if rank == 0 {
            let listener = TcpListener::bind(address).map_err(|error| CollectiveError::Rendezvous {
                rank,
                address: address.to_owned(),
                reason: error.to_string(),
            })?;
            return Self::lead_over(wires, &listener, group);
        }
        let links = Rendezvous::new(wires, &group, rank, address.to_owned()).join()?;
        Self::over(links, rank, group)
    }

    /// Rank 0 of a group, where somebody listens already.
    ///
    /// # Errors
    /// As [`Tcp::connect`].
    pub fn lead(listener: &TcpListener, group: Group) -> Result<Self, CollectiveError> {
        Self::lead_over(&Bare, listener, group)
    }

    /// The same, over wires of the caller's.
    ///
    /// # Errors
    /// As [`Tcp::connect_over`].
    pub fn lead_over(
        wires: &dyn Wires,
        listener: &TcpListener,
        group: Group,
    ) -> Result<Self, CollectiveError> {
        check_rank(&group, 0)?;
        let address = listener.local_addr().map_or_else(|error| error.to_string(), |own| own.to_string());
        Self::over(Rendezvous::new(wires, &group, 0, address).lead(listener)?, 0, group)
    }

    fn over(links: Vec<Option<Link>>, rank: usize, group: Group) -> Result<Self, CollectiveError> {
        let links = Links::new(links, group.epoch, group.timeout).map_err(|error| {
            let reason = error.to_string();
            CollectiveError::Rendezvous { rank, address: "its peers".to_owned(), reason }
        })?;
        Ok(Self::new(links, rank, group))
    }
}
