//! The line of sequences that want blocks, in the order of their rank.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::ops::Bound;

use super::sequence::Rank;
use super::{PROMOTION_STEPS, Priority, SequenceId};

#[derive(Default)]
pub(super) struct Waiting {
    line: BTreeMap<Rank, Place>,
}

#[derive(Clone, Copy)]
struct Place {
    id: SequenceId,
    /// The priority that was asked for.
    asked: Priority,
    /// Step in which it joined this class of the line.
    since: u64,
}

impl Waiting {
    /// Joins the line; a sequence that stands in it keeps its place.
    pub(super) fn insert(&mut self, rank: Rank, id: SequenceId, asked: Priority, step: u64) {
        self.line.entry(rank).or_insert(Place { id, asked, since: step });
    }

    /// The class of a sequence whose tenant's turn comes at `tag`. Whoever has risen by waiting has not passed those who
    /// stood before it: they rise with it, or the oldest of a flood would keep out all other tenants.
    pub(super) fn class_at(&self, asked: Priority, tag: u64) -> Priority {
        let behind = self.line.iter().filter(|(rank, place)| place.asked == asked && rank.tag > tag);
        behind.map(|(rank, _)| rank.class.0).max().unwrap_or(asked).max(asked)
    }

    /// Those that somebody behind them has passed by rising.
    pub(super) fn passed(&self) -> Vec<SequenceId> {
        let mut furthest = [None; 3];
        for (rank, place) in &self.line {
            let risen = &mut furthest[place.asked as usize];
            *risen = (*risen).max(Some((rank.class.0, rank.tag)).filter(|(class, _)| *class > place.asked));
        }
        let is_passed = |(rank, place): &(&Rank, &Place)| {
            furthest[place.asked as usize].is_some_and(|(class, tag)| rank.class.0 < class && rank.tag < tag)
        };
        self.line.iter().filter(is_passed).map(|(_, place)| place.id).collect()
    }

    pub(super) fn remove(&mut self, rank: Rank) {
        self.line.remove(&rank);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.line.is_empty()
    }

    /// The first in line, or the first after a rank.
    pub(super) fn first_after(&self, rank: Option<Rank>) -> Option<(Rank, SequenceId)> {
        let from = rank.map_or(Bound::Unbounded, Bound::Excluded);
        self.line.range((from, Bound::Unbounded)).next().map(|(&rank, place)| (rank, place.id))
    }

    /// How many stand in a higher class, or in this one with a tag that is not larger.
    pub(super) fn until(&self, class: Priority, tag: u64) -> usize {
        let last = Rank { class: Reverse(class), tag, arrival: u64::MAX };
        self.line.range(..=last).count()
    }

    /// Takes out those that have waited long enough in their class to be promoted.
    pub(super) fn take_overdue(&mut self, step: u64) -> Vec<SequenceId> {
        let overdue = |rank: &Rank, place: &Place| {
            rank.class.0 < Priority::High && step.saturating_sub(place.since) >= PROMOTION_STEPS
        };
        let ranks = self.line.iter().filter(|(rank, place)| overdue(rank, place));
        let ranks: Vec<Rank> = ranks.map(|(&rank, _)| rank).collect();
        ranks.iter().filter_map(|rank| self.line.remove(rank)).map(|place| place.id).collect()
    }
}
