//! What the calls of a group need of whatever carries bytes between its ranks.

use std::sync::Arc;

use crate::{Aborter, CollectiveError, OnDevice, Operation};

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

/// What a rank shares with its aborters.
pub trait Fate: Send + Sync + 'static {
    /// The first failure, which is every later one too.
    fn failure(&self) -> Option<CollectiveError>;

    /// Remembers the first failure, and ends what is under way.
    fn fail(&self, error: CollectiveError) -> CollectiveError;
}

/// One rank's ways to all others. After an error the group is over: each later call returns the same one.
pub trait Exchange: Send {
    type Fate: Fate;

    fn fate(&self) -> &Arc<Self::Fate>;

    /// Sends and receives all of these messages, whatever happened before.
    ///
    /// # Errors
    /// As all calls of a group.
    fn pass(
        &mut self,
        operation: Operation,
        outgoing: &[Outgoing<'_>],
        incoming: &mut [Incoming<'_>],
    ) -> Result<(), CollectiveError>;

    /// Sends and receives all of these messages, in any order in time; at most one each way for each rank.
    ///
    /// # Errors
    /// As all calls of a group.
    fn exchange(
        &mut self,
        operation: Operation,
        outgoing: &[Outgoing<'_>],
        incoming: &mut [Incoming<'_>],
    ) -> Result<(), CollectiveError> {
        self.unless_over(|links| links.pass(operation, outgoing, incoming))
    }

    /// Makes a call of a group that has not failed; it has then, if the call fails.
    ///
    /// # Errors
    /// As all calls of a group.
    fn unless_over(
        &mut self,
        call: impl FnOnce(&mut Self) -> Result<(), CollectiveError>,
    ) -> Result<(), CollectiveError> {
        if let Some(failure) = self.fate().failure() {
            return Err(failure);
        }
        call(self).map_err(|error| self.fate().fail(error))
    }

    /// As [`Collective::on_device`](crate::Collective::on_device).
    fn on_device(&mut self) -> Option<&mut dyn OnDevice> {
        None
    }

    /// What ends an exchange from another thread.
    fn aborter(&self) -> Aborter {
        // Weak: an aborter that outlives its rank must keep nothing of it alive.
        let fate = Arc::downgrade(self.fate());
        Aborter(Arc::new(move |reason| {
            if let Some(fate) = fate.upgrade() {
                fate.fail(CollectiveError::Aborted { reason: reason.to_owned() });
            }
        }))
    }
}
