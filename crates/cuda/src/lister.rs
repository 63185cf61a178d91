//! Lists of the likeliest tokens, made on the device, and the rows behind the latest of them.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use uniarm_collective::Collective;
use uniarm_model::{Candidate, Likeliest, Listing, Lists, ModelError, NoiseAt, Part, Row};

use crate::device::Argument::Address;
use crate::device::{Device, Grid};
use crate::graphs::Launcher;
use crate::locked::Locked;
use crate::memory::{Growing, Memory};
use crate::rows::{CudaRow, Stock};
use crate::step::integer;

// As in `kernels/likeliest.cu`.
const LIST_THREADS: u32 = 256;
const LIST_QUADS: usize = 4;
const LIST_MAX: usize = 1024;

/// Tokens that a block of threads takes.
const PART_TOKENS: usize = LIST_THREADS as usize * LIST_QUADS * 4;

/// Words of a token of a list: place, id and logit.
const TOKEN_WORDS: usize = 3;

/// Makes lists of this rank's tokens.
pub(crate) struct Lister {
    listing: Listing,
    /// This rank's part of the vocabulary, empty where another stage has the logits; and all of it.
    slice: Range<usize>,
    vocabulary: usize,
    /// Of the step's lists.
    records: Vec<ListRecord>,
    /// Logits behind lists, each in its [`Listing::slot`]: (KEPT, slice.len())
    kept: Memory<f32>,
    /// Keys of the best tokens of parts: (lists, parts, count)
    candidates: Growing<u64>,
    /// On the device, and here: (listed tokens, 3)
    listed: Growing<u32>,
    words: Locked<u32>,
    /// Rows that were kept, on their way to the host.
    rows: Locked<f32>,
    /// The same, on their way to another device.
    stock: Stock,
    /// What this rank hands over, as [`Listing::write`] has it.
    own: Vec<u32>,
}

/// `ListRecord` of the kernels.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ListRecord {
    scale: f32,
    noisy: i32,
    seed: [u32; 2],
    choice: u32,
    position: u32,
    count: i32,
    begin: i32,
    slot: i32,
}

// === impl Lister ===

impl Lister {
    /// For the tokens of `slice`; reserves the ring of rows.
    pub fn reserve(device: &Device, slice: Range<usize>, vocabulary: usize) -> Result<Self, ModelError> {
        let kept = Memory::reserve(device, Listing::KEPT * slice.len(), "the rows behind lists")?;
        Ok(Self {
            listing: Listing::default(),
            slice,
            vocabulary,
            records: Vec::new(),
            kept,
            candidates: Growing::new(),
            listed: Growing::new(),
            words: Locked::new(),
            rows: Locked::new(),
            stock: Stock::new(),
            own: Vec::new(),
        })
    }

    /// Counts lists from 0 again: a new group begins.
    pub fn restart(&mut self) {
        self.listing = Listing::default();
    }

