//! One model over several processes: each rank holds its part of every matrix, and rank 0 says what is computed.
//!
//! The leader is a [`Forward`] like any other. A step of it is told to the followers, who compute their parts of the same
//! rows; the cache's blocks are planned by the leader alone, so block tables mean the same on all ranks. A rank that is
//! lost ends the group: whoever is left forms another one, over the weights that it has.

mod order;
mod rank;

use std::collections::{HashMap, hash_map::Entry};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use uniarm_collective::{Collective, CollectiveError};

use crate::adapter::{Adapter, Conditioned};
use crate::division::Part;
use crate::error::ModelError;
use crate::forward::{Forward, Row};
use crate::likeliest::{Likeliest, Lists, Ranking};
use crate::llama::{Llama, LlamaOptions};
use crate::source::ModelFiles;

use order::{Heard, Order};
pub use rank::{Arithmetic, RankForward, Terms};

/// A leader without work says so this often: followers do not take it for lost, and it hears of a lost one.
const BEAT: Duration = Duration::from_millis(250);

/// Adapters under preferences that a follower keeps; more are computed again.
const CONDITIONED_MAX: usize = 4096;

/// Words of a fingerprint.
const FINGERPRINT_WORDS: usize = 8;

/// One rank's part of a model.
pub struct Shard {
    model: Box<dyn RankForward>,
    ranking: Option<Ranking>,
    order: Order,
    /// Adapters that rank 0 has given.
    given: Vec<Arc<Adapter>>,
    conditioned: HashMap<u64, Conditioned>,
}

/// Rank 0 of a group that is complete.
pub struct Leader {
    model: Box<dyn RankForward>,
    gives_lists: bool,
    order: Order,
    /// Adapters that the followers were given, by fingerprint.
    given: Vec<([u8; 32], Weak<Adapter>)>,
    told_at: Instant,
    /// Called once, when the group is over.
    on_loss: Option<OnLoss>,
}

type OnLoss = Box<dyn FnOnce(&CollectiveError) + Send>;

// === impl Shard ===

impl Shard {
    /// Reads a part of the weights, and reserves its part of the cache, to compute on the CPU. `part`: also rank and size of
    /// a group without stages.
    ///
    /// # Errors
    /// As [`Llama::load`]; [`ModelError::Invalid`] for a rank that is none, for more ranks than the model has heads, and for
    /// more stages than it has layers.
    pub fn load(
        files: &ModelFiles,
        options: &LlamaOptions,
        part: impl Into<Part>,
    ) -> Result<Self, ModelError> {
        Ok(Self::over(Box::new(Llama::load_part(files, options, part.into())?)))
    }

    /// A part that is loaded, wherever it computes.
    pub fn over(model: Box<dyn RankForward>) -> Self {
        Self { model, ranking: None, order: Order::default(), given: Vec::new(), conditioned: HashMap::new() }
    }

    /// Hands over short lists where whole rows are not needed, if it can; `ranking` is the same at all ranks.
    pub fn ranked_by(self, ranking: Ranking) -> Self {
        Self { ranking: self.model.makes_lists().then_some(ranking), ..self }
    }

    /// Bytes of its part of the matrices.
    pub fn weight_bytes(&self) -> usize {
        self.model.weight_bytes()
    }

    /// Bytes of its part of a cache block.
    pub fn block_bytes(&self) -> usize {
        self.model.block_bytes()
    }

    /// Enters a group of [`Payload::F32`](uniarm_collective::Payload), and leaves the former one. All ranks come here before
    /// anything is computed.
    ///
    /// # Errors
    /// [`ModelError::Group`] when one does not come; [`ModelError::Invalid`] names what the ranks do not agree on.
    pub fn join(&mut self, mut group: Box<dyn Collective>) -> Result<(), ModelError> {
        let Part { rank, size, .. } = self.model.terms().part;
        if (group.rank(), group.size()) != (rank, size) {
            let reason =
                format!("{rank} of {size} ranks, in a group of {} as {}", group.size(), group.rank());
            return Err(ModelError::Invalid { field: "rank", reason });
        }
        self.agree(&mut *group)?;
        self.model.join(group, self.ranking)
    }

    /// Rank 0 of a group that it has joined. `on_loss` is called when the group is over.
    pub fn lead(self, on_loss: impl FnOnce(&CollectiveError) + Send + 'static) -> Leader {
        let Self { model, ranking, order, .. } = self;
        let gives_lists = ranking.is_some();
        let (given, told_at) = (Vec::new(), Instant::now());
        Leader { model, gives_lists, order, given, told_at, on_loss: Some(Box::new(on_loss)) }
    }

    /// Any other rank of a group that it has joined: computes what the leader says, until the group is over. Rows may be
    /// under any of `adapters`, and of those that the leader gives. Returns why it ended; the weights are there for the next
    /// group.
    pub fn follow(&mut self, adapters: &[Arc<Adapter>]) -> ModelError {
        // Another leader gives its own.
        self.given.clear();
        let ended = loop {
            if let Err(error) = self.follow_once(adapters) {
                break error;
            }
        };
        self.model.leave();
        ended
    }

