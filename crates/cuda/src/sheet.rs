//! What the device has to know of a step, or of one of its micro-batches, in one stretch of memory and one copy.

use std::ops::Range;

use uniarm_model::{Division, ModelError, Plan, Row};

use crate::adapters::{Adapters, Extent, Group};
use crate::device::Device;
use crate::lister::Lister;
use crate::locked::Locked;
use crate::memory::Growing;
use crate::peers::Peers;

/// Room for a step of usual size from the beginning: when it grows, everything gets another address.
const WORDS_MIN: usize = 1 << 14;

/// A laid out micro-batch in words of 32 bits, on the host and on the device. A step that is not cut is one.
pub(crate) struct Sheet {
    words: Vec<u32>,
    places: Places,
    /// Tokens of the batch, and those of them that have an adapter: the last ones.
    pub tokens: usize,
    pub adapted: usize,
    /// Where logits of its wanted tokens lie among those of the step: see [`Lister::places`].
    pub places_of_logits: [Range<usize>; 2],
    /// Per group of each layer of the stage, what all adapters of the batch need together.
    extents: Vec<Extent>,
    /// Where the state of a preference begins, by its key.
    states: Vec<(u64, u32)>,
    /// Where the first stage has several ranks, tokens whose embeddings each of them has, as they are gathered: one rank's behind
    /// the other's.
    owned: Vec<Range<usize>>,
    /// The words, for the device to read.
    outbox: Locked<u32>,
    memory: Growing<u32>,
    address: u64,
}

/// Where what begins, in words. Steps of one batch have everything in the same places, so that they launch the same: what
/// grows with contexts comes last, behind what changes with preferences, which has room for twice as much.
#[derive(Clone, Copy, Default)]
struct Places {
    /// Per token: id, position, cache slot, begin of its block table in `blocks`.
    ids: usize,
    positions: usize,
    slots: usize,
    tables: usize,
    /// Tokens whose logits are wanted, and of the last ones of them their lists.
    wanted: usize,
    lists: usize,
    /// Where embeddings are gathered, rows of this rank's that are wanted; and per token, its place among all of them.
    own_ids: usize,
    order: usize,
    /// Per adapted token: its adapter's table (an address), and the begin of its state in `floats`.
    adapters: usize,
    states: usize,
    floats: usize,
    blocks: usize,
}

impl Sheet {
    pub const fn new() -> Self {
        Self {
            words: Vec::new(),
            places: Places {
                ids: 0,
                positions: 0,
                slots: 0,
                tables: 0,
                wanted: 0,
                lists: 0,
                own_ids: 0,
                order: 0,
                adapters: 0,
                states: 0,
                floats: 0,
                blocks: 0,
            },
            tokens: 0,
            adapted: 0,
            places_of_logits: [0..0, 0..0],
            extents: Vec::new(),
            states: Vec::new(),
            owned: Vec::new(),
            outbox: Locked::new(),
            memory: Growing::new(),
            address: 0,
        }
    }

