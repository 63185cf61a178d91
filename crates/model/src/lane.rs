//! Lanes: ways of whole rows of logits from the device of one model to that of another, in another process, without the hosts.
//!
//! Who announces the rows, and in which order, is not known here; neither is what a device is. A model hands out rows in
//! its device's memory ([`Forward::detach_rows`](crate::Forward::detach_rows)), and a lane of the same kind takes them.

use std::any::Any;
use std::fmt;

use crate::error::ModelError;

/// One end of each lane is made here. A lane has an end that sends and one that receives; what either is at may take as long
/// as the timeout of its lanes, and no longer: it wants a thread that may wait.
pub trait RowLanes: fmt::Debug + Send + Sync {
    /// A new lane: what the end that sends has to know, to find the one that receives.
    ///
    /// # Errors
    /// [`ModelError::Lane`] when what carries the rows is not there.
    fn offer(&self) -> Result<Vec<u8>, ModelError>;

    /// The end that receives. Returns when the other end is there.
    ///
    /// # Errors
    /// [`ModelError::Lane`] when it does not come, or cannot be connected; [`ModelError::Device`].
    fn receiver(&self, offer: &[u8]) -> Result<Box<dyn RowReceiver>, ModelError>;

    /// The end that sends. Returns when the other end is there.
    ///
    /// # Errors
    /// As [`RowLanes::receiver`]; [`ModelError::Invalid`] for an offer that is none.
    fn sender(&self, offer: &[u8]) -> Result<Box<dyn RowSender>, ModelError>;
}

/// The end that rows come out of. After an error the lane is closed.
pub trait RowReceiver: Send {
    /// The next rows, which have so many logits; in the order in which they were sent.
    ///
    /// # Errors
    /// [`ModelError::Lane`] when the other end is lost, or late; [`ModelError::Device`].
    fn receive(&mut self, lengths: &[usize]) -> Result<Vec<Vec<f32>>, ModelError>;

    fn hangup(&self) -> Hangup;
}

/// The end that rows go into. After an error the lane is closed.
pub trait RowSender: Send {
    /// Sends of each row so many of its first logits. Returns when all are on the other device.
    ///
    /// # Errors
    /// As [`RowReceiver::receive`]; [`ModelError::Invalid`] for a row of another kind of device, or a shorter one.
    fn send(&mut self, rows: Vec<(DeviceRow, usize)>) -> Result<(), ModelError>;

    fn hangup(&self) -> Hangup;
}

/// A row of logits in the memory of a device, which it gives back when it is dropped.
pub struct DeviceRow(Box<dyn Any + Send>);

/// Closes a lane from any thread, whatever its end is at. It does not wait until that has ended.
pub struct Hangup(Box<dyn Fn() + Send + Sync>);

// === impl DeviceRow ===

impl DeviceRow {
    pub fn new(row: impl Any + Send) -> Self {
        Self(Box::new(row))
    }

    /// The row as whoever made it knows it.
    ///
    /// # Errors
    /// [`ModelError::Invalid`]: it was made by somebody else.
    pub fn downcast<T: Any>(self) -> Result<T, ModelError> {
        let other =
            |_| ModelError::Invalid { field: "row", reason: "it lies on another kind of device".to_owned() };
        self.0.downcast().map(|row| *row).map_err(other)
    }
}

impl fmt::Debug for DeviceRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DeviceRow")
    }
}

// === impl Hangup ===

impl Hangup {
    pub fn new(close: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Box::new(close))
    }

    pub fn close(&self) {
        (self.0)();
    }
}