    fn follow_once(&mut self, adapters: &[Arc<Adapter>]) -> Result<(), ModelError> {
        let Self { model, order, given, conditioned, .. } = self;
        let Some(group) = model.group() else {
            return Err(ModelError::Invalid { field: "group", reason: "it has joined none".to_owned() });
        };
        let told = match order.receive(group)? {
            Heard::Rows(told) if told.is_empty() => return Ok(group.barrier()?),
            Heard::Rows(told) => told,
            Heard::Again(numbers) if !model.keeps(&numbers) => {
                let reason = "rank 0 wants rows that are not kept".to_owned();
                return Err(ModelError::Invalid { field: "numbers", reason });
            }
            Heard::Again(numbers) => return model.hand_over(&numbers, &mut Vec::new()).map(|_| ()),
            Heard::Adapter(contents) => {
                let adapter = Adapter::of_contents(contents, model.config(), model.terms().fingerprint)?;
                given.push(Arc::new(adapter));
                return Ok(());
            }
            Heard::Forget(fingerprint) => {
                given.retain(|adapter| adapter.fingerprint() != fingerprint);
                conditioned.retain(|_, conditioned| conditioned.adapter().fingerprint() != fingerprint);
                return Ok(());
            }
        };
        if conditioned.len() > CONDITIONED_MAX {
            conditioned.clear();
        }
        let find = |fingerprint: &[u8; 32]| {
            adapters.iter().chain(&*given).find(|adapter| adapter.fingerprint() == *fingerprint)
        };
        for (fingerprint, preference) in told.iter().filter_map(|row| row.adapter.as_ref()) {
            let Some(adapter) = find(fingerprint) else {
                let reason = "the leader has an adapter that this rank has not".to_owned();
                return Err(ModelError::Invalid { field: "adapter", reason });
            };
            if let Entry::Vacant(place) = conditioned.entry(adapter.key(preference)) {
                place.insert(adapter.condition(preference)?);
            }
        }
        let adapter = |(fingerprint, preference): &([u8; 32], Vec<f32>)| {
            conditioned.get(&find(fingerprint)?.key(preference))
        };
        let rows: Vec<Row<'_>> = told
            .iter()
            .map(|row| Row {
                tokens: row.tokens,
                start: row.start,
                blocks: row.blocks,
                logits_from: row.logits_from,
                adapter: row.adapter.as_ref().and_then(adapter),
            })
            .collect();
        let wanted: Vec<Option<Likeliest>> = told.iter().map(|row| row.likeliest).collect();
        model.prepare(&rows)?;
        // What is computed here goes to rank 0.
        model.compute((&rows, &wanted), (&mut Vec::new(), &mut Lists::default()))
    }

    /// Compares model, cache and arithmetic with those of rank 0. All ranks of the group come here; those whose way to each
    /// other depends on where they compute come here before they take it.
    ///
    /// # Errors
    /// As [`Shard::join`].
    pub fn agree(&self, group: &mut dyn Collective) -> Result<(), ModelError> {
        let Terms { fingerprint, part, arithmetic } = self.model.terms();
        let counts = [part.stages, self.model.blocks(), self.model.block_tokens()].map(|count| count as u32);
        let words = fingerprint.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word));
        let own: Vec<u32> = words.chain(counts).chain([arithmetic as u32]).collect();
        let mut all = vec![0_u32; own.len() * group.size()];
        group.all_gather(bytemuck::cast_slice(&own), bytemuck::cast_slice_mut(&mut all))?;
        let mut ranks = all.chunks_exact(own.len());
        if ranks.clone().nth(group.rank()) != Some(&own) {
            let reason = "rounds numbers, which must arrive as they were sent".to_owned();
            return Err(ModelError::Invalid { field: "payload", reason });
        }
        let leader = ranks.next().expect("a group has a rank 0");
        let different = |(rank, terms)| Some((rank, difference(terms, leader)?));
        match (1..).zip(ranks).find_map(different) {
            None => Ok(()),
            Some((rank, what)) => {
                Err(ModelError::Invalid { field: "group", reason: format!("rank {rank} {what}") })
            }
        }
    }
}

