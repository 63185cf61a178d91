//! What the calls of a group need of whatever carries bytes between its ranks.

use crate::{Aborter, CollectiveError, Operation};

/// A message to a rank.
pub struct Outgoing<'a> {
    pub(crate) to: usize,
    pub(crate) bytes: &'a [u8],
}

/// Room for a message from a rank.
pub struct Incoming<'a> {
    pub(crate) from: usize,
    pub(crate) bytes: &'a mut [u8],
}

/// One rank's ways to all others. After an error the group is over: each later call returns the same one.
pub trait Exchange: Send {
    /// Sends and receives all of these messages; at most one each way for each rank.
    ///
    /// # Errors
    /// As all calls of a group.
    fn exchange(
        &mut self,
        operation: Operation,
        outgoing: &[Outgoing<'_>],
        incoming: &mut [Incoming<'_>],
    ) -> Result<(), CollectiveError>;

    /// What ends an exchange from another thread.
    fn aborter(&self) -> Aborter;
}