    /// Writes down a prepared plan, whose positions begin with the step's `first` one, and copies it to the device, and adapters
    /// that are not there yet. `fellows`: those with whom embeddings are gathered.
    pub fn fill(
        &mut self,
        device: &Device,
        (layers, division, fellows): (&Range<usize>, &Division, Option<&Peers>),
        (plan, rows): (&Plan, &[Row<'_>]),
        (lister, first): (&Lister, usize),
        adapters: &mut Adapters,
    ) -> Result<(), ModelError> {
        let positions = first..first + plan.wanted.len();
        self.words.clear();
        self.tokens = plan.tokens.len();
        self.places_of_logits = lister.places(positions.clone());
        self.adapted = plan.spans.first().map_or(0, |span| self.tokens - span.start);
        self.places.ids = self.put(plan.tokens.iter().map(|token| token.id));
        self.places.positions = self.put(plan.tokens.iter().map(|token| token.position as u32));
        self.places.slots = self.put(plan.tokens.iter().map(|token| token.slot as u32));
        self.put_tables(plan, rows);
        let wanted = lister.order(positions).map(|position| plan.wanted[position - first] as u32);
        self.places.wanted = self.put(wanted);
        self.places.lists = self.put(lister.records());
        if let Some(fellows) = fellows {
            self.put_owners(plan, fellows);
        }
        self.put_adapters(device, (layers, division), (plan, rows), adapters)?;
        self.put_blocks(plan, rows);
        // Sizes differ from step to step: memory for twice as many words spares an allocation each time.
        let count = self.words.len().next_power_of_two().max(WORDS_MIN);
        let memory = self.memory.reserve(device, count, "a step's tokens")?;
        // The step before is done, and with it the copy of what stands there: each batch of a step has a sheet of its own.
        let outbox = self.outbox.reserve(device.stream(), self.words.len())?;
        outbox.copy_from_slice(&self.words);
        memory.write(device, 0, outbox)?;
        self.address = memory.at(0);
        Ok(())
    }

    fn put(&mut self, words: impl Iterator<Item = u32>) -> usize {
        let place = self.words.len();
        self.words.extend(words);
        place
    }

    fn put_owners(&mut self, plan: &Plan, fellows: &Peers) {
        let divisions = fellows.divisions();
        let owner = |id: u32| {
            let has = |division: &Division| division.vocabulary.contains(&(id as usize));
            divisions.iter().position(has).expect("tokens are of the vocabulary")
        };
        let ids = || plan.tokens.iter().map(|token| token.id);
        self.owned.clear();
        let mut end = 0;
        for rank in 0..divisions.len() {
            let first = end;
            end += ids().filter(|id| owner(*id) == rank).count();
            self.owned.push(first..end);
        }
        let place = fellows.place();
        let first = divisions[place].vocabulary.start as u32;
        self.places.own_ids = self.put(ids().filter(|id| owner(*id) == place).map(|id| id - first));
        let mut next: Vec<usize> = self.owned.iter().map(|owned| owned.start).collect();
        self.places.order = self.put(ids().map(|id| {
            let next = &mut next[owner(id)];
            *next += 1;
            *next as u32 - 1
        }));
    }

    fn put_tables(&mut self, plan: &Plan, rows: &[Row<'_>]) {
        let mut begin = 0;
        self.places.tables = self.words.len();
        for (row, tokens) in &plan.rows {
            self.words.extend(std::iter::repeat_n(begin, tokens.len()));
            begin += rows[*row].blocks.len() as u32;
        }
    }

    fn put_blocks(&mut self, plan: &Plan, rows: &[Row<'_>]) {
        let floats = self.words.len() - self.places.floats;
        self.places.blocks = self.places.floats + floats.next_power_of_two();
        self.words.resize(self.places.blocks, 0);
        for (row, _) in &plan.rows {
            self.words.extend_from_slice(rows[*row].blocks);
        }
    }

    fn put_adapters(
        &mut self,
        device: &Device,
        (layers, division): (&Range<usize>, &Division),
        (plan, rows): (&Plan, &[Row<'_>]),
        adapters: &mut Adapters,
    ) -> Result<(), ModelError> {
        self.extents.clear();
        self.extents.resize(layers.len() * Group::COUNT, Extent::default());
        // Addresses lie at multiples of their size.
        self.words.resize(self.words.len().next_multiple_of(2), 0);
        self.places.adapters = self.words.len();
        for span in &plan.spans {
            let conditioned =
                rows[plan.tokens[span.start].row].adapter.expect("spans are of rows with an adapter");
            let loaded = adapters.load(device, (layers, division), conditioned)?;
            let table = loaded.table();
            for _ in span.clone() {
                self.words.extend([table as u32, (table >> 32) as u32]);
            }
            for (extent, other) in self.extents.iter_mut().zip(loaded.extents()) {
                *extent = extent.join(*other);
            }
        }
        self.put_states(plan, rows);
        Ok(())
    }

    /// States of preferences, each once.
    fn put_states(&mut self, plan: &Plan, rows: &[Row<'_>]) {
        self.states.clear();
        self.places.states = self.words.len();
        self.places.floats = self.words.len() + self.adapted;
        let adapted = &plan.tokens[self.tokens - self.adapted..];
        self.words.resize(self.places.floats, 0);
        for (index, token) in adapted.iter().enumerate() {
            let conditioned = rows[token.row].adapter.expect("the last tokens have one");
            let key = conditioned.key();
            let known = self.states.iter().rev().find(|(other, _)| *other == key).map(|(_, begin)| *begin);
            let begin = known.unwrap_or_else(|| {
                let begin = (self.words.len() - self.places.floats) as u32;
                self.words.extend(conditioned.state().iter().map(|float| float.to_bits()));
                self.states.push((key, begin));
                begin
            });
            self.words[self.places.states + index] = begin;
        }
    }

    pub fn ids(&self) -> u64 {
        self.at(self.places.ids)
    }

    pub fn positions(&self) -> u64 {
        self.at(self.places.positions)
    }

    pub fn slots(&self) -> u64 {
        self.at(self.places.slots)
    }

    pub fn wanted_rows(&self) -> u64 {
        self.at(self.places.wanted)
    }

    pub fn lists(&self) -> u64 {
        self.at(self.places.lists)
    }

    pub fn own_ids(&self) -> u64 {
        self.at(self.places.own_ids)
    }

    pub fn order(&self) -> u64 {
        self.at(self.places.order)
    }

    /// By place among the ranks of the first stage.
    pub fn owned(&self) -> &[Range<usize>] {
        &self.owned
    }

    pub fn tables(&self) -> u64 {
        self.at(self.places.tables)
    }

    pub fn blocks(&self) -> u64 {
        self.at(self.places.blocks)
    }

    pub fn adapters(&self) -> u64 {
        self.at(self.places.adapters)
    }

    pub fn states(&self) -> u64 {
        self.at(self.places.states)
    }

    pub fn floats(&self) -> u64 {
        self.at(self.places.floats)
    }

    pub fn extent(&self, index: usize) -> Extent {
        self.extents[index]
    }

    /// Ranks of the widest group.
    pub fn ranks_max(&self) -> usize {
        self.extents.iter().map(|extent| extent.ranks).max().unwrap_or(0)
    }

    fn at(&self, place: usize) -> u64 {
        self.address + (place * size_of::<u32>()) as u64
    }
}
