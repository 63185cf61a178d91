//! The same sessions inside one process: no wire, no copy.

use tokio::sync::mpsc;
use uniarm_proto::{OpBatch, ReplyBatch};

use crate::handle::RewardHandle;

/// A stream to the engine in this process. It ends when the sender is dropped.
pub fn connect(handle: &RewardHandle) -> (mpsc::Sender<OpBatch>, mpsc::UnboundedReceiver<ReplyBatch>) {
    let (ops, mut batches) = mpsc::channel::<OpBatch>(1);
    let (connection, replies) = handle.connect();
    tokio::spawn(async move {
        while let Some(batch) = batches.recv().await {
            let ops = batch.into_iter().map(|(session, generation, op)| (session, generation, Ok(op)));
            connection.submit(ops.collect()).await;
        }
    });
    (ops, replies)
}
