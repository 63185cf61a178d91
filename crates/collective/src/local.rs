//! Ranks that are threads of one process: the reference. Every call is a meeting at one board, and every rank computes
//! from what the others left there, as the definition says.

use std::{ops::Range, sync::Arc, time::Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::{
    Aborter, Collective, CollectiveError, Group, Operation,
    arguments::{check_counts, check_parts, check_peer, check_rank, check_root},
    pairs::gather_in_pairs,
};

/// One rank of a group inside a process.
pub struct Local {
    rank: usize,
    group: Group,
    shared: Arc<Shared>,
    /// Meetings that this rank has been to.
    rounds: u64,
}

struct Shared {
    board: Mutex<Board>,
    changed: Condvar,
}

#[derive(Default)]
struct Board {
    /// What each rank brings to the next meeting.
    posts: Vec<Option<Post>>,
    /// Meetings that took place; nobody comes to the next one before he took what the last one left.
    rounds: u64,
    last: Arc<Vec<Post>>,
    /// A message on its way, by sender and receiver.
    letters: Vec<Option<Vec<f32>>>,
    /// Why a rank left.
    gone: Vec<Option<CollectiveError>>,
}

#[derive(Clone)]
struct Post {
    operation: Operation,
    values: Vec<f32>,
}

// === impl Local ===

impl Local {
    /// All ranks of a group, in order: one for each thread.
    ///
    /// # Errors
    /// [`CollectiveError::Invalid`] for a size that is zero or too large.
    pub fn group(group: Group) -> Result<Vec<Self>, CollectiveError> {
        check_rank(&group, 0)?;
        let board = Board {
            posts: vec![None; group.size],
            letters: vec![None; group.size * group.size],
            gone: vec![None; group.size],
            ..Board::default()
        };
        let shared = Arc::new(Shared { board: Mutex::new(board), changed: Condvar::new() });
        let ranks = (0..group.size).map(|rank| Self { rank, group, shared: shared.clone(), rounds: 0 });
        Ok(ranks.collect())
    }

    /// What all ranks bring, in their order; each as many numbers as the others.
    fn meet(&mut self, operation: Operation, values: &[f32]) -> Result<Arc<Vec<Post>>, CollectiveError> {
        let count = values.len();
        self.meet_with(operation, values, |_| count)
    }

    /// What all ranks bring, in their order; rank r as many numbers as `count_of` says.
    fn meet_with(
        &mut self,
        operation: Operation,
        values: &[f32],
        count_of: impl Fn(usize) -> usize,
    ) -> Result<Arc<Vec<Post>>, CollectiveError> {
        let shared = self.shared.clone();
        let mut board = shared.board.lock();
        self.check_alive(&board)?;
        let mut values = values.to_vec();
        self.group.payload.round(&mut values);
        board.posts[self.rank] = Some(Post { operation, values });
        if board.posts.iter().all(Option::is_some) {
            board.last = Arc::new(board.posts.iter_mut().filter_map(Option::take).collect());
            board.rounds += 1;
            shared.changed.notify_all();
        }
        self.rounds += 1;
        let round = self.rounds;
        self.wait(
            &mut board,
            operation,
            |board| board.rounds >= round,
            |board, rank| board.posts[rank].is_none(),
        )?;
        let posts = board.last.clone();
        let differs = |rank: &usize| {
            posts[*rank].operation != operation || posts[*rank].values.len() != count_of(*rank)
        };
        if let Some(rank) = (0..posts.len()).find(differs) {
            let Post { operation: other, values } = &posts[rank];
            let what = format!("calls {other} of {} numbers, not of {}", values.len(), count_of(rank));
            return Err(self.leave(&mut board, CollectiveError::Mismatch { operation, rank, what }));
        }
        Ok(posts)
    }

    /// Waits for what others do; `owes` says whether it depends on a rank that has not come yet.
    fn wait(
        &self,
        board: &mut MutexGuard<'_, Board>,
        operation: Operation,
        done: impl Fn(&Board) -> bool,
        owes: impl Fn(&Board, usize) -> bool,
    ) -> Result<(), CollectiveError> {
        let timeout = self.group.timeout;
        let deadline = Instant::now() + timeout;
        while !done(board) {
            self.check_alive(board)?;
            let lost = (0..self.group.size).filter(|rank| owes(board, *rank));
            let lost = lost.filter_map(|rank| Some((rank, board.gone[rank].as_ref()?.to_string()))).next();
            if let Some((rank, reason)) = lost {
                return Err(self.leave(board, CollectiveError::PeerLost { operation, rank, reason }));
            }
            if self.shared.changed.wait_until(board, deadline).timed_out() && !done(board) {
                let rank = (0..self.group.size).find(|rank| owes(board, *rank)).unwrap_or(self.rank);
                return Err(self.leave(board, CollectiveError::Deadline { operation, rank, timeout }));
            }
        }
        Ok(())
    }

    fn check_alive(&self, board: &Board) -> Result<(), CollectiveError> {
        board.gone[self.rank].clone().map_or(Ok(()), Err)
    }

    fn leave(&self, board: &mut Board, why: CollectiveError) -> CollectiveError {
        let why = board.gone[self.rank].get_or_insert(why).clone();
        self.shared.changed.notify_all();
        why
    }

    /// ((x₀ + x₁) + x₂) + …, number by number.
    fn sum(&self, posts: &[Post]) -> Vec<f32> {
        let mut sum = posts[0].values.clone();
        for post in &posts[1..] {
            for (sum, value) in sum.iter_mut().zip(&post.values) {
                *sum += value;
            }
        }
        self.group.payload.round(&mut sum);
        sum
    }
}

impl Collective for Local {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.group.size
    }

    fn epoch(&self) -> u64 {
        self.group.epoch
    }

    fn aborter(&self) -> Aborter {
        let (shared, rank) = (self.shared.clone(), self.rank);
        Aborter(Arc::new(move |reason| {
            let why = CollectiveError::Aborted { reason: reason.to_owned() };
            shared.board.lock().gone[rank].get_or_insert(why);
            shared.changed.notify_all();
        }))
    }

    fn all_reduce_sum(&mut self, values: &mut [f32]) -> Result<(), CollectiveError> {
        let posts = self.meet(Operation::AllReduce, values)?;
        values.copy_from_slice(&self.sum(&posts));
        Ok(())
    }

    fn all_gather_among(
        &mut self,
        members: Range<usize>,
        own: &[f32],
        counts: &[usize],
        all: &mut [f32],
    ) -> Result<(), CollectiveError> {
        // A meeting is of all; some of them send each other letters.
        if members != (0..self.group.size) {
            let payload = self.group.payload;
            return gather_in_pairs(self, payload, members, (own, counts), all);
        }
        check_counts(self.rank, self.group.size, counts, (own.len(), all.len()))?;
        let posts = self.meet_with(Operation::AllGather, own, |rank| counts[rank])?;
        let mut rest = all;
        for post in posts.iter() {
            let (place, behind) = rest.split_at_mut(post.values.len());
            place.copy_from_slice(&post.values);
            rest = behind;
        }
        Ok(())
    }

    fn reduce_scatter_sum(&mut self, values: &[f32], own: &mut [f32]) -> Result<(), CollectiveError> {
        check_parts(self.group.size, values.len(), own.len())?;
        let posts = self.meet(Operation::ReduceScatter, values)?;
        let part = self.rank * own.len();
        own.copy_from_slice(&self.sum(&posts)[part..][..own.len()]);
        Ok(())
    }

    fn broadcast(&mut self, root: usize, values: &mut [f32]) -> Result<(), CollectiveError> {
        check_root(self.group.size, root)?;
        let posts = self.meet(Operation::Broadcast, values)?;
        values.copy_from_slice(&posts[root].values);
        Ok(())
    }

    fn send(&mut self, to: usize, values: &[f32]) -> Result<(), CollectiveError> {
        check_peer(self.group.size, self.rank, to)?;
        let shared = self.shared.clone();
        let mut board = shared.board.lock();
        self.check_alive(&board)?;
        let place = self.rank * self.group.size + to;
        // One message on its way: a program that needs more room than that fails here, where it is tested.
        self.wait(&mut board, Operation::Send, |board| board.letters[place].is_none(), |_, rank| rank == to)?;
        let mut values = values.to_vec();
        self.group.payload.round(&mut values);
        board.letters[place] = Some(values);
        shared.changed.notify_all();
        Ok(())
    }

    fn recv(&mut self, from: usize, values: &mut [f32]) -> Result<(), CollectiveError> {
        check_peer(self.group.size, self.rank, from)?;
        let shared = self.shared.clone();
        let mut board = shared.board.lock();
        self.check_alive(&board)?;
        let place = from * self.group.size + self.rank;
        let operation = Operation::Send;
        self.wait(&mut board, operation, |board| board.letters[place].is_some(), |_, rank| rank == from)?;
        let letter = board.letters[place].take().unwrap_or_default();
        shared.changed.notify_all();
        if letter.len() != values.len() {
            let what = format!("sends {} numbers, not {}", letter.len(), values.len());
            let error = CollectiveError::Mismatch { operation, rank: from, what };
            return Err(self.leave(&mut board, error));
        }
        values.copy_from_slice(&letter);
        Ok(())
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.meet(Operation::Barrier, &[]).map(|_| ())
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        let why = CollectiveError::Aborted { reason: "it left the group".to_owned() };
        self.leave(&mut self.shared.board.lock(), why);
    }
}
