//! What the ranks of a group hand each other within a step, from device to device.
//!
//! Outputs are divided as on CPUs (`crates/model/src/division.rs`): each rank computes its columns of a row, and all of them
//! gather the row before the next product. Parts travel as they were computed, (rows, own columns), and lie one behind the
//! other until a kernel places them; a single row of parts is the whole row already, and is gathered where it belongs.
//!
//! **Stages** pass on what a rank's columns of the residual have become, each rank to the one of its place in the next stage, where
//! they are gathered: between stages nothing travels twice. All transfers of a rank are on one stream, in the order of layers and
//! micro-batches. Logits, which go to rank 0, come last: rank 0 would else wait for a stage that waits for its next batch.

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
    /// Of the layers of a stage, by place.
    divisions: Vec<Division>,
    /// Of each kind of columns, where every place's begin, and the end.
    bounds: Memory<u32>,
}

/// Whose parts are gathered, and who gets them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Receivers {
    /// The ranks of a stage, each other's.
    Stage,
    /// Rank 0, those of the last stage.
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

    /// Whether there are others in its stage.
    pub fn has_fellows(&self) -> bool {
        self.divisions.len() > 1
    }

    /// Its place among the ranks of its stage.
    pub fn place(&self) -> usize {
        self.part.place()
    }

    pub fn divisions(&self) -> &[Division] {
        &self.divisions
    }

    /// What `place` takes for these columns.
    pub fn bounds(&self, columns: Columns) -> u64 {
        self.bounds.at(columns as usize * (self.divisions.len() + 1))
    }

    /// `parts`, those of all ranks of a stage of `rows` rows, gets of the first `count` of these what is computed elsewhere.
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

    /// Hands this rank's stretch of the numbers at `parts` to the receivers, and fills those of others where it is one. Stretches
    /// are by place.
    pub fn spread(
        &mut self,
        device: &Device,
        parts: u64,
        stretches: &[Range<usize>],
        receivers: Receivers,
    ) -> Result<(), ModelError> {
        let own = self.part.rank;
        let (givers, takers) = match receivers {
            Receivers::Stage => (self.part.members(), self.part.members()),
            Receivers::Leader => (self.part.last_members(), 0..1),
        };
        let (gives, takes) = (givers.contains(&own), takers.contains(&own));
        let parcel = |peer: usize, stretch: &Range<usize>| {
            parcel(peer, parts + (stretch.start * size_of::<f32>()) as u64, stretch.len())
        };
        let others = takers.filter(|peer| gives && *peer != own);
        let outgoing = others.filter_map(|peer| parcel(peer, &stretches[self.part.place()]));
        let others = givers.zip(stretches).filter(|(peer, _)| takes && *peer != own);
        let incoming = others.filter_map(|(peer, stretch)| parcel(peer, stretch));
        let (outgoing, incoming): (Vec<Parcel>, Vec<Parcel>) = (outgoing.collect(), incoming.collect());
        self.transfer(device, &outgoing, &incoming)
    }

    /// Hands so many numbers to the rank of its place in the next stage.
    pub fn pass_on(&mut self, device: &Device, address: u64, count: usize) -> Result<(), ModelError> {
        let next = self.part.rank + self.part.ranks();
        self.transfer(device, parcel(next, address, count).as_slice(), &[])
    }

    /// Takes so many numbers from the rank of its place in the stage before.
    pub fn take_over(&mut self, device: &Device, address: u64, count: usize) -> Result<(), ModelError> {
        let former = self.part.rank - self.part.ranks();
        self.transfer(device, &[], parcel(former, address, count).as_slice())
    }

    fn transfer(
        &mut self,
        device: &Device,
        outgoing: &[Parcel],
        incoming: &[Parcel],
    ) -> Result<(), ModelError> {
        // Safety: these are buffers of the model, which it gives back in the order of this very stream; the stream is one of
        // the device's primary context.
        unsafe { on_device(&mut *self.group).transfer(device.raw_stream(), outgoing, incoming) }?;
        Ok(())
    }

    /// Tokens of the vocabulary that each rank of a stage has.
    pub fn tokens(&self) -> impl Iterator<Item = usize> + Clone {
        self.divisions.iter().map(|division| division.columns(Columns::Vocabulary).len())
    }

    /// Brings rows of logits to rank 0, where `whole` gets them, (rows, vocabulary), from the host memory of the ranks of the last
    /// stage: `own` are this one's columns, if it is one of them. For a few rows now and then, which are not worth a way between
    /// devices. Returns how many bytes have come from others.
    pub fn collect(
        &mut self,
        own: &[f32],
        (rows, vocabulary): (usize, usize),
        whole: &mut [f32],
    ) -> Result<usize, ModelError> {
        if !self.leads() {
            if self.part.is_last_stage() {
                self.group.send(0, own)?;
            }
            return Ok(0);
        }
        let (mut part, mut received) = (Vec::new(), 0);
        for (rank, division) in self.part.last_members().zip(&self.divisions) {
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

/// None: it would be empty.
fn parcel(peer: usize, address: u64, count: usize) -> Option<Parcel> {
    let bytes = count * size_of::<f32>();
    (bytes > 0).then_some(Parcel { peer, address, bytes })
}

fn drain(group: &mut dyn Collective, device: &Device) -> Result<(), ModelError> {
    // Safety: the stream is one of the device's primary context.
    Ok(unsafe { on_device(group).drain(device.raw_stream()) }?)
}

fn on_device(group: &mut dyn Collective) -> &mut dyn OnDevice {
    group.on_device().expect("a group without a way between devices is not joined")
}
