//! Arguments that make no sense are refused before anybody else hears of the call.

use std::ops::Range;

use crate::{CollectiveError, Group, RANKS_MAX};

/// A group of this size, and a rank of it.
pub(crate) fn check_rank(group: &Group, rank: usize) -> Result<(), CollectiveError> {
    if group.size == 0 || group.size > RANKS_MAX {
        let reason = format!("is {}, wants 1..={RANKS_MAX} ranks", group.size);
        return Err(CollectiveError::Invalid { field: "size", reason });
    }
    if rank >= group.size {
        let reason = format!("is {rank}, wants less than the size {}", group.size);
        return Err(CollectiveError::Invalid { field: "rank", reason });
    }
    Ok(())
}

/// `whole` holds a part of `part` numbers for each rank.
pub(crate) fn check_parts(size: usize, whole: usize, part: usize) -> Result<(), CollectiveError> {
    if part.checked_mul(size) != Some(whole) {
        let reason = format!("has {whole} numbers, wants {part} for each of {size} ranks");
        return Err(CollectiveError::Invalid { field: "length", reason });
    }
    Ok(())
}

/// `counts` name a part for each rank, which together are `whole`; the own one has `own` numbers.
pub(crate) fn check_counts(
    rank: usize,
    size: usize,
    counts: &[usize],
    (own, whole): (usize, usize),
) -> Result<(), CollectiveError> {
    if counts.len() != size {
        let reason = format!("are for {} ranks, of {size}", counts.len());
        return Err(CollectiveError::Invalid { field: "counts", reason });
    }
    if counts[rank] != own {
        let reason = format!("name {} numbers of rank {rank}, which brings {own}", counts[rank]);
        return Err(CollectiveError::Invalid { field: "counts", reason });
    }
    let sum = counts.iter().try_fold(0_usize, |sum, count| sum.checked_add(*count));
    if sum != Some(whole) {
        let reason = format!("has {whole} numbers, wants as many as {counts:?} together");
        return Err(CollectiveError::Invalid { field: "length", reason });
    }
    Ok(())
}

/// Ranks of the group, of which this is one.
pub(crate) fn check_members(size: usize, own: usize, members: &Range<usize>) -> Result<(), CollectiveError> {
    if members.end > size || !members.contains(&own) {
        let reason = format!("are {members:?}, want ranks of {size} with this one, {own}");
        return Err(CollectiveError::Invalid { field: "members", reason });
    }
    Ok(())
}

pub(crate) fn check_root(size: usize, root: usize) -> Result<(), CollectiveError> {
    if root >= size {
        let reason = format!("is {root}, wants less than the size {size}");
        return Err(CollectiveError::Invalid { field: "root", reason });
    }
    Ok(())
}

pub(crate) fn check_peer(size: usize, own: usize, peer: usize) -> Result<(), CollectiveError> {
    if peer >= size || peer == own {
        let reason = format!("is {peer}, wants another rank of {size} than its own {own}");
        return Err(CollectiveError::Invalid { field: "peer", reason });
    }
    Ok(())
}