/// What a rank does not have as rank 0 has it: of their words in the order of [`Shard::agree`].
fn difference(rank: &[u32], leader: &[u32]) -> Option<String> {
    let (weights, counts) = rank.split_at(FINGERPRINT_WORDS);
    let (lead_weights, lead_counts) = leader.split_at(FINGERPRINT_WORDS);
    let (&[stages, blocks, tokens, arithmetic], &[lead_stages, lead_blocks, lead_tokens, lead_arithmetic]) =
        (counts, lead_counts)
    else {
        return Some("is another version than rank 0".to_owned());
    };
    let place =
        |number| Arithmetic::from_number(number).map_or("elsewhere".to_owned(), |place| place.to_string());
    if arithmetic != lead_arithmetic {
        return Some(format!("computes {}, and rank 0 {}", place(arithmetic), place(lead_arithmetic)));
    }
    if weights != lead_weights {
        return Some("has other weights than rank 0".to_owned());
    }
    if stages != lead_stages {
        return Some(format!("has other stages ({stages}, not {lead_stages}) than rank 0"));
    }
    if (blocks, tokens) != (lead_blocks, lead_tokens) {
        return Some(format!(
            "has a cache of {blocks} blocks of {tokens} tokens, not {lead_blocks} of {lead_tokens} as rank 0"
        ));
    }
    None
}

// === impl Leader ===

impl Leader {
    /// Bytes of this rank's part of the matrices.
    pub fn weight_bytes(&self) -> usize {
        self.model.weight_bytes()
    }

    fn group(&mut self) -> (&mut Order, &mut dyn Collective) {
        (&mut self.order, self.model.group().expect("a leader has joined its group"))
    }

    /// Says so when the group is over.
    fn watch<T>(&mut self, result: Result<T, ModelError>) -> Result<T, ModelError> {
        if let Err(ModelError::Group(error)) = &result
            && let Some(on_loss) = self.on_loss.take()
        {
            on_loss(error);
        }
        result
    }

    fn tell(&mut self, rows: &[Row<'_>], wanted: &[Option<Likeliest>]) -> Result<(), ModelError> {
        self.give_adapters(rows)?;
        let (order, group) = self.group();
        order.send(group, rows, wanted)?;
        self.told_at = Instant::now();
        Ok(())
    }

    /// Gives the followers those adapters of a step that they have not, and lets go what nobody here has any more.
    fn give_adapters(&mut self, rows: &[Row<'_>]) -> Result<(), ModelError> {
        while let Some(index) = self.given.iter().position(|(_, adapter)| adapter.strong_count() == 0) {
            let (fingerprint, _) = self.given.swap_remove(index);
            // Two versions may have the same files.
            if self.given.iter().all(|(other, _)| *other != fingerprint) {
                let (order, group) = self.group();
                order.send_forget(group, &fingerprint)?;
            }
        }
        for adapter in rows.iter().filter_map(|row| row.adapter).map(Conditioned::adapter) {
            let Some(contents) = adapter.take_contents() else { continue };
            let fingerprint = adapter.fingerprint();
            if self.given.iter().all(|(other, _)| *other != fingerprint) {
                let (order, group) = self.group();
                order.send_adapter(group, &contents)?;
            }
            self.given.push((fingerprint, Arc::downgrade(adapter)));
        }
        Ok(())
    }
}

impl Forward for Leader {
    fn vocabulary(&self) -> usize {
        self.model.vocabulary()
    }

    fn context_tokens(&self) -> usize {
        self.model.context_tokens()
    }

    fn block_tokens(&self) -> usize {
        self.model.block_tokens()
    }

    fn blocks(&self) -> usize {
        self.model.blocks()
    }

    fn idle(&mut self) -> Result<(), ModelError> {
        if self.told_at.elapsed() < BEAT {
            return Ok(());
        }
        // An answer is waited for: a rank that hangs takes in what it is told, as far as anybody can see.
        let answered = self.tell(&[], &[]).and_then(|()| Ok(self.group().1.barrier()?));
        self.watch(answered)
    }

    fn forward(&mut self, rows: &[Row<'_>], logits: &mut Vec<f32>) -> Result<(), ModelError> {
        self.forward_listed((rows, &[]), (logits, &mut Lists::default()))
    }

    fn gives_lists(&self) -> bool {
        self.gives_lists
    }

    fn forward_listed(
        &mut self,
        (rows, wanted): (&[Row<'_>], &[Option<Likeliest>]),
        found: (&mut Vec<f32>, &mut Lists),
    ) -> Result<(), ModelError> {
        // What is wrong with the rows is said here, before anybody else hears of them.
        self.model.prepare(rows)?;
        let wanted: &[Option<Likeliest>] = if self.gives_lists { wanted } else { &[] };
        if rows.is_empty() {
            return self.model.compute((rows, wanted), found);
        }
        let done = self.tell(rows, wanted).and_then(|()| self.model.compute((rows, wanted), found));
        self.watch(done)
    }

    fn listed_rows(&mut self, numbers: &[u64], logits: &mut Vec<f32>) -> Result<usize, ModelError> {
        if !self.model.keeps(numbers) {
            return Err(ModelError::row_not_kept());
        }
        let (order, group) = self.group();
        let told = order.send_again(group, numbers);
        self.told_at = Instant::now();
        let done = told.and_then(|()| self.model.hand_over(numbers, logits));
        self.watch(done)
    }
}
