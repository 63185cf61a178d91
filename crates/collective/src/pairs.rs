//! A gather among some of the ranks, of messages between two of them.

use std::{cmp::Ordering, ops::Range};

use crate::{
    Collective, CollectiveError, Payload,
    arguments::{check_counts, check_members},
};

/// [`Collective::all_gather_among`], pair after pair in one order for all: nobody waits in a circle, whether or not a send
/// waits for its receiver.
pub(crate) fn gather_in_pairs(
    group: &mut dyn Collective,
    payload: Payload,
    members: Range<usize>,
    (own, counts): (&[f32], &[usize]),
    mut all: &mut [f32],
) -> Result<(), CollectiveError> {
    let rank = group.rank();
    check_members(group.size(), rank, &members)?;
    check_counts(rank - members.start, members.len(), counts, (own.len(), all.len()))?;
    for (peer, count) in members.zip(counts) {
        let part = all.split_off_mut(..*count).expect("the counts were checked");
        match peer.cmp(&rank) {
            Ordering::Less => {
                group.recv(peer, part)?;
                group.send(peer, own)?;
            }
            Ordering::Equal => {
                part.copy_from_slice(own);
                payload.round(part);
            }
            Ordering::Greater => {
                group.send(peer, own)?;
                group.recv(peer, part)?;
            }
        }
    }
    Ok(())
}