    /// Notes what a step wants of each position; see [`Listing::begin`].
    pub fn begin(&mut self, rows: &[Row<'_>], wanted: &[Option<Likeliest>]) {
        self.listing.begin(rows, wanted);
        self.records.clear();
        let mut begin = 0;
        for (number, wanted) in self.listing.numbered() {
            // More than there is room for are none at all: such a list says nothing, and its row is asked for.
            let count = match wanted.count.min(self.vocabulary) {
                ..=LIST_MAX => wanted.count.min(self.slice.len()),
                _ => 0,
            };
            let slot = self.listing.keeps(number).then(|| Listing::slot(number));
            self.records.push(ListRecord::new(wanted, count, begin, slot));
            begin += count;
        }
    }

    /// Of some of the step's positions, those whose rows are wanted, and then the others.
    pub fn order(&self, positions: Range<usize>) -> impl Iterator<Item = usize> {
        let all = self.listing.whole().chain(self.listing.listed());
        all.filter(move |position| positions.contains(position))
    }

    /// Where logits of both kinds lie among those of the step, of which all rows that are wanted come first.
    pub fn places(&self, positions: Range<usize>) -> [Range<usize>; 2] {
        let Range { start, end } = positions;
        let whole = |end: usize| self.listing.wanted()[..end].iter().filter(|list| list.is_none()).count();
        let listed = |end: usize| self.whole() + end - whole(end);
        [whole(start)..whole(end), listed(start)..listed(end)]
    }

    pub fn positions(&self) -> usize {
        self.listing.positions()
    }

    /// Positions whose rows are wanted.
    pub fn whole(&self) -> usize {
        self.positions() - self.records.len()
    }

    pub fn lists(&self) -> usize {
        self.records.len()
    }

    /// The step's lists in words, as the device takes them.
    pub fn records(&self) -> impl Iterator<Item = u32> {
        bytemuck::cast_slice(&self.records).iter().copied()
    }

    /// Room on the host for the step's lists, before anything is computed, as of a workspace.
    pub fn make_room(&mut self, device: &Device) -> Result<(), ModelError> {
        match self.tokens() {
            0 => Ok(()),
            tokens => self.words.reserve(device.stream(), tokens * TOKEN_WORDS).map(|_| ()),
        }
    }

    /// Makes the step's lists of `scores`, (lists, slice.len()), and keeps these rows.
    pub fn make(
        &mut self,
        (device, launcher): (&Device, &mut Launcher<'_>),
        scores: u64,
        records: u64,
    ) -> Result<(), ModelError> {
        let lists = self.records.len();
        let parts = (self.slice.start % 4 + self.slice.len()).div_ceil(PART_TOKENS);
        let longest = self.records.iter().map(|record| record.count as usize).max().unwrap_or(0);
        // Steps of nearly one size shall not each allocate, nor each differ in what they launch.
        let stride = parts * longest.next_power_of_two();
        let (of_parts, of_rows) = (lists.next_power_of_two() * stride, self.tokens().next_power_of_two());
        let candidates = self.candidates.reserve(device, of_parts, "a step's lists")?.at(0);
        let listed = self.listed.reserve(device, of_rows * TOKEN_WORDS, "a step's lists")?.at(0);
        let (columns, first) = (self.slice.len(), self.slice.start);
        let arguments = [
            Address(scores),
            integer(columns),
            integer(first),
            Address(records),
            Address(self.kept.at(0)),
            Address(candidates),
            integer(stride),
        ];
        let grid = |blocks| Grid { blocks, threads: LIST_THREADS };
        // Safety: these are the kernel's arguments, of memory that is there until the next step; so below.
        unsafe { launcher.launch("list_parts", grid([parts, lists, 1]), &arguments) }?;
        let arguments = [
            Address(scores),
            integer(columns),
            integer(first),
            Address(records),
            Address(candidates),
            integer(stride),
            integer(parts),
            Address(listed),
        ];
        // Safety: as above.
        unsafe { launcher.launch("list_rows", grid([lists, 1, 1]), &arguments) }
    }

    /// Copies the lists that were made from the device.
    pub fn read(&mut self, device: &Device) -> Result<(), ModelError> {
        match self.tokens() {
            0 => Ok(()),
            tokens => self.listed.read(device, self.words.reserve(device.stream(), tokens * TOKEN_WORDS)?),
        }
    }

    /// When the device has finished: brings the step's lists to rank 0, where `lists` gets them and those of other ranks.
    pub fn collect(
        &mut self,
        (group, part): (Option<&mut dyn Collective>, Part),
        tokens: impl Iterator<Item = usize> + Clone,
        lists: &mut Lists,
    ) -> Result<(), ModelError> {
        self.write();
        let received = self.listing.collect((group, part), tokens, &self.own, lists)?;
        lists.gathered_bytes += received;
        Ok(())
    }

    /// Whether the rows behind the lists of these numbers are kept.
    pub fn keeps(&self, numbers: &[u64]) -> bool {
        numbers.iter().all(|number| self.listing.keeps(*number))
    }

    /// In the last stage, copies this rank's part of rows that are kept: (numbers, slice.len())
    pub fn read_kept(&mut self, device: &Device, numbers: &[u64]) -> Result<&[f32], ModelError> {
        let columns = self.slice.len();
        let rows = self.rows.reserve(device.stream(), numbers.len() * columns)?;
        for (number, row) in numbers.iter().zip(rows.chunks_exact_mut(columns)) {
            self.kept.read(device, Listing::slot(*number) * columns, row)?;
        }
        device.finish()?;
        Ok(rows)
    }

    /// Copies rows that are kept, each to memory of its own. They are there when this returns.
    pub fn detach(&self, device: &Device, numbers: &[u64]) -> Result<Vec<CudaRow>, ModelError> {
        let columns = self.slice.len();
        let mut rows = Vec::with_capacity(numbers.len());
        for number in numbers {
            let mut row = self.stock.take(device, columns)?;
            self.kept.copy_to(device, Listing::slot(*number) * columns, row.memory_mut())?;
            rows.push(row);
        }
        device.finish()?;
        Ok(rows)
    }

    /// Tokens that are listed.
    fn tokens(&self) -> usize {
        self.records.last().map_or(0, |last| (last.begin + last.count) as usize)
    }

    /// Lists as they were copied become those that are handed over.
    fn write(&mut self) {
        self.own.clear();
        let words = match self.tokens() {
            0 => &[],
            tokens => self.words.numbers(tokens * TOKEN_WORDS),
        };
        let mut tokens = words.as_chunks::<TOKEN_WORDS>().0.iter();
        for ((_, wanted), record) in self.listing.numbered().zip(&self.records) {
            let list = tokens.by_ref().take(record.count as usize);
            let list = list.map(|[rank, id, logit]| Candidate {
                rank: f32::from_bits(*rank),
                id: *id,
                logit: f32::from_bits(*logit),
            });
            let list: Vec<Candidate> = list.filter(|token| token.rank.is_finite()).collect();
            Listing::write(wanted, self.slice.len(), &list, &mut self.own);
        }
    }
}

// === impl ListRecord ===

impl ListRecord {
    fn new(wanted: &Likeliest, count: usize, begin: usize, slot: Option<usize>) -> Self {
        let NoiseAt { seed, choice, position } =
            wanted.noise.unwrap_or(NoiseAt { seed: 0, choice: 0, position: 0 });
        Self {
            scale: wanted.scale,
            noisy: i32::from(wanted.noise.is_some()),
            seed: [seed as u32, (seed >> 32) as u32],
            choice,
            position,
            count: count as i32,
            begin: begin as i32,
            slot: slot.map_or(-1, |slot| slot as i32),
        }
    }
}

/// The lists that a device makes of rows of logits, (wanted.len(), columns), of the tokens from `first` on: to be compared with
/// those that a CPU makes of them. Lists of more than 1024 tokens are empty.
///
/// # Errors
/// [`ModelError::Device`], as of [`CudaLlama::load`](crate::CudaLlama::load).
pub fn list_rows(
    ordinal: usize,
    (rows, first): (&[f32], usize),
    wanted: &[Likeliest],
) -> Result<Vec<Vec<Candidate>>, ModelError> {
    let device = Device::open(ordinal)?;
    let columns = rows.len() / wanted.len().max(1);
    let mut lister = Lister::reserve(&device, first..first + columns, columns)?;
    let row = Row { tokens: &[0], start: 0, blocks: &[], logits_from: 0, adapter: None };
    let wanted: Vec<Option<Likeliest>> = wanted.iter().copied().map(Some).collect();
    lister.begin(&vec![row; wanted.len()], &wanted);
    let records: Vec<u32> = lister.records().collect();
    let (rows, records) = (Memory::of(&device, rows, "rows")?, Memory::of(&device, &records, "their lists")?);
    lister.make((&device, &mut Launcher::Device(&device)), rows.at(0), records.at(0))?;
    lister.read(&device)?;
    device.finish()?;
    let mut lists = Lists::default();
    lister.collect((None, Part::WHOLE), std::iter::once(columns), &mut lists)?;
    Ok(lists.iter().map(<[Candidate]>::to_vec).collect())
}
