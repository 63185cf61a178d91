//! The calls of a group whose ranks exchange bytes, whatever carries these: the sums of [`crate::Local`], bit for bit.
//!
//! **Why no ring.** A sum in the order of ranks wants each chunk complete in one place: rank r collects the r-th part of the
//! numbers from all, adds them up, and sends the sum to all. Each rank sends 2(n − 1)/n of the bytes, as in a ring, but
//! in two hops instead of 2(n − 1), which is what counts for the few KB of a layer's activations. The price is a connection
//! for each pair. Two ranks, and messages that are small, take one hop: everyone sends everything to everyone.

use std::ops::Range;

use half::bf16;

use crate::{
    Aborter, Collective, CollectiveError, Group, OnDevice, Operation, Payload,
    arguments::{check_counts, check_members, check_parts, check_peer, check_root},
    exchange::{Exchange, Incoming, Outgoing},
};

/// Up to so many bytes each rank sends all of its numbers to each other one: one hop less is worth more than the bytes.
pub(crate) const ONE_HOP_BYTES_MAX: usize = 16 << 10;

/// One rank of a group whose ranks exchange bytes.
pub struct Ranks<E> {
    pub(crate) rank: usize,
    pub(crate) group: Group,
    pub(crate) links: E,
    /// Workspaces: numbers on their way out and in, as they travel.
    outbox: Vec<u8>,
    inbox: Vec<u8>,
    /// What is received from all ranks, as numbers.
    gathered: Vec<f32>,
}

// === impl Ranks ===

impl<E: Exchange> Ranks<E> {
    pub(crate) fn new(links: E, rank: usize, group: Group) -> Self {
        Self { rank, group, links, outbox: Vec::new(), inbox: Vec::new(), gathered: Vec::new() }
    }

    /// Sends its part of `values` to each other rank, and receives the own part from each: all of them, by rank, are in
    /// `gathered` then.
    fn gather(
        &mut self,
        operation: Operation,
        values: &[f32],
        part_of: impl Fn(usize) -> Range<usize>,
    ) -> Result<(), CollectiveError> {
        let Group { size, payload, .. } = self.group;
        let width = payload.bytes_per_number();
        let count = part_of(self.rank).len();
        let bytes = encode(payload, values, &mut self.outbox);
        grow(&mut self.gathered, size * count);
        let mut room = match payload {
            Payload::F32 => bytemuck::cast_slice_mut(&mut self.gathered[..size * count]),
            Payload::Bf16 => grow(&mut self.inbox, size * count * width),
        };
        let (mut outgoing, mut incoming) = (Vec::with_capacity(size), Vec::with_capacity(size));
        for rank in 0..size {
            let (place, rest) = room.split_at_mut(count * width);
            room = rest;
            if rank != self.rank {
                let part = part_of(rank);
                outgoing.push(Outgoing { to: rank, bytes: &bytes[part.start * width..part.end * width] });
                incoming.push(Incoming { from: rank, bytes: place });
            }
        }
        self.links.exchange(operation, &outgoing, &mut incoming)?;
        if payload == Payload::Bf16 {
            decode(&self.inbox, &mut self.gathered[..size * count]);
        }
        let own = &mut self.gathered[self.rank * count..][..count];
        own.copy_from_slice(&values[part_of(self.rank)]);
        payload.round(own);
        Ok(())
    }

    /// The sum of what was gathered, in the order of ranks.
    fn sum_gathered(&self, sum: &mut [f32]) {
        let count = sum.len();
        sum.copy_from_slice(&self.gathered[..count]);
        for rank in 1..self.group.size {
            for (sum, value) in sum.iter_mut().zip(&self.gathered[rank * count..][..count]) {
                *sum += value;
            }
        }
        self.group.payload.round(sum);
    }

    /// Sends the own part of `values` to every other one of `members`, and receives theirs into the places of these. Parts lie
    /// in the order of ranks.
    fn spread(
        &mut self,
        (operation, members): (Operation, Range<usize>),
        values: &mut [f32],
        part_of: impl Fn(usize) -> Range<usize>,
    ) -> Result<(), CollectiveError> {
        let payload = self.group.payload;
        let (width, count) = (payload.bytes_per_number(), values.len());
        let mut room = match payload {
            Payload::F32 => bytemuck::cast_slice_mut(&mut *values),
            Payload::Bf16 => {
                let room = grow(&mut self.inbox, count * width);
                let own = part_of(self.rank);
                let bytes = encode(payload, &values[own.clone()], &mut self.outbox);
                room[own.start * width..own.end * width].copy_from_slice(bytes);
                room
            }
        };
        let (mut own, mut incoming): (&[u8], _) = (&[], Vec::with_capacity(members.len()));
        for rank in members.clone() {
            let (place, rest) = room.split_at_mut(part_of(rank).len() * width);
            room = rest;
            match rank == self.rank {
                true => own = place,
                false => incoming.push(Incoming { from: rank, bytes: place }),
            }
        }
        let others = members.filter(|rank| *rank != self.rank);
        let outgoing: Vec<_> = others.map(|to| Outgoing { to, bytes: own }).collect();
        self.links.exchange(operation, &outgoing, &mut incoming)?;
        if payload == Payload::Bf16 {
            decode(&self.inbox, values);
        }
        Ok(())
    }

