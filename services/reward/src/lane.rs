//! The end of a lane that whole rows of one base worker's sessions go into: the engine hands them over and does not wait, a
//! thread sends them.

use std::{sync::Arc, thread};

use tokio::sync::mpsc;
use uniarm_model::{DeviceRow, Hangup, ModelError, RowLanes, RowSender};
use uniarm_runtime::drive::Inbox;

use crate::handle::{Command, ConnectionId};

/// Rows on their way into a lane: those of a step of as many sessions as run at once unless flags say otherwise. Each is in device
/// memory of its own, 131 MB together of a vocabulary of 128k. Rows for which there is no room go over the stream.
const LANE_ROWS_MAX: usize = 256;

/// What the engine holds of a lane. Dropping it closes the lane.
pub(crate) struct Lane {
    rows: mpsc::Sender<(DeviceRow, usize)>,
    hangup: Hangup,
}

// === impl Lane ===

impl Lane {
    /// Joins the base worker that offers a lane, on a thread of its own; the engine hears of it as soon as both ends are
    /// there, and again when the lane is closed.
    pub(crate) fn join(
        lanes: Arc<dyn RowLanes>,
        offer: Vec<u8>,
        (connection, inbox): (ConnectionId, Inbox<Command>),
    ) {
        let say = move |lane: Result<Lane, String>| inbox.send(Command::Lane { connection, lane }).is_ok();
        let refuse = say.clone();
        let serving = move || {
            let (rows, queue) = mpsc::channel(LANE_ROWS_MAX);
            let joined = lanes.sender(&offer);
            let ended = joined.and_then(|mut sender| {
                let lane = Lane { rows, hangup: sender.hangup() };
                if say(Ok(lane)) { carry(&mut *sender, queue) } else { Ok(()) }
            });
            if let Err(error) = ended {
                say(Err(error.to_string()));
            }
        };
        if let Err(error) = thread::Builder::new().name("lane".into()).spawn(serving) {
            refuse(Err(format!("the operating system gives no thread: {error}")));
        }
    }

    /// Rows that it has room for.
    pub(crate) fn room(&self) -> usize {
        self.rows.capacity()
    }

    /// Hands over a row, of which so many logits are sent. There is room for it; where the thread has ended, the engine hears
    /// of that, and so does the base worker.
    pub(crate) fn send(&self, row: DeviceRow, length: usize) {
        let _ = self.rows.try_send((row, length));
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.hangup.close();
    }
}

/// Sends rows until the engine has no more for this lane: all that are there together.
fn carry(
    sender: &mut dyn RowSender,
    mut queue: mpsc::Receiver<(DeviceRow, usize)>,
) -> Result<(), ModelError> {
    while let Some(first) = queue.blocking_recv() {
        let mut rows = vec![first];
        while let Ok(next) = queue.try_recv() {
            rows.push(next);
        }
        sender.send(rows)?;
    }
    Ok(())
}
