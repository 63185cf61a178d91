//! What the ranks of a group hand each other within a step, from device to device.
//!
//! Outputs are divided as on CPUs (`crates/model/src/division.rs`): each rank computes its columns of a row, and all of them
//! gather the row before the next product. Parts travel as they were computed, (rows, own columns), and lie one behind the
//! other until a kernel places them; a single row of parts is the whole row already, and is gathered where it belongs.

use std::ops::Range;

use uniarm_collective::{Collective, OnDevice, Parcel};
use uniarm_model::{Columns, Config, Division, ModelError, Part};

use crate::device::Device;
use crate::memory::Memory;

/// Layers between two times at which the host waits for the device. A stream takes some thousand launches before a further
/// one waits for the first, and behind a transfer that hangs it would wait for ever; a layer has up to thirty.
pub(crate) const LAYERS_IN_FLIGHT: usize = 16;

/// The way to all others.
pub(crate) struct Peers {
    group: Box<dyn Collective>,
    part: Part,
    /// By rank.
    divisions: Vec<Division>,
    /// Of each kind of columns, where every rank's begin, and the end.
    bounds: Memory<u32>,
}

/// Who gets this rank's part.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Receivers {
    All,
    Leader,
}

impl Peers {
    /// # Errors
    /// [`ModelError::Invalid`] for a group without a way between devices; [`ModelError::Group`] when what a former group left
    /// on the device does not end.
    pub fn with(
        mut group: Box<dyn Collective>,
        part: Part,
        (device, config): (&Device, &Config),
    ) -> Result<Self, ModelError> {
        let divisions = Division::of_stage(config, part)?;
        let bounds: Vec<u32> =
            [Columns::Queries, Columns::Hidden, Columns::Intermediate, Columns::Vocabulary]
                .into_iter()
                .flat_map(|columns| {
                    let ends = divisions.iter().map(move |division| division.columns(columns).end as u32);
                    std::iter::once(0).chain(ends)
                })
                .collect();
        if group.on_device().is_none() {
            let reason = "its ranks have no way between their devices".to_owned();
            return Err(ModelError::Invalid { field: "group", reason });
        }
        drain(&mut *group, device)?;
        let bounds = Memory::of(device, &bounds, "the bounds of ranks")?;
        Ok(Self { group, part, divisions, bounds })
    }

    pub fn group(&mut self) -> &mut dyn Collective {
        &mut *self.group
    }

    pub fn leads(&self) -> bool {
        self.part.rank == 0
    }

    /// Whether there are others.
    pub fn has_others(&self) -> bool {
        self.part.size > 1
    }

    pub fn rank(&self) -> usize {
        self.part.rank
    }

    pub fn divisions(&self) -> &[Division] {
        &self.divisions
    }

    /// What `place` takes for these columns.
    pub fn bounds(&self, columns: Columns) -> u64 {
        self.bounds.at(columns as usize * (self.divisions.len() + 1))
    }

    /// `parts`, those of all ranks of `rows` rows, gets of the first `count` of these what is computed elsewhere.
    pub fn gather(
        &mut self,
        device: &Device,
        (columns, rows, count): (Columns, usize, usize),
        parts: u64,
        receivers: Receivers,
    ) -> Result<(), ModelError> {
        let stretches: Vec<Range<usize>> = self
            .divisions
            .iter()
            .map(|division| {
                let own = division.columns(columns);
                rows * own.start..rows * own.start + count * own.len()
            })
            .collect();
        self.spread(device, parts, &stretches, receivers)
    }

    /// Hands this rank's stretch of the numbers at `parts` to the receivers, and fills those of others where it is one.
    pub fn spread(
        &mut self,
        device: &Device,
        parts: u64,
        stretches: &[Range<usize>],
        receivers: Receivers,
    ) -> Result<(), ModelError> {
        let own = self.part.rank;
        let receives = |rank: usize| receivers == Receivers::All || rank == 0;
        let parcel = |peer: usize, stretch: &Range<usize>| Parcel {
            peer,
            address: parts + (stretch.start * size_of::<f32>()) as u64,
            bytes: stretch.len() * size_of::<f32>(),
        };
        let others = || (0..stretches.len()).filter(|rank| *rank != own);
        let outgoing = others().filter(|rank| receives(*rank)).map(|rank| parcel(rank, &stretches[own]));
        let incoming = others().filter(|_| receives(own)).map(|rank| parcel(rank, &stretches[rank]));
        let [outgoing, incoming] =
            [outgoing.collect::<Vec<_>>(), incoming.collect()].map(|mut parcels: Vec<Parcel>| {
                parcels.retain(|parcel| parcel.bytes > 0);
                parcels
            });
        // Safety: these are buffers of the model, which it gives back in the order of this very stream; the stream is one of
        // the device's primary context.
        unsafe { on_device(&mut *self.group).transfer(device.raw_stream(), &outgoing, &incoming) }?;
        Ok(())
    }

    /// Tokens of the vocabulary that each rank has.
    pub fn tokens(&self) -> impl Iterator<Item = usize> + Clone {
        self.divisions.iter().map(|division| division.columns(Columns::Vocabulary).len())
    }

    /// Brings rows of logits to rank 0, where `whole` gets them, (rows, vocabulary), from the host memory of all ranks: `own`
    /// are this one's columns. For a few rows now and then, which are not worth a way between devices. Returns how many bytes
    /// have come from others.
    pub fn collect(
        &mut self,
        own: &[f32],
        (rows, vocabulary): (usize, usize),
        whole: &mut [f32],
    ) -> Result<usize, ModelError> {
        if !self.leads() {
            self.group.send(0, own)?;
            return Ok(0);
        }
        let (mut part, mut received) = (Vec::new(), 0);
        for (rank, division) in self.divisions.iter().enumerate() {
            let columns = division.columns(Columns::Vocabulary);
            if rank == 0 {
                part.extend_from_slice(own);
            } else {
                part.resize(rows * columns.len(), 0.0);
                self.group.recv(rank, &mut part)?;
                received += size_of_val(part.as_slice());
            }
            for (row, part) in whole.chunks_exact_mut(vocabulary).zip(part.chunks_exact(columns.len())) {
                row[columns.clone()].copy_from_slice(part);
            }
        }
        Ok(received)
    }

    /// Waits until everything is computed.
    pub fn drain(&mut self, device: &Device) -> Result<(), ModelError> {
        drain(&mut *self.group, device)
    }

    /// Lets the others know that this rank does not go on.
    pub fn abort(&self, reason: &str) {
        self.group.aborter().abort(reason);
    }
}

fn drain(group: &mut dyn Collective, device: &Device) -> Result<(), ModelError> {
    // Safety: the stream is one of the device's primary context.
    Ok(unsafe { on_device(group).drain(device.raw_stream()) }?)
}

fn on_device(group: &mut dyn Collective) -> &mut dyn OnDevice {
    group.on_device().expect("a group without a way between devices is not joined")
}