    /// One message from `from`.
    fn receive(
        &mut self,
        operation: Operation,
        from: usize,
        values: &mut [f32],
    ) -> Result<(), CollectiveError> {
        match self.group.payload {
            Payload::F32 => {
                let bytes = bytemuck::cast_slice_mut(values);
                self.links.exchange(operation, &[], &mut [Incoming { from, bytes }])
            }
            Payload::Bf16 => {
                let bytes = grow(&mut self.inbox, values.len() * Payload::Bf16.bytes_per_number());
                self.links.exchange(operation, &[], &mut [Incoming { from, bytes }])?;
                decode(&self.inbox, values);
                Ok(())
            }
        }
    }
}

impl<E: Exchange> Collective for Ranks<E> {
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
        self.links.aborter()
    }

    fn all_reduce_sum(&mut self, values: &mut [f32]) -> Result<(), CollectiveError> {
        let (size, count) = (self.group.size, values.len());
        if size <= 2 || count * self.group.payload.bytes_per_number() <= ONE_HOP_BYTES_MAX {
            self.gather(Operation::AllReduce, values, |_| 0..count)?;
            self.sum_gathered(values);
            return Ok(());
        }
        self.gather(Operation::AllReduce, values, |rank| part(size, count, rank))?;
        self.sum_gathered(&mut values[part(size, count, self.rank)]);
        self.spread((Operation::AllReduce, 0..size), values, |rank| part(size, count, rank))
    }

    fn all_gather_among(
        &mut self,
        members: Range<usize>,
        own: &[f32],
        counts: &[usize],
        all: &mut [f32],
    ) -> Result<(), CollectiveError> {
        check_members(self.group.size, self.rank, &members)?;
        check_counts(self.rank - members.start, members.len(), counts, (own.len(), all.len()))?;
        let first = members.start;
        let part_of = |rank: usize| {
            let start = counts[..rank - first].iter().sum();
            start..start + counts[rank - first]
        };
        let place = &mut all[part_of(self.rank)];
        place.copy_from_slice(own);
        self.group.payload.round(place);
        self.spread((Operation::AllGather, members), all, part_of)
    }

    fn reduce_scatter_sum(&mut self, values: &[f32], own: &mut [f32]) -> Result<(), CollectiveError> {
        check_parts(self.group.size, values.len(), own.len())?;
        let (size, count) = (self.group.size, values.len());
        self.gather(Operation::ReduceScatter, values, |rank| part(size, count, rank))?;
        self.sum_gathered(own);
        Ok(())
    }

    fn broadcast(&mut self, root: usize, values: &mut [f32]) -> Result<(), CollectiveError> {
        check_root(self.group.size, root)?;
        if self.rank != root {
            return self.receive(Operation::Broadcast, root, values);
        }
        self.group.payload.round(values);
        let bytes = encode(self.group.payload, values, &mut self.outbox);
        let others = (0..self.group.size).filter(|rank| *rank != root);
        let outgoing: Vec<_> = others.map(|to| Outgoing { to, bytes }).collect();
        self.links.exchange(Operation::Broadcast, &outgoing, &mut [])
    }

    fn send(&mut self, to: usize, values: &[f32]) -> Result<(), CollectiveError> {
        check_peer(self.group.size, self.rank, to)?;
        let bytes = encode(self.group.payload, values, &mut self.outbox);
        self.links.exchange(Operation::Send, &[Outgoing { to, bytes }], &mut [])
    }

    fn recv(&mut self, from: usize, values: &mut [f32]) -> Result<(), CollectiveError> {
        check_peer(self.group.size, self.rank, from)?;
        self.receive(Operation::Send, from, values)
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.gather(Operation::Barrier, &[], |_| 0..0)
    }

    fn on_device(&mut self) -> Option<&mut dyn OnDevice> {
        self.links.on_device()
    }
}

/// Which of `count` numbers are a rank's when they are dealt out.
fn part(size: usize, count: usize, rank: usize) -> Range<usize> {
    count * rank / size..count * (rank + 1) / size
}

/// A workspace of at least this length; what it holds is of no interest.
fn grow<T: Clone + Default>(workspace: &mut Vec<T>, length: usize) -> &mut [T] {
    if workspace.len() < length {
        workspace.resize(length, T::default());
    }
    &mut workspace[..length]
}

/// Numbers as they travel; in `outbox` if that is not how they lie in memory.
fn encode<'a>(payload: Payload, values: &'a [f32], outbox: &'a mut Vec<u8>) -> &'a [u8] {
    if payload == Payload::F32 {
        return bytemuck::cast_slice(values);
    }
    let bytes = grow(outbox, 2 * values.len());
    for (bytes, value) in bytes.chunks_exact_mut(2).zip(values) {
        bytes.copy_from_slice(&bf16::from_f32(*value).to_le_bytes());
    }
    bytes
}

/// The numbers of bf16 bytes; of as many as there is room for.
fn decode(bytes: &[u8], values: &mut [f32]) {
    for (value, bytes) in values.iter_mut().zip(bytes.chunks_exact(2)) {
        *value = bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
    }
}
