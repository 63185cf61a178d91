//! Arguments that make no sense are refused before anybody else hears of the call.

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
