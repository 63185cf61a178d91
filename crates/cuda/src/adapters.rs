//! Adapters on the device: uploaded when a row first has them, and kept as long as anybody else keeps them.

use std::mem::offset_of;
use std::ops::Range;
use std::sync::{Arc, Weak};

use bytemuck::{Pod, Zeroable};
use uniarm_model::{Adapter, Conditioned, Division, Linear, Mixing, ModelError, Outputs, StackedFactors};

use crate::device::Device;
use crate::memory::Memory;

/// As in `kernels/adapter.cu`.
const PART_RANK_MAX: usize = 2048;
const PARTS_MAX: usize = 3;

/// Linear layers that share their input, and whose outputs stand side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Group {
    Qkv,
    Output,
    GateUp,
    Down,
}

/// All adapters that rows of recent steps had.
#[derive(Default)]
pub(crate) struct Adapters {
    loaded: Vec<Loaded>,
}

/// One adapter's weights on the device: those of the layers of a rank's stage, and of every B the rows of its own outputs.
pub(crate) struct Loaded {
    /// Dead once nobody can send rows with it any more.
    adapter: Weak<Adapter>,
    fingerprint: [u8; 32],
    /// A [`GroupRecord`] for each group of each of these layers.
    table: Memory<u8>,
    /// Per group of each of them, the ranks of its parts together, and the outputs of the widest one.
    extents: Vec<Extent>,
    /// What the table points to.
    _factors: Memory<f32>,
}

/// What a launch has to cover.
#[derive(Clone, Copy, Default)]
pub(crate) struct Extent {
    pub ranks: usize,
    pub outputs: usize,
}

/// `AdapterPart` of the kernels.
#[derive(Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
struct PartRecord {
    b: u64,
    first_rank: i32,
    rank: i32,
    mixing: i32,
    state: i32,
    column: i32,
    outputs: i32,
}

/// `AdapterGroup` of the kernels.
#[derive(Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
struct GroupRecord {
    a: u64,
    parts: [PartRecord; PARTS_MAX],
    ranks: i32,
    part_count: i32,
}

const _: () = {
    assert!(size_of::<PartRecord>() == 32 && offset_of!(GroupRecord, ranks) == 8 + 32 * PARTS_MAX);
};

impl Group {
    pub const COUNT: usize = 4;

    fn of(linear: Linear) -> Self {
        match linear {
            Linear::Query | Linear::Key | Linear::Value => Self::Qkv,
            Linear::Output => Self::Output,
            Linear::Gate | Linear::Up => Self::GateUp,
            Linear::Down => Self::Down,
        }
    }
}

impl Adapters {
    /// The adapter of a row on the device, of these layers.
    pub fn load(
        &mut self,
        device: &Device,
        (layers, division): (&Range<usize>, &Division),
        conditioned: &Conditioned,
    ) -> Result<&Loaded, ModelError> {
        let fingerprint = conditioned.adapter().fingerprint();
        if let Some(index) = self.loaded.iter().position(|loaded| loaded.fingerprint == fingerprint) {
            // The same weights may come back as another object after the first one went.
            self.loaded[index].adapter = Arc::downgrade(conditioned.adapter());
            return Ok(&self.loaded[index]);
        }
        self.loaded.retain(|loaded| loaded.adapter.strong_count() > 0);
        self.loaded.push(Loaded::new(device, (layers, division), conditioned.adapter())?);
        Ok(self.loaded.last().expect("the one that was pushed"))
    }
}

impl Loaded {
    fn new(
        device: &Device,
        (layers, division): (&Range<usize>, &Division),
        adapter: &Arc<Adapter>,
    ) -> Result<Self, ModelError> {
        let mut stacks = adapter.factors();
        stacks.retain(|stack| layers.contains(&stack.layer));
        for part in stacks.iter_mut().flat_map(|stack| &mut stack.parts) {
            let own = division.outputs(part.linear).rows;
            part.b.truncate(own.end * part.rank);
            part.b.drain(..own.start * part.rank);
        }
        let factors: Vec<f32> = stacks.iter().flat_map(numbers).flatten().copied().collect();
        let factors = Memory::of(device, &factors, "an adapter")?;
        let mut records = vec![GroupRecord::default(); layers.len() * Group::COUNT];
        let mut extents = vec![Extent::default(); records.len()];
        let mut next = 0;
        for stack in &stacks {
            let index =
                (stack.layer - layers.start) * Group::COUNT + Group::of(stack.parts[0].linear) as usize;
            records[index] = record(stack, division, |count| {
                next += count;
                factors.at(next - count)
            })?;
            let outputs = stack.parts.iter().map(|part| division.outputs(part.linear).rows.len()).max();
            extents[index] =
                Extent { ranks: records[index].ranks as usize, outputs: outputs.expect("a stack has parts") };
        }
        let table = Memory::of(device, bytemuck::cast_slice(&records), "an adapter")?;
        let (adapter, fingerprint) = (Arc::downgrade(adapter), adapter.fingerprint());
        Ok(Self { adapter, fingerprint, table, extents, _factors: factors })
    }

    pub fn table(&self) -> u64 {
        self.table.at(0)
    }

    /// Per group of each of the stage's layers.
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }
}

impl Extent {
    /// What covers both.
    pub fn join(self, other: Self) -> Self {
        Self { ranks: self.ranks.max(other.ranks), outputs: self.outputs.max(other.outputs) }
    }
}

/// A, then every B, as they lie on the device. Each begins at 16 bytes: rows of A are multiples of 16 numbers, and a B
/// is filled up.
fn numbers(stack: &StackedFactors) -> impl Iterator<Item = &[f32]> {
    const ZEROS: [f32; 4] = [0.0; 4];
    let filled = |b: &'_ [f32]| &ZEROS[..b.len().next_multiple_of(4) - b.len()];
    let parts = stack.parts.iter().flat_map(move |part| [part.b.as_slice(), filled(&part.b)]);
    std::iter::once(stack.a.as_slice()).chain(parts)
}

/// `place` gives the address of the next so many numbers.
fn record(
    stack: &StackedFactors,
    division: &Division,
    mut place: impl FnMut(usize) -> u64,
) -> Result<GroupRecord, ModelError> {
    let a = place(stack.a.len());
    let mut record = GroupRecord { a, part_count: stack.parts.len() as i32, ..GroupRecord::default() };
    for (part, to) in stack.parts.iter().zip(&mut record.parts) {
        if part.rank > PART_RANK_MAX {
            let reason = format!("a rank of {}; on a GPU there are at most {PART_RANK_MAX}", part.rank);
            return Err(ModelError::Invalid { field: "adapter", reason });
        }
        let Outputs { rows, column } = division.outputs(part.linear);
        *to = PartRecord {
            b: place(part.b.len().next_multiple_of(4)),
            first_rank: part.first_rank as i32,
            rank: part.rank as i32,
            mixing: match part.mixing {
                Mixing::Scale => 0,
                Mixing::Affine => 1,
                Mixing::Matrix => 2,
            },
            state: part.state as i32,
            column: column as i32,
            outputs: rows.len() as i32,
        };
        record.ranks += part.rank as i32;
    }
    Ok(record)
}
